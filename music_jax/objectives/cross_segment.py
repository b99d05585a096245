"""The sum of P log P over the units of different segments, in blocks of the dim x dim matrix P.

This is the only term that requires matrix products: P = paᵀ pb / N, and two more in its gradient.
They are computed on blocks of rows of P. On several devices each computes a tile of P: the devices
form a grid, in which a row of devices shares rows of P and a column of devices shares columns.

The tiles sum J log J - J, where J = P K² is the ratio of P to the uniform distribution. Its
derivative log J is small where the joint distribution is nearly uniform, as it is at initialization
and at the minimum. The derivative of P log P is near 1 - 2 log K everywhere instead, and the
gradient of the softmax reduces this constant to rounding errors. The difference between the two,
(1 - 2 log K) P, is summed without a matrix product: see `_clamped_mass`.

Probabilities are given as ratios K p - c: see `music_jax.objectives.probabilities`. With the ratios
ra and rb of the two views, and means over the N samples,
J = mean((ra + c) (rb + c)) = mean(ra rb) + c (mean(ra) + mean(rb)) + c.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from music_jax.objectives.global_batch import (
    AxisName,
    Pair,
    accumulation_dtype,
    axis_size,
    global_mean,
    global_sum,
    varying,
)

# Bytes of P that are held at a time. On CPUs and TPUs a block stays in the caches or the on-chip
# memory. GPUs take a few microseconds to start each of the ten kernels of a block: at N = 256 more
# than these take on a small block. There 256 MiB hold all of P up to 8,192 units, without a loop.
_BLOCK_BYTES = 2**24
_GPU_BLOCK_BYTES = 2**28


class Tile(NamedTuple):
    """Static properties of a tile of P.

    Attributes:
      batch: Number of samples in the global batch, N.
      units: Number of units per segment, K.
      whole: Whether the tile is all of P, and so consists of complete segments.
    """

    batch: int
    units: int
    whole: bool


def cross_segment_entropy(
    ratios: Pair,
    added: Pair,
    center: jax.Array,
    *,
    axis_name: AxisName | None,
    product_dtype: Any,
) -> jax.Array:
    """Averages the sum of P log P over the ordered pairs of different segments.

    Args:
      ratios: Ratios of the two views, each [local batch, num_segments, units].
      added: Amount that the clamp adds to the sum of each segment's probabilities in the two views,
        each [local batch, num_segments].
      center: Center c of the ratios.
      axis_name: Axis, or axes, over which the batch is split.
      product_dtype: Dtype of the operands of the matrix products.

    Returns:
      A scalar, the same on every device.
    """
    batch, num_segments, units = ratios[0].shape
    devices = axis_size(axis_name)
    tile = Tile(batch * devices, units, whole=devices == 1)
    flat_a, flat_b = (r.reshape(batch, -1).astype(product_dtype) for r in ratios)  # [n, D]
    divergence = _sum_of_tiles(tile, flat_a, flat_b, center, axis_name).astype(ratios[0].dtype)
    pairs = num_segments * (num_segments - 1)
    mass = 1 + global_mean(_clamped_mass(*added), axis_name) / pairs
    return divergence / (pairs * units**2) + (1 - 2 * math.log(units)) * mass


def _clamped_mass(added_a: jax.Array, added_b: jax.Array) -> jax.Array:
    """Returns the excess over S (S - 1) of the sum of P between different segments.

    The clamped probabilities of a segment sum to 1 + e, where e is what the clamp has added. The
    sum of P over all pairs of different segments is then the batch's mean of the sum of
    (1 + ea) (1 + eb).
    """
    sum_a, sum_b = jnp.sum(added_a, axis=-1), jnp.sum(added_b, axis=-1)
    others = added_a.shape[1] - 1
    same = jnp.sum(added_a * added_b, axis=-1)
    return jnp.mean(others * (sum_a + sum_b) + sum_a * sum_b - same)


def _sum_of_tiles(
    tile: Tile, ra: jax.Array, rb: jax.Array, center: jax.Array, axis_name: AxisName | None
) -> jax.Array:
    batch, devices = ra.shape[0], axis_size(axis_name)
    if axis_name is None or devices == 1:
        zero = jnp.zeros((), jnp.int32)
        return global_sum(tile_divergence(tile, (ra, rb), center, (zero, zero)), axis_name)
    rows, columns = device_grid(devices)
    lines = np.arange(devices).reshape(rows, columns)
    index = jax.lax.axis_index(axis_name)
    ra = _own_units(ra, center, axis_name, exchange=lines.T, gather=lines)
    rb = _own_units(rb, center, axis_name, exchange=lines, gather=lines.T)
    # Both views' samples in the same order: [columns, rows, local batch, units held]
    ra = ra.reshape(columns, rows, batch, -1)
    rb = rb.reshape(rows, columns, batch, -1).swapaxes(0, 1)
    ra, rb = (r.reshape(devices * batch, -1) for r in (ra, rb))  # [N, units held]
    starts = (index // columns * ra.shape[1], index % columns * rb.shape[1])
    return global_sum(tile_divergence(tile, (ra, rb), center, starts), axis_name)


def device_grid(devices: int) -> tuple[int, int]:
    """Returns the rows and columns of the grid, which is as nearly square as possible.

    Each device receives batch * dim * (1 / rows + 1 / columns) probabilities from the others.
    """
    rows = next(r for r in range(math.isqrt(devices), 0, -1) if devices % r == 0)
    return rows, devices // rows


def _own_units(
    r: jax.Array,
    center: jax.Array,
    axis_name: AxisName,
    *,
    exchange: np.ndarray,
    gather: np.ndarray,
) -> jax.Array:
    """Exchanges all units of the device's samples for all samples of the device's units.

    Args:
      r: Ratios [local batch, dim].
      center: Center c of the ratios.
      axis_name: Axis, or axes, over which the batch is split.
      exchange: Groups of devices that divide the units among themselves, one per row.
      gather: Groups of devices that hold the same units, one per row.

    Returns:
      Ratios [N, units held]. Samples are ordered by position in the `gather` group, then in the
      `exchange` group. Units are padded to a multiple of the size of an `exchange` group.
    """
    parts = exchange.shape[1]
    r = _pad_units(r, -r.shape[1] % parts, center)
    if parts > 1:
        r = jax.lax.all_to_all(r, axis_name, 1, 0, axis_index_groups=_groups(exchange), tiled=True)
    if gather.shape[1] > 1:
        r = jax.lax.all_gather(r, axis_name, axis_index_groups=_groups(gather), tiled=True)
    return r


def _pad_units(r: jax.Array, count: int, center: jax.Array | int) -> jax.Array:
    """Appends `count` units of probability 0."""
    zero_probability = -jnp.asarray(center, r.dtype)
    return jnp.pad(r, ((0, 0), (0, count)), constant_values=zero_probability) if count else r


def _groups(groups: np.ndarray) -> list[list[int]] | None:
    return None if len(groups) == 1 else groups.tolist()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tile_divergence(tile: Tile, ratios: Pair, center: jax.Array, starts: Pair) -> jax.Array:
    """Sums J log J - J over the elements of a tile of J = P K² between different segments.

    Uses no collectives. The gradient takes one pass over the tile, which computes the value and
    both gradients by three matrix products. It can be differentiated again in either mode, at the
    cost of the derivative of this pass.

    Args:
      tile: Static properties of the tile.
      ratios: Ratios [N, rows] of the first view, for the units of the tile's rows, and [N, columns]
        of the second view, for those of its columns.
      center: Center c of the ratios.
      starts: Index of the unit of the first row and of the first column.

    Returns:
      A scalar.
    """
    return _on_blocks(functools.partial(_value, tile), center, ratios, starts)


def _tile_divergence_forward(
    tile: Tile, ratios: Pair, center: jax.Array, starts: Pair
) -> tuple[jax.Array, Pair]:
    return _on_blocks(functools.partial(_value_and_gradients, tile), center, ratios, starts)


def _tile_divergence_backward(
    tile: Tile, gradients: Pair, cotangent: jax.Array
) -> tuple[Pair, None, None]:
    gradient_a, gradient_b = (
        (cotangent * gradient.astype(cotangent.dtype)).astype(gradient.dtype)
        for gradient in gradients
    )
    return (gradient_a, gradient_b), None, None


tile_divergence.defvjp(_tile_divergence_forward, _tile_divergence_backward)


def _on_blocks(function: Callable[..., Any], center: jax.Array, ratios: Pair, starts: Pair) -> Any:
    """Calls `function(c, blocks, ratios, starts)` with the number of blocks for the platform.

    Also c is static, so that c = 0 adds no operations.
    """

    def with_blocks(count: int) -> Callable[..., Any]:
        def call(center: jax.Array, *arguments: Pair) -> Any:
            centered, plain = (functools.partial(function, c, count) for c in (1, 0))
            return jax.lax.cond(center > 0, centered, plain, *arguments)

        return call

    count, on_gpu = (_count_blocks(ratios, size) for size in (_BLOCK_BYTES, _GPU_BLOCK_BYTES))
    arguments = center, ratios, starts
    if count == on_gpu:
        return with_blocks(count)(*arguments)
    gpu = with_blocks(on_gpu)
    return jax.lax.platform_dependent(*arguments, cuda=gpu, rocm=gpu, default=with_blocks(count))


def _count_blocks(ratios: Pair, block_bytes: int) -> int:
    """Returns the number of blocks of rows of a tile, each of at most `block_bytes`."""
    rows, columns = (r.shape[1] for r in ratios)
    return -(-rows * columns * accumulation_dtype(ratios[0].dtype).itemsize // block_bytes)


def _value(tile: Tile, center: int, blocks: int, ratios: Pair, starts: Pair) -> jax.Array:
    rb = ratios[1]
    padded, block_starts = _blocks(ratios[0], blocks, center)

    zero = jnp.zeros((), accumulation_dtype(rb.dtype))

    def step(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        block = _block(padded, block_starts, start)
        joint, log_joint = _joint(tile, center, block, rb, starts, start, zero.dtype)
        return total + jnp.sum((joint + center) * log_joint), None

    total = _loop(step, varying(zero, jax.typeof(rb).mat.varying), block_starts)
    return total - _mass(tile, center, ratios, starts)


def _value_and_gradients(
    tile: Tile, center: int, blocks: int, ratios: Pair, starts: Pair
) -> tuple[jax.Array, Pair]:
    ra, rb = ratios
    padded, block_starts = _blocks(ra, blocks, center)
    whole_b = rb + center  # K p

    def step(gradients: Pair, start: jax.Array) -> tuple[Pair, None]:
        gradient_a, gradient_b = gradients
        block = _block(padded, block_starts, start)
        slope = _joint(tile, center, block, rb, starts, start, rb.dtype)[1]
        # [N, columns] [r, columns] -> [N, r] and [N, r] [r, columns] -> [N, columns]
        block_gradient = _dot(whole_b, slope, 1, 1) / tile.batch
        gradient_a = jax.lax.dynamic_update_slice_in_dim(gradient_a, block_gradient, start, axis=1)
        gradient_b += _dot(block + center, slope, 1, 0) / tile.batch
        return (gradient_a, gradient_b), None

    dtype = accumulation_dtype(rb.dtype)
    axes = jax.typeof(rb).mat.varying
    zeros = tuple(varying(jnp.zeros(r.shape, dtype), axes) for r in (padded, rb))
    gradient_a, gradient_b = _loop(step, zeros, block_starts)
    gradient_a = gradient_a[:, : ra.shape[1]]
    # J is linear in K pa, so that the sum of J log J equals that of K pa times the gradient, which
    # saves a second pass over the elements of each block.
    value = jnp.sum((ra.astype(dtype) + center) * gradient_a)
    value -= _mass(tile, center, ratios, starts)
    return value, (gradient_a.astype(ra.dtype), gradient_b.astype(rb.dtype))


def _joint(
    tile: Tile,
    center: int,
    block: jax.Array,
    rb: jax.Array,
    starts: Pair,
    block_start: jax.Array,
    log_dtype: jnp.dtype,
) -> Pair:
    """Computes J - c for a block of rows, and log J in `log_dtype`, set to 0 within a segment."""

    def mean(r: jax.Array) -> jax.Array:
        return jnp.mean(r, axis=0, dtype=accumulation_dtype(r.dtype))

    joint = _dot(block, rb, 0, 0) / tile.batch  # [N, r] [N, columns] -> [r, columns]
    # The bounds below apply to padding only, where J is near 0.
    if center:
        joint += mean(block)[:, None] + mean(rb)[None, :]
        log_joint = jnp.log1p(jnp.maximum(joint, -0.5))
    else:
        log_joint = jnp.log(jnp.maximum(joint, 1e-30))
    row_segments = _segments(tile, starts[0] + block_start, block.shape[1])
    column_segments = _segments(tile, starts[1], rb.shape[1])
    different = row_segments[:, None] != column_segments[None, :]
    # Rounded first, so that XLA can store the product's result in the narrower type.
    return joint, jnp.where(different, log_joint.astype(log_dtype), jnp.zeros((), log_dtype))


def _mass(tile: Tile, center: int, ratios: Pair, starts: Pair) -> jax.Array:
    """Sums J over the tile's elements between different segments, from the segments' sums."""
    dtype = accumulation_dtype(ratios[0].dtype)
    ra, rb = ratios
    # The center is added to the sums, since the ratios may have few digits.
    all_a, all_b = (jnp.sum(r, axis=1, dtype=dtype) + center * r.shape[1] for r in ratios)  # [N]
    if tile.whole:
        sums = [
            jnp.sum(r.reshape(len(r), -1, tile.units), axis=2, dtype=dtype) + center * tile.units
            for r in ratios
        ]  # [N, S]
        return (jnp.vdot(all_a, all_b) - jnp.vdot(*sums)) / tile.batch
    # Subtracts only the segments that both the rows and the columns of the tile contain.
    first = jnp.maximum(*starts) // tile.units
    shared = -(-min(ra.shape[1], rb.shape[1]) // tile.units) + 1
    shared_segments = first + jnp.arange(shared, dtype=jnp.int32)
    segment_sums = []
    for r, start in zip((ra, rb), starts, strict=True):
        members = _segments(tile, start, r.shape[1])[:, None] == shared_segments[None, :]
        sums_of_ratios = _dot(r, members.astype(r.dtype), 1, 0)  # [N, shared]
        counts = jnp.sum(members, axis=0, dtype=dtype)[None, :]
        segment_sums.append(sums_of_ratios + center * counts)
    return (jnp.vdot(all_a, all_b) - jnp.vdot(*segment_sums)) / tile.batch


def _blocks(ra: jax.Array, count: int, center: int) -> tuple[jax.Array, np.ndarray]:
    """Pads the rows to blocks of equal size; returns them and the first row of each block."""
    size = -(-ra.shape[1] // count)
    padded = _pad_units(ra, count * size - ra.shape[1], center)
    return padded, np.arange(count, dtype=np.int32) * size


def _block(padded: jax.Array, block_starts: np.ndarray, start: jax.Array) -> jax.Array:
    size = padded.shape[1] // len(block_starts)
    return jax.lax.dynamic_slice_in_dim(padded, start, size, axis=1)


def _segments(tile: Tile, start: jax.Array, count: int) -> jax.Array:
    return (start + jnp.arange(count, dtype=jnp.int32)) // tile.units


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    dimensions = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=accumulation_dtype(x.dtype))


def _loop(
    step: Callable[[Any, jax.Array], tuple[Any, None]], carry: Any, starts: np.ndarray
) -> Any:
    """Returns the carry after `step` at each start."""
    if len(starts) == 1:
        return step(carry, jnp.asarray(starts[0]))[0]
    return jax.lax.scan(step, carry, jnp.asarray(starts))[0]
