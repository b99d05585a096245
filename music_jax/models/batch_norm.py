"""Batch normalisation that normalises each view by its own statistics."""

import jax
import jax.numpy as jnp
from flax import nnx


class BatchNorm(nnx.Module):
    """Batch normalisation over all but the channel axis, separately for each of several views.

    The batch holds the views of one sample side by side: row `n * num_views + v` is view `v` of
    sample `n`, so that one pass of the network serves all views while a batch sharded over a mesh
    keeps its sharding. Under `jax.jit` the statistics are those of the global batch. They are
    computed in float32 whatever the input; the running ones move once a view, in the views' order,
    as they would in one pass a view.

    Attributes:
      scale: [channels], float32.
      bias: [channels], float32.
      mean: running mean, [channels], float32.
      var: running variance (biased, as in Flax), [channels], float32.
    """

    def __init__(
        self,
        channels: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        zero_scale: bool = False,
    ):
        """Sets up for inputs of `channels` channels.

        Args:
          channels: size of the last axis.
          momentum: share of the running statistics that one update keeps.
          epsilon: added to the variance.
          zero_scale: start the scale at 0, which makes a residual block start as the identity.
        """
        self.momentum = momentum
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(channels) if zero_scale else jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x: jax.Array, *, train: bool, num_views: int) -> jax.Array:
        """Normalises [batch * num_views, ..., channels]; the result has the input's type."""
        channels = x.shape[-1]
        if not train:
            factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
            offset = self.bias[...] - self.mean[...] * factor
            shape = (1,) * (x.ndim - 1) + (channels,)
            normalized = x.astype(jnp.float32) * factor.reshape(shape) + offset.reshape(shape)
            return normalized.astype(x.dtype)
        views = x.reshape(-1, num_views, *x.shape[1:])  # [batch, views, ..., channels]
        wide = views.astype(jnp.float32)
        axes = (0, *range(2, wide.ndim - 1))
        mean = jnp.mean(wide, axis=axes)  # [views, channels]
        var = jnp.maximum(jnp.mean(jnp.square(wide), axis=axes) - jnp.square(mean), 0.0)
        for v in range(num_views):
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean[v]
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * var[v]
        factor = self.scale[...][None] * jax.lax.rsqrt(var + self.epsilon)  # [views, channels]
        offset = self.bias[...][None] - mean * factor
        shape = (1, num_views) + (1,) * (wide.ndim - 3) + (channels,)
        normalized = wide * factor.reshape(shape) + offset.reshape(shape)
        return normalized.astype(x.dtype).reshape(x.shape)
