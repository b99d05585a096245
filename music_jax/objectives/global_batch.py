"""Checks two views' embeddings, and computes over the global batch that they are part of.

The batch may be split over devices under `jit` over a mesh, in `shard_map` or in `pmap`.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AxisName = str | tuple[str, ...]
Pair = tuple[jax.Array, jax.Array]


def check_embeddings(embeddings: jax.Array, name: str = "embeddings") -> None:
    """Raises ValueError unless `embeddings` is a floating array of shape [batch, dim]."""
    if not hasattr(embeddings, "shape") or not hasattr(embeddings, "dtype"):
        raise ValueError(
            f"{name}: expected an array of shape [batch, dim], got {type(embeddings).__name__}; "
            "convert it with jnp.asarray"
        )
    if embeddings.ndim != 2:
        raise ValueError(
            f"{name}: expected shape [batch, dim], got {tuple(embeddings.shape)}; flatten all but "
            "the batch axis"
        )
    if 0 in embeddings.shape:
        raise ValueError(
            f"{name}: expected at least one sample and one unit, got {tuple(embeddings.shape)}"
        )
    if not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise ValueError(
            f"{name}: expected a floating dtype, got {embeddings.dtype}; cast it first, with "
            "embeddings.astype(jnp.float32)"
        )


def check_pair(embeddings_a: jax.Array, embeddings_b: jax.Array) -> None:
    """Raises ValueError unless both views are [batch, dim], of one shape and one floating dtype."""
    check_embeddings(embeddings_a, "embeddings_a")
    check_embeddings(embeddings_b, "embeddings_b")
    if embeddings_a.shape != embeddings_b.shape:
        raise ValueError(
            "expected two views of the same samples, of equal shapes, got "
            f"{tuple(embeddings_a.shape)} and {tuple(embeddings_b.shape)}"
        )
    # Without jax_enable_x64, a float64 array of NumPy is float32 in JAX.
    dtypes = [jax.dtypes.canonicalize_dtype(z.dtype) for z in (embeddings_a, embeddings_b)]
    if dtypes[0] != dtypes[1]:
        raise ValueError(
            f"expected two views of equal dtypes, got {dtypes[0]} and {dtypes[1]}; cast one to the "
            "other"
        )


def axis_size(axis_name: AxisName | None) -> int:
    """Returns the number of devices along `axis_name`; 1 for None."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def global_sum(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Sums over the devices along `axis_name`; returns `x` for None."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def global_mean(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Averages over the devices along `axis_name`; returns `x` for None."""
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def subtract_mean(x: jax.Array, axis_name: AxisName | None = None) -> jax.Array:
    """Subtracts the mean over the global batch from [batch, dim], in float32 or float64."""
    x = jnp.asarray(x, accumulation_dtype(x.dtype))
    return x - global_mean(jnp.mean(x, axis=0, keepdims=True), axis_name)


def all_samples(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Gathers the rows of all devices along `axis_name`; returns `x` for None."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def varying(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """Marks `x` as varying over `axes`, as collectives and the carry of a scan require."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def accumulation_dtype(dtype: Any) -> jnp.dtype:
    """Returns float64 for float64, and float32 for any narrower type."""
    wide = dtype == jnp.float64 and jax.dtypes.canonicalize_dtype(dtype) == jnp.float64
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def over_global_batch(
    function: Callable[..., Any],
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *replicated: jax.Array,
    axis_name: AxisName | None,
) -> Any:
    """Calls `function(a, b, *replicated, axis_name=...)` on the devices that hold the batch.

    With an `axis_name` the caller is already inside `shard_map` or `pmap`. Without one, `function`
    runs under `shard_map` over the mesh of the embeddings, or else over that of `jax.set_mesh`, and
    is given each device's samples. If there is no mesh, it is given the whole batch.

    Args:
      function: Function that returns arrays that are equal on every device.
      embeddings_a: First view, [batch, dim].
      embeddings_b: Second view, [batch, dim].
      *replicated: Further arrays, replicated on every device.
      axis_name: Axis, or axes, that the caller has mapped over the batch.

    Returns:
      The result of `function`.
    """
    if axis_name is not None:
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        embeddings_a, embeddings_b = (varying(x, names) for x in (embeddings_a, embeddings_b))
        return function(embeddings_a, embeddings_b, *replicated, axis_name=axis_name)
    mesh = _find_mesh(embeddings_a, embeddings_b)
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


def _find_mesh(embeddings_a: jax.Array, embeddings_b: jax.Array) -> Mesh | AbstractMesh:
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and context.manual_axes:
        return context  # inside a shard_map, which leaves only the other axes to choose from
    for x in (embeddings_a, embeddings_b):
        own = getattr(jax.typeof(x).sharding, "mesh", None)
        if own is not None and not own.empty:
            return own
    return context


def _axes_that_divide(mesh: Mesh | AbstractMesh, batch: int) -> tuple[str, ...]:
    """Returns the axes to split the batch over: those of one type, while they divide it.

    Axes of a single device are included: XLA's CPU compiler aborts at a bfloat16 sum under a
    `shard_map` that leaves an axis to the compiler.
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
