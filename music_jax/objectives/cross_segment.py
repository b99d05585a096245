"""The sum of P log P over the units of different segments, without a D x D matrix.

Of the three terms this one alone needs matrix products: P = paᵀ pb / N, and twice more in the
gradient. Here they are taken a block of rows of P at a time, and across devices each computes a
tile of P: the devices stand in a grid, whose rows share rows of P and whose columns share columns.

What is summed over the tiles is P log(P K²) - P, whose slope log(P K²) is small where the joint
distribution is near to uniform, as it is at first and at the minimum. The slope of P log P is near
1 - 2 log K everywhere instead, of which the softmax's gradient leaves nothing but rounding errors.
The difference, (1 - 2 log K) P, sums up without a matrix product: see `_mass_of_clamp`.
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
    pa: jax.Array,
    pb: jax.Array,
    added_a: jax.Array,
    added_b: jax.Array,
    *,
    axis_name: AxisName | None,
    product_dtype: Any,
    precision: Any,
) -> jax.Array:
    """Mean over ordered pairs of different segments of the sum of P log P over their units.

    Args:
      pa: [local batch, num_segments, units] clamped probabilities of the first view.
      pb: [local batch, num_segments, units] those of the second view.
      added_a: [local batch, num_segments], what the clamp has added to each segment's sum of `pa`.
      added_b: [local batch, num_segments], likewise of `pb`.
      axis_name: axis, or axes, over which the batch is split.
      product_dtype: dtype of the products' operands.
      precision: `precision` of the products.

    Returns:
      A scalar, the same on every device.
    """
    batch, num_segments, units = pa.shape
    devices = axis_size(axis_name)
    tile = Tile(batch * devices, units, precision, whole=devices == 1)
    flat_a, flat_b = (p.reshape(batch, -1).astype(product_dtype) for p in (pa, pb))  # [n, D]
    divergence = _sum_of_tiles(tile, flat_a, flat_b, axis_name).astype(pa.dtype)
    pairs = num_segments * (num_segments - 1)
    mass = 1 + global_mean(_mass_of_clamp(added_a, added_b), axis_name) / pairs
    return divergence / pairs + (1 - 2 * math.log(units)) * mass


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
    tile: Tile, pa: jax.Array, pb: jax.Array, axis_name: AxisName | None
) -> jax.Array:
    batch, devices = pa.shape[0], axis_size(axis_name)
    if axis_name is None or devices == 1:
        zero = jnp.zeros((), jnp.int32)
        return global_sum(tile_divergence(tile, pa, pb, zero, zero), axis_name)
    rows, columns = device_grid(devices)
    lines = np.arange(devices).reshape(rows, columns)
    index = jax.lax.axis_index(axis_name)
    pa = _own_units(pa, axis_name, exchange=lines.T, gather=lines)
    pb = _own_units(pb, axis_name, exchange=lines, gather=lines.T)
    # The samples of both views in one order: [columns, rows, local batch, units held]
    pa = pa.reshape(columns, rows, batch, -1)
    pb = pb.reshape(rows, columns, batch, -1).swapaxes(0, 1)
    pa, pb = (p.reshape(devices * batch, -1) for p in (pa, pb))  # [N, units held]
    row_start = index // columns * pa.shape[1]
    column_start = index % columns * pb.shape[1]
    return global_sum(tile_divergence(tile, pa, pb, row_start, column_start), axis_name)


def device_grid(devices: int) -> tuple[int, int]:
    """Rows and columns of the grid: as near to a square as the number of devices allows.

    A device needs batch * dim * (1 / rows + 1 / columns) probabilities of the others.
    """
    rows = next(r for r in range(math.isqrt(devices), 0, -1) if devices % r == 0)
    return rows, devices // rows


def _own_units(
    p: jax.Array, axis_name: AxisName, *, exchange: np.ndarray, gather: np.ndarray
) -> jax.Array:
    """From a device's samples of all units to all samples of its units.

    Args:
      p: [local batch, dim].
      axis_name: axis, or axes, over which the batch is split.
      exchange: groups of devices, in each of which the units are divided.
      gather: groups of devices that hold the same units.

    Returns:
      [N, units held], samples ordered by place in the `gather` group, then in `exchange`. The units
      are filled up with zeros to a multiple of the devices in an `exchange` group.
    """
    parts = exchange.shape[1]
    p = jnp.pad(p, ((0, 0), (0, -p.shape[1] % parts)))
    if parts > 1:
        p = jax.lax.all_to_all(p, axis_name, 1, 0, axis_index_groups=_groups(exchange), tiled=True)
    if gather.shape[1] > 1:
        p = jax.lax.all_gather(p, axis_name, axis_index_groups=_groups(gather), tiled=True)
    return p


def _groups(groups: np.ndarray) -> list[list[int]] | None:
    return None if len(groups) == 1 else groups.tolist()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tile_divergence(
    tile: Tile, pa: jax.Array, pb: jax.Array, row_start: jax.Array, column_start: jax.Array
) -> jax.Array:
    """Sum of P log(P K²) - P over the elements of a tile of P between different segments.

    Purely local. Differentiated, one pass over the tile gives the value and both gradients, three
    matrix products in all. Differentiable once more in reverse, at the cost of that pass's own
    derivative; not in forward mode.

    Args:
      tile: what is known at compile time.
      pa: [N, rows] probabilities of the first view for the units of the tile's rows.
      pb: [N, columns] probabilities of the second view for the units of the tile's columns.
      row_start: the first row's unit.
      column_start: the first column's unit.

    Returns:
      A scalar.
    """
    joint_and_slope = functools.partial(_joint_and_slope, tile, pb, row_start, column_start)
    padded, starts = _blocks(pa, pb)

    def step(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        joint, slope = joint_and_slope(_block(padded, starts, start), start)
        return total + jnp.sum(joint * slope), None

    zero = jnp.zeros((), accumulation_dtype(pb.dtype))
    total = _loop(step, _varying_like(zero, pb), starts)
    return total - _mass(tile, pa, pb, row_start, column_start)


def _tile_divergence_forward(
    tile: Tile, pa: jax.Array, pb: jax.Array, row_start: jax.Array, column_start: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    joint_and_slope = functools.partial(_joint_and_slope, tile, pb, row_start, column_start)
    padded, starts = _blocks(pa, pb)

    def step(
        gradients: tuple[jax.Array, jax.Array], start: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        gradient_a, gradient_b = gradients
        block = _block(padded, starts, start)
        slope = joint_and_slope(block, start)[1].astype(pb.dtype)
        # [N, columns] [r, columns] -> [N, r] and [N, r] [r, columns] -> [N, columns]
        block_gradient = _dot(tile, pb, slope, 1, 1) / tile.batch
        gradient_a = jax.lax.dynamic_update_slice_in_dim(gradient_a, block_gradient, start, axis=1)
        gradient_b += _dot(tile, block, slope, 1, 0) / tile.batch
        return (gradient_a, gradient_b), None

    dtype = accumulation_dtype(pb.dtype)
    zeros = tuple(_varying_like(jnp.zeros(p.shape, dtype), pb) for p in (padded, pb))
    gradient_a, gradient_b = _loop(step, zeros, starts)
    gradient_a = gradient_a[:, : pa.shape[1]]
    # P is linear in pa, so that the sum of P times its slope is that of pa times the gradient: the
    # block's elements need not be gone through once more.
    value = jnp.sum(pa.astype(gradient_a.dtype) * gradient_a)
    value -= _mass(tile, pa, pb, row_start, column_start)
    return value, (gradient_a.astype(pa.dtype), gradient_b.astype(pb.dtype))


def _tile_divergence_backward(
    tile: Tile, gradients: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    gradient_a, gradient_b = (
        (cotangent * gradient.astype(cotangent.dtype)).astype(gradient.dtype)
        for gradient in gradients
    )
    return gradient_a, gradient_b, None, None


tile_divergence.defvjp(_tile_divergence_forward, _tile_divergence_backward)


def _joint_and_slope(
    tile: Tile,
    pb: jax.Array,
    row_start: jax.Array,
    column_start: jax.Array,
    block: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A block of rows of P, and log(P K²) between different segments, else 0: [r, columns]."""
    joint = _dot(tile, block, pb, 0, 0) / tile.batch  # [N, r] [N, columns] -> [r, columns]
    # Clamped probabilities give P >= 1e-16: only units that fill up a tile are smaller.
    slope = jnp.log(jnp.maximum(joint, 1e-30)) + 2 * math.log(tile.units)
    row_segments = _segments(tile, row_start + start, block.shape[1])
    column_segments = _segments(tile, column_start, pb.shape[1])
    different = row_segments[:, None] != column_segments[None, :]
    return joint, jnp.where(different, slope, 0.0)


def _mass(
    tile: Tile, pa: jax.Array, pb: jax.Array, row_start: jax.Array, column_start: jax.Array
) -> jax.Array:
    """Sum of P over the tile's elements between different segments, from the segments' sums."""
    dtype = accumulation_dtype(pa.dtype)
    all_a, all_b = (jnp.sum(p, axis=1, dtype=dtype) for p in (pa, pb))  # [N]
    if tile.whole:
        sums = [
            jnp.sum(p.reshape(len(p), -1, tile.units), axis=2, dtype=dtype) for p in (pa, pb)
        ]  # [N, S]
        return (jnp.vdot(all_a, all_b) - jnp.vdot(*sums)) / tile.batch
    # Only the segments that the tile's rows and columns share are taken off.
    first = jnp.maximum(row_start, column_start) // tile.units
    shared = -(-min(pa.shape[1], pb.shape[1]) // tile.units) + 1
    shared_segments = first + jnp.arange(shared, dtype=jnp.int32)
    segment_sums = []
    for p, start in ((pa, row_start), (pb, column_start)):
        members = _segments(tile, start, p.shape[1])[:, None] == shared_segments[None, :]
        segment_sums.append(_dot(tile, p, members.astype(p.dtype), 1, 0))  # [N, shared]
    return (jnp.vdot(all_a, all_b) - jnp.vdot(*segment_sums)) / tile.batch


def _blocks(pa: jax.Array, pb: jax.Array) -> tuple[jax.Array, np.ndarray]:
    """The tile's rows, filled up with zeros to blocks of equal size, and each block's first row."""
    rows = pa.shape[1]
    count = -(-rows * pb.shape[1] // _BLOCK_ELEMENTS)
    size = -(-rows // count)
    padded = jnp.pad(pa, ((0, 0), (0, count * size - rows)))
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
