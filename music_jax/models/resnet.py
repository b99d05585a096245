"""Residual networks: ResNet-18/34/50 (He et al, arXiv 1512.03385) and others of their structure.

Padding and strides are torchvision's (the 3 x 3 convolution of a bottleneck has the stride), so
that weights can be exchanged.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from music_jax.models.layers import BatchNorm, apply_block

# Stems by name: size and stride of the convolution, and whether max-pooling follows.
STEMS = {"imagenet": (7, 2, True), "cifar": (3, 1, False), "strided": (3, 2, False)}

_KERNEL_INIT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(
    c_in: int, c_out: int, size: int, stride: int, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.Conv:
    return nnx.Conv(
        c_in,
        c_out,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=_KERNEL_INIT,
        rngs=rngs,
    )


class _Shortcut(nnx.Module):
    """The identity, or a projection if the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.changes = stride != 1 or c_in != c_out
        if self.changes:
            self.conv = _conv(c_in, c_out, 1, stride, dtype, rngs)
            self.norm = BatchNorm(c_out)

    def __call__(self, x: jax.Array, *, train: bool, num_views: int) -> jax.Array:
        if not self.changes:
            return x
        return self.norm(self.conv(x), train=train, num_views=num_views)


class BasicBlock(nnx.Module):
    """A residual block of two 3 x 3 convolutions."""

    expansion = 1

    def __init__(
        self, c_in: int, width: int, stride: int, zero_init: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """Builds a block from `c_in` to `width` channels."""
        self.conv1 = _conv(c_in, width, 3, stride, dtype, rngs)
        self.norm1 = BatchNorm(width)
        self.conv2 = _conv(width, width, 3, 1, dtype, rngs)
        self.norm2 = BatchNorm(width, zero_scale=zero_init)
        self.shortcut = _Shortcut(c_in, width, stride, dtype, rngs)

    def __call__(self, x: jax.Array, *, train: bool, num_views: int) -> jax.Array:
        """Applies the block to a feature map [batch * num_views, height, width, c_in]."""
        y = nnx.relu(self.norm1(self.conv1(x), train=train, num_views=num_views))
        y = self.norm2(self.conv2(y), train=train, num_views=num_views)
        return nnx.relu(y + self.shortcut(x, train=train, num_views=num_views))


class Bottleneck(nnx.Module):
    """A residual block of 1 x 1, 3 x 3 and 1 x 1 convolutions."""

    expansion = 4

    def __init__(
        self, c_in: int, width: int, stride: int, zero_init: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """Builds a block from `c_in` to `4 * width` channels."""
        c_out = self.expansion * width
        self.conv1 = _conv(c_in, width, 1, 1, dtype, rngs)
        self.norm1 = BatchNorm(width)
        self.conv2 = _conv(width, width, 3, stride, dtype, rngs)
        self.norm2 = BatchNorm(width)
        self.conv3 = _conv(width, c_out, 1, 1, dtype, rngs)
        self.norm3 = BatchNorm(c_out, zero_scale=zero_init)
        self.shortcut = _Shortcut(c_in, c_out, stride, dtype, rngs)

    def __call__(self, x: jax.Array, *, train: bool, num_views: int) -> jax.Array:
        """Applies the block to a feature map [batch * num_views, height, width, c_in]."""
        y = nnx.relu(self.norm1(self.conv1(x), train=train, num_views=num_views))
        y = nnx.relu(self.norm2(self.conv2(y), train=train, num_views=num_views))
        y = self.norm3(self.conv3(y), train=train, num_views=num_views)
        return nnx.relu(y + self.shortcut(x, train=train, num_views=num_views))


class ResNet(nnx.Module):
    """A residual network, whose features are the average of the last feature map.

    Attributes:
      num_features: Size of the features.
    """

    def __init__(
        self,
        *,
        block: type[BasicBlock] | type[Bottleneck],
        stage_sizes: Sequence[int],
        widths: Sequence[int],
        channels: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        stem: str = "imagenet",
        zero_init_residual: bool = True,
        remat: bool = False,
        stem_width: int | None = None,
        first_stride: int = 1,
        pool_grid: int = 1,
    ):
        """Builds the network.

        Args:
          block: Class of the residual blocks.
          stage_sizes: Number of blocks in each stage; every stage but the first halves the
            resolution.
          widths: Width of each stage.
          channels: Number of image channels.
          dtype: Dtype of the convolutions; parameters and statistics are float32.
          rngs: Random number generator of the initial weights.
          stem: `imagenet` (7 x 7 with stride 2, then 3 x 3 max-pooling with stride 2), `cifar`
            (3 x 3 with stride 1, no pooling) or `strided` (3 x 3 with stride 2, no pooling).
          zero_init_residual: Whether the last scale of each block is initialized to 0, so that the
            block initially equals its shortcut.
          remat: Whether the gradient recomputes the activations of each block.
          stem_width: Number of channels after the stem; by default the width of the first stage.
          first_stride: Stride of the first stage.
          pool_grid: Number of rows and columns of the grid over whose cells the last feature map
            is averaged. 1 is the global average; a larger grid keeps spatial information, with
            `pool_grid**2` times the features.
        """
        self.dtype = dtype
        self.remat = remat
        c_in = stem_width or widths[0]
        size, stride, self.pools = STEMS[stem]
        self.conv = _conv(channels, c_in, size, stride, dtype, rngs)
        self.norm = BatchNorm(c_in)
        blocks = []
        for stage, (size, width) in enumerate(zip(stage_sizes, widths, strict=True)):
            for i in range(size):
                stride = 1 if i > 0 else first_stride if stage == 0 else 2
                blocks.append(block(c_in, width, stride, zero_init_residual, dtype, rngs))
                c_in = width * block.expansion
        self.blocks = nnx.List(blocks)
        self.pool_grid = pool_grid
        self.num_features = c_in * pool_grid**2

    def __call__(self, images: jax.Array, *, train: bool, num_views: int = 1) -> jax.Array:
        """Maps images [batch * num_views, height, width, channels] to float32 features."""
        x = self.conv(images.astype(self.dtype))
        max_pool = _max_pool if self.pools else None
        x = nnx.relu(self.norm(x, train=train, num_views=num_views, max_pool=max_pool))
        for block in self.blocks:
            x = apply_block(block, x, remat=self.remat, train=train, num_views=num_views)
        return _grid_mean(x.astype(jnp.float32), self.pool_grid)


def _max_pool(x: jax.Array) -> jax.Array:
    """Max-pools 3 x 3 with stride 2; commutes with ReLU, which is increasing."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def _grid_mean(x: jax.Array, grid: int) -> jax.Array:
    """Averages [batch, height, width, channels] over grid cells: [batch, grid² * channels]."""
    batch, height, width, channels = x.shape
    if height % grid == 0 and width % grid == 0:
        cells = x.reshape(batch, grid, height // grid, grid, width // grid, channels)
        return jnp.mean(cells, axis=(2, 4)).reshape(batch, -1)
    means = [
        jnp.mean(x[:, top:bottom, left:right], axis=(1, 2))
        for top, bottom in pooling_cells(height, grid)
        for left, right in pooling_cells(width, grid)
    ]
    return jnp.concatenate(means, axis=1)


def pooling_cells(length: int, count: int) -> list[tuple[int, int]]:
    """Returns start and end of `count` equal parts, which overlap if `length` is no multiple."""
    return [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
