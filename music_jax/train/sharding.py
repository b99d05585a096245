"""Which device holds which part of each parameter and of what the optimizer keeps of it.

Every device needs every parameter to compute with, but only one needs to keep and to update it. So
the optimizer's state, and the update itself, are split over all devices: gradients are reduced
straight to the device that updates their part (weight-update sharding, Xu et al, arXiv 2004.13336;
ZeRO, Rajbhandari et al, arXiv 1910.02054). So XLA does it on 32 chips of v5e; on 256 it sums the
projector's gradients on every chip first, at twice the traffic. Along the mesh's axis `fsdp`
parameters stay split between steps, and are gathered for a step, in what the network computes in;
along `data` they are gathered as soon as they are updated.

The rules depend on an array's shape alone: what the optimizer keeps has its parameter's shape, and
so its parameter's place.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Smaller arrays stay whole: biases and normalization layers, which are many and weigh nothing.
MIN_ELEMENTS = 2**16

# The parts along `fsdp` are those that `data` divides further.
_UPDATE_AXES = ("fsdp", "data")


def update_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the update of a parameter is split: over all devices, or `fsdp` alone, or not at all.

    Args:
      shape: of the parameter.
      mesh: of the axes `data` and `fsdp`.

    Returns:
      A spec that splits one axis, the largest that the devices divide. The last is taken only if no
      other can be: a TPU lays it out in tiles of 128, which parts of it would not fill.
    """
    for axes in (_UPDATE_AXES, _UPDATE_AXES[:1]):
        axis = _axis_to_split(shape, math.prod(mesh.shape[name] for name in axes))
        if axis is not None:
            return PartitionSpec(*(None,) * axis, axes)
    return PartitionSpec()


def parameter_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter is split between steps: as its update is, but over `fsdp` alone."""
    return PartitionSpec(*("fsdp" if axes else None for axes in update_spec(shape, mesh)))


def of_parameters(params: Any, mesh: Mesh) -> Any:
    """The sharding of each parameter between steps."""
    return jax.tree.map(lambda x: NamedSharding(mesh, parameter_spec(x.shape, mesh)), params)


def of_updates(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each gradient and of each array that the optimizer keeps."""
    return jax.tree.map(lambda x: NamedSharding(mesh, update_spec(x.shape, mesh)), tree)


def split_for_update(tree: Any, mesh: Mesh) -> Any:
    """Has each device hold what it updates; to be called under `jax.jit`."""
    return jax.lax.with_sharding_constraint(tree, of_updates(tree, mesh))


def gather(params: Any, mesh: Mesh, dtype: jnp.dtype) -> Any:
    """Has every device hold every parameter; to be called under `jax.jit`.

    What is split along `fsdp` arrives in `dtype`, to which the network casts it in any case: where
    that is bfloat16, half as much is sent and held.
    """

    def gathered(x: jax.Array) -> jax.Array:
        split = mesh.shape["fsdp"] > 1 and any(parameter_spec(x.shape, mesh))
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(x.astype(dtype) if split else x, whole)

    return jax.tree.map(gathered, params)


def _axis_to_split(shape: tuple[int, ...], parts: int) -> int | None:
    if math.prod(shape) < MIN_ELEMENTS:
        return None
    last = len(shape) - 1
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    return max(divisible, key=lambda axis: (axis != last, shape[axis]), default=None)
