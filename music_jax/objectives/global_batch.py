"""One value for the global batch: under jit over a mesh, in shard_map and in pmap."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AxisName = str | tuple[str, ...]


def axis_size(axis_name: AxisName | None) -> int:
    """Number of devices along `axis_name`; 1 for None."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def global_sum(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Sum over the devices along `axis_name`; `x` itself for None."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def global_mean(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Mean over the devices along `axis_name`; `x` itself for None."""
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def global_max(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Maximum over the devices along `axis_name`; `x` itself for None."""
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def accumulation_dtype(dtype: Any) -> jnp.dtype:
    """float64 for float64, and float32 for all that is narrower."""
    return jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def over_global_batch(
    function: Callable[..., Any],
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *replicated: jax.Array,
    axis_name: AxisName | None,
    mesh: Mesh | AbstractMesh | None,
) -> Any:
    """Calls `function(a, b, *replicated, axis_name=...)` on the devices that hold the batch.

    With an `axis_name` the caller is already inside `shard_map` or `pmap`. Without one, a mesh is
    looked for: the argument, else the one in which the embeddings live, else the one of
    `jax.set_mesh`. If there is one, `function` runs under `shard_map` over it and sees its device's
    samples alone. If there is none, `function` sees the whole batch.

    Args:
      function: returns arrays that are equal on every device.
      embeddings_a: [batch, dim].
      embeddings_b: [batch, dim].
      *replicated: further arrays, whole on every device.
      axis_name: name of the axis, or axes, that the caller has mapped over the batch.
      mesh: the mesh to use under `jit`.

    Returns:
      What `function` returns.
    """
    if axis_name is not None:
        varying = [_varying(x, axis_name) for x in (embeddings_a, embeddings_b)]
        return function(*varying, *replicated, axis_name=axis_name)
    mesh = _mesh_of(embeddings_a, embeddings_b, mesh)
    axes = _axes_that_divide(mesh, embeddings_a.shape[0])
    if not axes:
        return function(embeddings_a, embeddings_b, *replicated, axis_name=None)
    batch_spec, whole = PartitionSpec(axes), PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(function, axis_name=axes),
        mesh=mesh,
        in_specs=(batch_spec, batch_spec) + (whole,) * len(replicated),
        out_specs=whole,
        axis_names=set(axes),
    )
    if AxisType.Explicit in mesh.axis_types:
        sharding = NamedSharding(mesh, batch_spec)
        embeddings_a = jax.sharding.reshard(embeddings_a, sharding)
        embeddings_b = jax.sharding.reshard(embeddings_b, sharding)
    return jax.jit(mapped)(embeddings_a, embeddings_b, *replicated)


def _mesh_of(
    embeddings_a: jax.Array, embeddings_b: jax.Array, mesh: Mesh | AbstractMesh | None
) -> Mesh | AbstractMesh:
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and context.manual_axes:
        return context  # inside a shard_map: only what it has left to the compiler is ours
    if mesh is not None:
        return mesh
    for x in (embeddings_a, embeddings_b):
        own = getattr(jax.typeof(x).sharding, "mesh", None)
        if own is not None and not own.empty:
            return own
    return context


def _axes_that_divide(mesh: Mesh | AbstractMesh, batch: int) -> tuple[str, ...]:
    """The axes over which the batch can be split: those of one type, as far as they divide it.

    Axes of a single device are among them, so that none is left to the compiler: XLA's compiler for
    CPUs aborts at a sum in bfloat16 under a `shard_map` that leaves one.
    """
    if mesh.empty:
        return ()
    axes: list[str] = []
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    wanted = AxisType.Explicit if AxisType.Explicit in mesh.axis_types else AxisType.Auto
    for name in mesh.axis_names:
        size = mesh.shape[name] * math.prod(mesh.shape[chosen] for chosen in axes)
        if types[name] == wanted and batch % size == 0:
            axes.append(name)
    several = math.prod(mesh.shape[name] for name in axes) > 1
    return tuple(axes) if several else ()


def _varying(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Marks `x` as differing between the devices, which the collectives under `shard_map` ask."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    missing = tuple(name for name in names if name not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x
