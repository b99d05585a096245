"""The squared norm of a product over the batch, from whichever of its two forms is smaller."""

import jax
import jax.numpy as jnp

from music_jax.objectives.global_batch import AxisName, axis_size, global_sum


def squared_norm_of_product(x: jax.Array, y: jax.Array, *, axis_name: AxisName | None) -> jax.Array:
    """Sum of the squared elements of xᵀ y, the product taken over the global batch.

    ||xᵀ y||² = <x xᵀ, y yᵀ>: a [dim, dim] matrix or two [N, N] ones, whichever are smaller.

    Args:
      x: [local batch, dim].
      y: [local batch, dim].
      axis_name: axis, or axes, over which the batch is split.

    Returns:
      A scalar, the same on every device.
    """
    batch, dim = x.shape
    if batch * axis_size(axis_name) >= dim:
        return jnp.sum(global_sum(x.T @ y, axis_name) ** 2)  # [D, D]
    # A device's rows of the Gram matrices: [local batch, N]
    gram_x = x @ _all_samples(x, axis_name).T
    gram_y = gram_x if y is x else y @ _all_samples(y, axis_name).T
    return global_sum(jnp.sum(gram_x * gram_y), axis_name)


def _all_samples(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)
