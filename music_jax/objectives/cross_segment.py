"""The sum of P log P over the units of different segments, without a D x D matrix.

Of the three terms this one alone needs matrix products: P = paᵀ pb / N, and twice more in the
gradient. Here they are taken a block of rows of P at a time, and across devices each computes a
tile of P: the devices stand in a grid, whose rows share rows of P and whose columns share columns.

What is summed over the tiles is J log J - J, where J = P K² is the ratio of P to the uniform
distribution: its slope log J is small where the joint distribution is near to uniform, as it is at
first and at the minimum. The slope of P log P is near 1 - 2 log K everywhere instead, of which the
softmax's gradient leaves nothing but rounding errors. The difference, (1 - 2 log K) P, sums up
without a matrix product: see `_mass_of_clamp`.

The probabilities come as ratios K p - c: see `music_jax.objectives.ratios`. With ra and rb those of
the two views, c 0 or 1, and means over the N samples,
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
    accumulation_dtype,
    axis_size,
    global_mean,
    global_sum,
)

# Elements of P held at a time: 16 MB in float32.
_BLOCK_ELEMENTS = 2**22


class Tile(NamedTuple):
    """What is known of a tile of P at compile time.

    Attributes:
      batch: samples in the global batch, N.
      units: units a segment, K.
      precision: `precision` of the products.
      whole: whether it is all of P, and so begins and ends with a segment.
    """

    batch: int
    units: int
    precision: Any
    whole: bool


def cross_segment_entropy(
    ra: jax.Array,
    rb: jax.Array,
    added_a: jax.Array,
    added_b: jax.Array,
    center: jax.Array,
    *,
    axis_name: AxisName | None,
    product_dtype: Any,
    precision: Any,
) -> jax.Array:
    """Mean over ordered pairs of different segments of the sum of P log P over their units.

    Args:
      ra: [local batch, num_segments, units] ratios of the first view.
      rb: [local batch, num_segments, units] those of the second view.
      added_a: [local batch, num_segments], what the clamp has added to the sum of each segment's
        probabilities in the first view.
      added_b: [local batch, num_segments], likewise in the second.
      center: c.
      axis_name: axis, or axes, over which the batch is split.
      product_dtype: dtype of the products' operands.
      precision: `precision` of the products.

    Returns:
      A scalar, the same on every device.
    """
    batch, num_segments, units = ra.shape
    devices = axis_size(axis_name)
    tile = Tile(batch * devices, units, precision, whole=devices == 1)
    flat_a, flat_b = (r.reshape(batch, -1).astype(product_dtype) for r in (ra, rb))  # [n, D]
    divergence = _sum_of_tiles(tile, flat_a, flat_b, center, axis_name).astype(ra.dtype)
    pairs = num_segments * (num_segments - 1)
    mass = 1 + global_mean(_mass_of_clamp(added_a, added_b), axis_name) / pairs
    return divergence / (pairs * units**2) + (1 - 2 * math.log(units)) * mass


def _mass_of_clamp(added_a: jax.Array, added_b: jax.Array) -> jax.Array:
    """What the sum of P between different segments exceeds S (S - 1) by, for the clamp alone.

    A segment's clamped probabilities sum to 1 + e, e being what the clamp has added. So the sum
    of P over all pairs of different segments is the batch's mean of the sum of (1 + ea) (1 + eb).
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
        return global_sum(tile_divergence(tile, ra, rb, center, zero, zero), axis_name)
    rows, columns = device_grid(devices)
    lines = np.arange(devices).reshape(rows, columns)
    index = jax.lax.axis_index(axis_name)
    ra = _own_units(ra, center, axis_name, exchange=lines.T, gather=lines)
    rb = _own_units(rb, center, axis_name, exchange=lines, gather=lines.T)
    # The samples of both views in one order: [columns, rows, local batch, units held]
    ra = ra.reshape(columns, rows, batch, -1)
    rb = rb.reshape(rows, columns, batch, -1).swapaxes(0, 1)
    ra, rb = (r.reshape(devices * batch, -1) for r in (ra, rb))  # [N, units held]
    row_start = index // columns * ra.shape[1]
    column_start = index % columns * rb.shape[1]
    tiles = tile_divergence(tile, ra, rb, center, row_start, column_start)
    return global_sum(tiles, axis_name)


def device_grid(devices: int) -> tuple[int, int]:
    """Rows and columns of the grid: as near to a square as the number of devices allows.

    A device needs batch * dim * (1 / rows + 1 / columns) probabilities of the others.
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
    """From a device's samples of all units to all samples of its units.

    Args:
      r: [local batch, dim] ratios.
      center: c.
      axis_name: axis, or axes, over which the batch is split.
      exchange: groups of devices, in each of which the units are divided.
      gather: groups of devices that hold the same units.

    Returns:
      [N, units held], samples ordered by place in the `gather` group, then in `exchange`. The units
      are filled up with ratios of nothing to a multiple of the devices in an `exchange` group.
    """
    parts = exchange.shape[1]
    r = _fill_up(r, -r.shape[1] % parts, center)
    if parts > 1:
        r = jax.lax.all_to_all(r, axis_name, 1, 0, axis_index_groups=_groups(exchange), tiled=True)
    if gather.shape[1] > 1:
        r = jax.lax.all_gather(r, axis_name, axis_index_groups=_groups(gather), tiled=True)
    return r


def _fill_up(r: jax.Array, count: int, center: jax.Array | int) -> jax.Array:
    """Adds so many columns of units that no sample is in."""
    nothing = -jnp.asarray(center, r.dtype)
    return jnp.pad(r, ((0, 0), (0, count)), constant_values=nothing) if count else r


def _groups(groups: np.ndarray) -> list[list[int]] | None:
    return None if len(groups) == 1 else groups.tolist()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tile_divergence(
    tile: Tile,
    ra: jax.Array,
    rb: jax.Array,
    center: jax.Array,
    row_start: jax.Array,
    column_start: jax.Array,
) -> jax.Array:
    """Sum of J log J - J over the elements of a tile of J = P K² between different segments.

    Purely local. Differentiated, one pass over the tile gives the value and both gradients, three
    matrix products in all. Differentiable once more in reverse, at the cost of that pass's own
    derivative; not in forward mode.

    Args:
      tile: what is known at compile time.
      ra: [N, rows] ratios of the first view for the units of the tile's rows.
      rb: [N, columns] ratios of the second view for the units of the tile's columns.
      center: c.
      row_start: the first row's unit.
      column_start: the first column's unit.

    Returns:
      A scalar.
    """
    return _centerd_or_not(functools.partial(_value, tile), center, ra, rb, row_start, column_start)


def _tile_divergence_forward(
    tile: Tile,
    ra: jax.Array,
    rb: jax.Array,
    center: jax.Array,
    row_start: jax.Array,
    column_start: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    value, gradients = _centerd_or_not(
        functools.partial(_value_and_gradients, tile), center, ra, rb, row_start, column_start
    )
    return value, gradients


def _tile_divergence_backward(
    tile: Tile, gradients: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None, None]:
    gradient_a, gradient_b = (
        (cotangent * gradient.astype(cotangent.dtype)).astype(gradient.dtype)
        for gradient in gradients
    )
    return gradient_a, gradient_b, None, None, None


tile_divergence.defvjp(_tile_divergence_forward, _tile_divergence_backward)


def _centerd_or_not(function: Callable[..., Any], center: jax.Array, *arguments: jax.Array) -> Any:
    """`function(c, *arguments)`, c being known when it is compiled: 0 costs nothing."""
    centerd, plain = (functools.partial(function, c) for c in (1, 0))
    return jax.lax.cond(center > 0, centerd, plain, *arguments)


def _value(
    tile: Tile,
    center: int,
    ra: jax.Array,
    rb: jax.Array,
    row_start: jax.Array,
    column_start: jax.Array,
) -> jax.Array:
    joint_and_slope = _joint_and_slope(tile, center, rb, row_start, column_start)
    padded, starts = _blocks(ra, rb, center)

    def step(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        joint, slope = joint_and_slope(_block(padded, starts, start), start)
        return total + jnp.sum((joint + center) * slope), None

    zero = jnp.zeros((), accumulation_dtype(rb.dtype))
    total = _loop(step, _varying_like(zero, rb), starts)
    return total - _mass(tile, center, ra, rb, row_start, column_start)


def _value_and_gradients(
    tile: Tile,
    center: int,
    ra: jax.Array,
    rb: jax.Array,
    row_start: jax.Array,
    column_start: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    joint_and_slope = _joint_and_slope(tile, center, rb, row_start, column_start)
    padded, starts = _blocks(ra, rb, center)
    whole_b = rb + center  # K p, by which and the slope the gradient is made

    def step(
        gradients: tuple[jax.Array, jax.Array], start: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        gradient_a, gradient_b = gradients
        block = _block(padded, starts, start)
        slope = joint_and_slope(block, start)[1].astype(rb.dtype)
        # [N, columns] [r, columns] -> [N, r] and [N, r] [r, columns] -> [N, columns]
        block_gradient = _dot(tile, whole_b, slope, 1, 1) / tile.batch
        gradient_a = jax.lax.dynamic_update_slice_in_dim(gradient_a, block_gradient, start, axis=1)
        gradient_b += _dot(tile, block + center, slope, 1, 0) / tile.batch
        return (gradient_a, gradient_b), None

    dtype = accumulation_dtype(rb.dtype)
    zeros = tuple(_varying_like(jnp.zeros(r.shape, dtype), rb) for r in (padded, rb))
    gradient_a, gradient_b = _loop(step, zeros, starts)
    gradient_a = gradient_a[:, : ra.shape[1]]
    # J is linear in K pa, so that the sum of J times its slope is that of K pa times the gradient:
    # the block's elements need not be gone through once more.
    value = jnp.sum((ra + center).astype(dtype) * gradient_a)
    value -= _mass(tile, center, ra, rb, row_start, column_start)
    return value, (gradient_a.astype(ra.dtype), gradient_b.astype(rb.dtype))


def _joint_and_slope(
    tile: Tile, center: int, rb: jax.Array, row_start: jax.Array, column_start: jax.Array
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """From a block of rows and its start to J - c, and log J between different segments, else 0."""

    def mean(r: jax.Array) -> jax.Array:
        return jnp.mean(r, axis=0, dtype=accumulation_dtype(r.dtype))

    def joint_and_slope(block: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        joint = _dot(tile, block, rb, 0, 0) / tile.batch  # [N, r] [N, columns] -> [r, columns]
        # Only the units that fill up a block have a J near to 0.
        if center:
            joint += mean(block)[:, None] + mean(rb)[None, :]
            slope = jnp.log1p(jnp.maximum(joint, -0.5))
        else:
            slope = jnp.log(jnp.maximum(joint, 1e-30))
        row_segments = _segments(tile, row_start + start, block.shape[1])
        column_segments = _segments(tile, column_start, rb.shape[1])
        different = row_segments[:, None] != column_segments[None, :]
        return joint, jnp.where(different, slope, 0.0)

    return joint_and_slope


def _mass(
    tile: Tile,
    center: int,
    ra: jax.Array,
    rb: jax.Array,
    row_start: jax.Array,
    column_start: jax.Array,
) -> jax.Array:
    """Sum of J over the tile's elements between different segments, from the segments' sums."""
    dtype = accumulation_dtype(ra.dtype)
    ra, rb = (r + center for r in (ra, rb))
    all_a, all_b = (jnp.sum(r, axis=1, dtype=dtype) for r in (ra, rb))  # [N]
    if tile.whole:
        sums = [
            jnp.sum(r.reshape(len(r), -1, tile.units), axis=2, dtype=dtype) for r in (ra, rb)
        ]  # [N, S]
        return (jnp.vdot(all_a, all_b) - jnp.vdot(*sums)) / tile.batch
    # Only the segments that the tile's rows and columns share are taken off.
    first = jnp.maximum(row_start, column_start) // tile.units
    shared = -(-min(ra.shape[1], rb.shape[1]) // tile.units) + 1
    shared_segments = first + jnp.arange(shared, dtype=jnp.int32)
    segment_sums = []
    for r, start in ((ra, row_start), (rb, column_start)):
        members = _segments(tile, start, r.shape[1])[:, None] == shared_segments[None, :]
        segment_sums.append(_dot(tile, r, members.astype(r.dtype), 1, 0))  # [N, shared]
    return (jnp.vdot(all_a, all_b) - jnp.vdot(*segment_sums)) / tile.batch


def _blocks(ra: jax.Array, rb: jax.Array, center: int) -> tuple[jax.Array, np.ndarray]:
    """The tile's rows, filled up to blocks of equal size, and each block's first row."""
    rows = ra.shape[1]
    count = -(-rows * rb.shape[1] // _BLOCK_ELEMENTS)
    size = -(-rows // count)
    padded = _fill_up(ra, count * size - rows, center)
    return padded, np.arange(count, dtype=np.int32) * size


def _block(padded: jax.Array, starts: np.ndarray, start: jax.Array) -> jax.Array:
    size = padded.shape[1] // len(starts)
    return jax.lax.dynamic_slice_in_dim(padded, start, size, axis=1)


def _segments(tile: Tile, start: jax.Array, count: int) -> jax.Array:
    return (start + jnp.arange(count, dtype=jnp.int32)) // tile.units


def _dot(tile: Tile, x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=tile.precision,
        preferred_element_type=accumulation_dtype(x.dtype),
    )


def _loop(
    step: Callable[[Any, jax.Array], tuple[Any, None]], carry: Any, starts: np.ndarray
) -> Any:
    """The carry after `step` at each start."""
    if len(starts) == 1:
        return step(carry, jnp.asarray(starts[0]))[0]
    return jax.lax.scan(step, carry, jnp.asarray(starts))[0]


def _varying_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Marks a constant as differing between the devices as `like` does: a carry's type is fixed."""
    axes = tuple(jax.typeof(like).mat.varying)
    return jax.lax.pcast(x, axes, to="varying") if axes else x
