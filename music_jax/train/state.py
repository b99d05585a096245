"""The training state, how it is sharded over a mesh, and how it is saved.

Every device computes with all parameters, but only one has to store and update each of them. So the
optimizer's state and the update are sharded over all devices, and gradients are reduced straight to
the device that updates their part (weight-update sharding, Xu et al, arXiv 2004.13336; ZeRO,
Rajbhandari et al, arXiv 1910.02054). XLA compiles it to that on 32 chips of v5e; on 256 it sums the
projector's gradients on every chip first, at twice the traffic. Along the mesh's axis `fsdp`
parameters stay sharded between steps and are gathered for a step in the type that the network
computes in; along `data` they are gathered as soon as they are updated.

A sharding depends on the shape alone: an array of the optimizer has the shape of its parameter, and
so its sharding.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.checkpoint.manager import Checkpoints
from music_jax.data.order import ORDER_VERSION, TrainingOrder
from music_jax.errors import UserError
from music_jax.models.network import INIT_COMPILER_OPTIONS, init_network
from music_jax.train.guards import GuardState, init_guard_state

_logger = logging.getLogger(__name__)

# Smaller arrays, such as biases and the parameters of normalization layers, are not sharded.
MIN_ELEMENTS = 2**16

_UPDATE_AXES = ("fsdp", "data")  # `data` divides the shards of `fsdp` further


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes.

    Attributes:
      step: Number of steps taken, int32.
      params: Parameters of the network.
      batch_stats: Running statistics of its normalization layers.
      opt_state: State of the optimizer.
      guard: State of the guards. Once one has tripped, nothing but the step changes.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    guard: GuardState


def init_state(
    config: config_dict.ConfigDict, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the state before the first step, initialized on the mesh from `config.seed`."""
    init, key = functools.partial(_initial_state, config, optimizer), jax.random.key(config.seed)
    shardings = state_shardings(jax.eval_shape(init, key), mesh)  # whose trace `jit` uses again
    compiled = jax.jit(init, out_shardings=shardings, compiler_options=INIT_COMPILER_OPTIONS)
    return compiled(key)


def abstract_state(
    config: config_dict.ConfigDict, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state's shapes and types as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: _initial_state(config, optimizer, jax.random.key(0)))


def _initial_state(
    config: config_dict.ConfigDict, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    params, batch_stats = init_network(config, key)
    step, opt_state = jnp.zeros((), jnp.int32), optimizer.init(params)
    return TrainState(step, params, batch_stats, opt_state, init_guard_state())


def save_state(
    checkpoints: Checkpoints, step: int, state: TrainState, order: TrainingOrder, **trees: Any
) -> None:
    """Starts saving a state with its position in the input; see `Checkpoints.save`."""
    checkpoints.save(step, _input_position(step, order), state=vars(state), **trees)


def restore_state(
    checkpoints: Checkpoints,
    step: int,
    like: TrainState,
    mesh: Mesh,
    order: TrainingOrder | None = None,
) -> TrainState:
    """Restores a state onto a mesh, whatever devices it was saved from.

    Args:
      checkpoints: The checkpoints.
      step: The checkpoint's step.
      like: A state of the same shapes, or its shapes.
      mesh: The devices to restore onto.
      order: Order of the images, to compare with the saved one.

    Raises:
      UserError: There is no such checkpoint, it does not fit the state, or it was trained on
        another input.
    """
    shardings = state_shardings(like, mesh)
    state = TrainState(**checkpoints.restore(step, vars(like), vars(shardings)))
    if order is not None:
        saved, now = checkpoints.input_position(step), _input_position(step, order)
        if isinstance(saved, dict) and "order" not in saved:
            saved = saved | {"order": ORDER_VERSION}
            _logger.warning(
                f"step {step} was saved by an earlier version of music_jax: from here on the "
                "images come in another order than the one that this run began with, and with "
                "optimizer.name=sgd biases and normalization parameters are no longer decayed"
            )
        if saved != now:
            raise UserError(
                f"the checkpoint of step {step} was reading {saved}, but this run would read "
                f"{now}; has the dataset changed?"
            )
    return state


def _input_position(step: int, order: TrainingOrder) -> dict[str, int]:
    return {
        "next_sample_index": order.sample_index(step, 0),
        "num_records": order.num_records,
        "batch_size": order.batch_size,
        "seed": order.seed,
        "order": ORDER_VERSION,
    }


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the sharding of each array of a state between steps."""
    return dataclasses.replace(
        jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state),
        params=_shardings(state.params, mesh, parameter_spec),
        opt_state=_shardings(state.opt_state, mesh, update_spec),
    )


def _shardings(tree: Any, mesh: Mesh, spec: Callable[..., PartitionSpec]) -> Any:
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(x.shape, mesh)), tree)


def update_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the sharding of a parameter's update: over all devices, over `fsdp`, or none.

    Args:
      shape: Shape of the parameter.
      mesh: Mesh with the axes `fsdp` and `data`.

    Returns:
      A spec that shards one axis: the largest that the devices divide, and the last only if no
      other can be, since a TPU pads shards of it to tiles of 128.
    """
    last = len(shape) - 1
    for axes in (_UPDATE_AXES, _UPDATE_AXES[:1]):
        parts = math.prod(mesh.shape[name] for name in axes)
        divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
        if divisible and math.prod(shape) >= MIN_ELEMENTS:
            axis = max(divisible, key=lambda axis: (axis != last, shape[axis]))
            return PartitionSpec(*(None,) * axis, axes)
    return PartitionSpec()


def parameter_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the sharding of a parameter between steps: that of its update, only over `fsdp`."""
    return PartitionSpec(*("fsdp" if axes else None for axes in update_spec(shape, mesh)))


def shard_for_update(tree: Any, mesh: Mesh) -> Any:
    """Shards gradients or parameters as they are updated; to be called under `jax.jit`."""
    return jax.lax.with_sharding_constraint(tree, _shardings(tree, mesh, update_spec))


def gather(params: Any, mesh: Mesh, dtype: jnp.dtype) -> Any:
    """Replicates parameters on every device; to be called under `jax.jit`.

    Those sharded along `fsdp` are cast first to `dtype`, which the network does in any case: with
    bfloat16, half as much is sent and held.
    """

    def gathered(x: jax.Array) -> jax.Array:
        sharded = mesh.shape["fsdp"] > 1 and any(parameter_spec(x.shape, mesh))
        replicated = NamedSharding(mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(x.astype(dtype) if sharded else x, replicated)

    return jax.tree.map(gathered, params)
