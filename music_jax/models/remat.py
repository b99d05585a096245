"""Rematerialisation: a block's activations are computed again instead of being kept."""

from typing import Any

import jax
from flax import nnx


def apply_block(block: Any, x: jax.Array, *, remat: bool, **options: Any) -> jax.Array:
    """Applies a block of a backbone, and under `remat` keeps nothing but `x` for the gradient.

    Args:
      block: called as `block(x, **options)`; may update its running statistics.
      x: its input.
      remat: whether to compute the block anew when its gradient is taken.
      **options: further arguments, which are no arrays.

    Returns:
      The block's output.
    """

    def call(block: Any, x: jax.Array) -> jax.Array:
        return block(x, **options)

    return (nnx.remat(call) if remat else call)(block, x)
