"""Vision transformers (Dosovitskiy et al, arXiv 2010.11929) for self-supervised training.

Blocks and sizes are those of timm's `vit_*_patch16_224` (DeiT), so that weights can be exchanged:
pre-normalization, a class token, and the exact GELU. As in MoCo v3 (Chen et al, arXiv 2104.02057)
the position embedding is a fixed two-dimensional sine-cosine embedding, which has no weights and
fits images of any size, and the features are the class token after the last normalization.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

EPSILON = 1e-6

# As in MoCo v3: Xavier's uniform distribution, applied to queries, keys and values as separate
# matrices (variance 1 / width).
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
        # The softmax is in float32, to which bfloat16 is promoted implicitly.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.output(y.reshape(batch, tokens, width))


class TransformerBlock(nnx.Module):
    """Self-attention and a perceptron with one hidden layer, each with a residual connection."""

    def __init__(self, width: int, num_heads: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Builds a block for tokens [batch, tokens, width]."""
        linear = functools.partial(nnx.Linear, dtype=dtype, kernel_init=_KERNEL_INIT, rngs=rngs)
        self.norm1 = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.attention = _Attention(width, num_heads, dtype, rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.mlp_in = linear(width, 4 * width)
        self.mlp_out = linear(4 * width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to tokens [batch, tokens, width]."""
        x = x + self.attention(_normalize(self.norm1, x))
        hidden = nnx.gelu(self.mlp_in(_normalize(self.norm2, x)), approximate=False)
        return x + self.mlp_out(hidden)


class VisionTransformer(nnx.Module):
    """A vision transformer, whose features are the class token.

    Attributes:
      num_features: Size of the features, the width.
      patch_size: Side of a patch in pixels; the sides of images must be multiples of it.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        image_size: int | None = None,
        channels: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        remat: bool = False,
    ):
        """Builds the network.

        Args:
          width: Size of a token, a multiple of 4 and of `num_heads`.
          depth: Number of blocks.
          num_heads: Number of attention heads.
          patch_size: Side of a patch in pixels.
          image_size: Side of the square images whose patches are at integer positions; images of
            another size get the positions of the same regions in these. By default the positions
            are integers for images of every size.
          channels: Number of image channels.
          dtype: Dtype of the computation; parameters, softmax and normalization are float32.
          rngs: Random number generator of the initial weights.
          remat: Whether the gradient recomputes the activations of each block.
        """
        self.dtype = dtype
        self.remat = remat
        self.patch_size = patch_size
        self.image_size = image_size
        self.num_features = width
        self.patches = nnx.Linear(
            channels * patch_size**2, width, dtype=dtype, kernel_init=_KERNEL_INIT, rngs=rngs
        )
        self.class_token = nnx.Param(1e-6 * jax.random.normal(rngs.params(), (width,)))
        self.blocks = nnx.List(
            [TransformerBlock(width, num_heads, dtype, rngs) for _ in range(depth)]
        )
        self.norm = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool, num_views: int = 1) -> jax.Array:
        """Maps images [batch * num_views, height, width, channels] to float32 features."""
        del train, num_views  # samples are independent
        batch, height, width, _ = images.shape
        size = self.patch_size
        rows, columns = height // size, width // size
        x = images.astype(self.dtype).reshape(batch, rows, size, columns, size, -1).swapaxes(2, 3)
        x = self.patches(x.reshape(batch, rows * columns, -1))  # [batch, patches, width]
        grid = self.image_size and self.image_size // size
        positions = sincos_positions(rows, columns, self.num_features, grid=grid)
        x = x + jnp.asarray(positions, self.dtype)[None]
        token = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (batch, 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1)  # [batch, 1 + patches, width]
        apply = TransformerBlock.__call__
        for block in self.blocks:
            x = (nnx.remat(apply) if self.remat else apply)(block, x)
        return self.norm(x[:, 0].astype(jnp.float32))


def _normalize(norm: nnx.LayerNorm, x: jax.Array) -> jax.Array:
    """Normalizes in float32 and returns the dtype of the input."""
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def sincos_positions(rows: int, columns: int, width: int, *, grid: int | None = None) -> np.ndarray:
    """Returns the fixed position embedding of MoCo v3.

    A smaller image, such as a local view, covers the same square as an image of `grid` x `grid`
    patches. Its patch gets the code of the point in this grid on which its center lies, between
    those of the patches around it: the same region of a view has the same code at every size. DINO
    interpolates a learned embedding to the same effect.

    Args:
      rows: Number of rows of the grid.
      columns: Number of columns of the grid.
      width: Size of the embedding, a multiple of 4.
      grid: Number of rows and columns whose positions are integers; by default those given.

    Returns:
      An array [rows * columns, width] in row-major order. The quarters of an embedding are the
      sines and cosines of the row, then of the column, at wavelengths from 2 pi to 10,000 * 2 pi.
    """
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))  # [width / 4]
    places = [(np.arange(n) + 0.5) * ((grid or n) / n) - 0.5 for n in (rows, columns)]
    y, x = np.meshgrid(*places, indexing="ij")
    # Each [rows * columns, width / 4]
    angles = [np.outer(position, frequencies) for position in (y, x)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)
