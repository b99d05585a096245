"""Vision transformers (Dosovitskiy et al, arXiv 2010.11929) as self-supervised training uses them.

Blocks and sizes are timm's `vit_*_patch16_224` (DeiT's), so that weights can be exchanged: layer
normalization before each part, a class token, and the exact GELU. As in MoCo v3 (Chen et al, arXiv
2104.02057) the position embedding is a fixed two-dimensional sine-cosine one, which needs no
weights and fits any size of image, and features are the class token after the last normalization.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from music_jax.models.remat import apply_block

EPSILON = 1e-6

# MoCo v3's: Xavier's uniform distribution, in which queries, keys and values each are a matrix of
# their own (variance 1 / width).
_KERNEL_INIT = nnx.initializers.xavier_uniform()
_QKV_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")


class _Attention(nnx.Module):
    def __init__(self, width: int, num_heads: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = nnx.Linear(width, 3 * width, dtype=dtype, kernel_init=_QKV_INIT, rngs=rngs)
        self.output = nnx.Linear(width, width, dtype=dtype, kernel_init=_KERNEL_INIT, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        # Its softmax is in float32, to which it promotes bfloat16 implicitly.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.output(y.reshape(batch, tokens, width))


class TransformerBlock(nnx.Module):
    """Self-attention, then a perceptron of one hidden layer, each added to its input."""

    def __init__(
        self, width: int, num_heads: int, mlp_width: int, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """Sets up for tokens of `width`."""
        self.norm1 = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.attention = _Attention(width, num_heads, dtype, rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.mlp_in = nnx.Linear(width, mlp_width, dtype=dtype, kernel_init=_KERNEL_INIT, rngs=rngs)
        self.mlp_out = nnx.Linear(
            mlp_width, width, dtype=dtype, kernel_init=_KERNEL_INIT, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to tokens [batch, tokens, width]."""
        x = x + self.attention(_normalize(self.norm1, x))
        hidden = nnx.gelu(self.mlp_in(_normalize(self.norm2, x)), approximate=False)
        return x + self.mlp_out(hidden)


class VisionTransformer(nnx.Module):
    """A vision transformer whose features are its class token.

    Attributes:
      num_features: size of the features that it returns, the width.
      patch_size: side of the patches, in pixels; images are a multiple of it.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        mlp_ratio: int = 4,
        channels: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        remat: bool = False,
    ):
        """Builds the network.

        Args:
          width: size of a token, a multiple of 4 and of `num_heads`.
          depth: number of blocks.
          num_heads: heads of the attention.
          patch_size: side of the patches, in pixels.
          mlp_ratio: hidden units of a block's perceptron over the width.
          channels: channels of the images.
          dtype: what the network computes in; parameters, and the sums of softmax and
            normalization, are float32.
          rngs: gives the initial weights.
          remat: compute each block's activations again for the gradient instead of keeping them.
        """
        self.dtype = dtype
        self.remat = remat
        self.patch_size = patch_size
        self.num_features = width
        self.patches = nnx.Linear(
            channels * patch_size**2, width, dtype=dtype, kernel_init=_KERNEL_INIT, rngs=rngs
        )
        self.class_token = nnx.Param(1e-6 * jax.random.normal(rngs.params(), (width,)))
        self.blocks = nnx.List(
            [
                TransformerBlock(width, num_heads, mlp_ratio * width, dtype, rngs)
                for _ in range(depth)
            ]
        )
        self.norm = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool, num_views: int = 1) -> jax.Array:
        """Maps images [batch * num_views, height, width, channels] to float32 features.

        Nothing depends on the rest of the batch, nor on `train`.
        """
        del train, num_views
        patches = _patches(images.astype(self.dtype), self.patch_size)
        batch, rows, columns, _ = patches.shape
        x = self.patches(patches.reshape(batch, rows * columns, -1))  # [batch, patches, width]
        positions = sincos_positions(rows, columns, self.num_features)
        x = x + jnp.asarray(positions, self.dtype)[None]
        token = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (batch, 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1)  # [batch, 1 + patches, width]
        for block in self.blocks:
            x = apply_block(block, x, remat=self.remat)
        return self.norm(x[:, 0].astype(jnp.float32))


def _normalize(norm: nnx.LayerNorm, x: jax.Array) -> jax.Array:
    """Normalizes in float32, and gives the input's type."""
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def _patches(images: jax.Array, size: int) -> jax.Array:
    """[batch, height, width, channels] to [batch, rows, columns, size * size * channels]."""
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    cut = images.reshape(batch, rows, size, columns, size, channels)
    return cut.swapaxes(2, 3).reshape(batch, rows, columns, size * size * channels)


def sincos_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """A fixed embedding of each place of a grid, as in MoCo v3.

    Args:
      rows: of the grid.
      columns: of the grid.
      width: size of an embedding, a multiple of 4.

    Returns:
      [rows * columns, width], row by row: a quarter each of the sines and cosines of the row, then
      of the column, at wavelengths from 2 pi to 10,000 times 2 pi.
    """
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))  # [width / 4]
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    # Each [rows * columns, width / 4]
    angles = [np.outer(place, frequencies) for place in (y, x)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)
