"""The projection head between the backbone and the objective."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from music_jax.models.batch_norm import BatchNorm

# Uniform in +-1 / sqrt(fan_in): a variance of 1 / (3 fan_in).
_KERNEL_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Projector(nnx.Module):
    """Hidden layers of Linear with bias, batch normalization and ReLU; then Linear without bias."""

    def __init__(
        self,
        num_features: int,
        hidden_sizes: Sequence[int],
        output_size: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Builds the head.

        Args:
          num_features: size of the backbone's features.
          hidden_sizes: sizes of the hidden layers; may be empty.
          output_size: size of the embedding.
          dtype: what the products compute in; parameters and statistics are float32.
          rngs: gives the initial weights.
        """
        sizes = (num_features, *hidden_sizes)
        self.hidden = nnx.List(
            [
                nnx.Linear(a, b, dtype=dtype, kernel_init=_KERNEL_INIT, rngs=rngs)
                for a, b in itertools.pairwise(sizes)
            ]
        )
        self.norms = nnx.List([BatchNorm(size) for size in hidden_sizes])
        self.output = nnx.Linear(
            sizes[-1],
            output_size,
            use_bias=False,
            dtype=dtype,
            kernel_init=_KERNEL_INIT,
            rngs=rngs,
        )
        self.dtype = dtype

    def __call__(self, features: jax.Array, *, train: bool, num_views: int = 1) -> jax.Array:
        """Maps features [batch * num_views, num_features] to embeddings, in the head's dtype."""
        x = features.astype(self.dtype)
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = nnx.relu(norm(linear(x), train=train, num_views=num_views))
        return self.output(x)
