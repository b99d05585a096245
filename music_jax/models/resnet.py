"""Residual networks: ResNet-18/34/50 (He et al, arXiv 1512.03385) and others of their structure.

Padding and strides are torchvision's (the 3 x 3 convolution of a bottleneck has the stride), so
that weights can be exchanged.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Stems by name: size and stride of the convolution, and whether max-pooling follows.
STEMS = {"imagenet": (7, 2, True), "cifar": (3, 1, False), "strided": (3, 2, False)}

BATCH_NORM_EPSILON = 1e-5

_KERNEL_INIT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class BatchNorm(nnx.Module):
    """Batch normalization over all but the channel axis, by the statistics of each view.

    The batch holds the views of each sample side by side: row `n * num_views + v` is view `v` of
    sample `n`. One pass of the network thus serves all views, and a batch sharded over a mesh keeps
    its sharding. Under `jax.jit` the statistics are those of the global batch. They are computed in
    float32, and the running statistics are updated once per view, in the order of the views.

    Attributes:
      scale: Scale [channels], float32.
      bias: Bias [channels], float32.
      mean: Running mean [channels], float32.
      var: Running variance [channels], biased as in Flax, float32.
    """

    def __init__(self, channels: int, *, momentum: float = 0.9, zero_scale: bool = False):
        """Initializes the parameters and running statistics.

        Args:
          channels: Size of the last axis.
          momentum: Decay of the running statistics.
          zero_scale: Whether the scale starts at 0 instead of 1.
        """
        self.momentum = momentum
        self.scale = nnx.Param(jnp.zeros(channels) if zero_scale else jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool,
        num_views: int,
        max_pool: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Normalizes the input, and optionally pools the result.

        Args:
          x: Input [batch * num_views, ..., channels].
          train: Whether to use and track the statistics of the batch instead of the running ones.
          num_views: Number of views per sample.
          max_pool: Max-pooling to apply to the result.

        Returns:
          An array of the type and shape of `x`, or of the shape that `max_pool` returns.
        """
        scale = self.scale[...]
        sign = jnp.ones_like(scale)
        # A maximum commutes with an increasing function. Pooling the input instead of the result
        # avoids a normalized array at full resolution: compiled for TPU v5e, ResNet-50's step
        # accesses 3 % fewer bytes by XLA's count. A channel with a negative scale is negated first.
        if max_pool is not None:
            sign = jnp.where(scale < 0, -1.0, 1.0)
            x = x * sign.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)
        num_views = num_views if train else 1
        views = x.reshape(-1, num_views, *x.shape[1:])  # [batch, views, ..., channels]
        wide = views.astype(jnp.float32)
        if train:
            axes = (0, *range(2, wide.ndim - 1))
            mean = jnp.mean(wide, axis=axes)  # [views, channels]
            var = jnp.maximum(jnp.mean(jnp.square(wide), axis=axes) - jnp.square(mean), 0.0)
            decay, running_mean, running_var = self.momentum, self.mean[...], self.var[...]
            for v in range(num_views):
                running_mean = decay * running_mean + (1 - decay) * mean[v] * sign
                running_var = decay * running_var + (1 - decay) * var[v]
            self.mean.set_value(running_mean)
            self.var.set_value(running_var)
        else:
            mean, var = (self.mean[...] * sign)[None], self.var[...][None]
        factor = (scale * sign)[None] * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)  # [views, channels]
        offset = self.bias[...][None] - mean * factor
        if max_pool is not None:
            x = max_pool(x)
            wide = x.reshape(-1, num_views, *x.shape[1:]).astype(jnp.float32)
        shape = (1, num_views) + (1,) * (wide.ndim - 3) + scale.shape
        normalized = wide * factor.reshape(shape) + offset.reshape(shape)
        return normalized.astype(x.dtype).reshape(x.shape)


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


def _convolve(conv: nnx.Conv, x: jax.Array) -> jax.Array:
    """Applies a convolution, as a matrix product if its kernel is larger than its result.

    XLA exchanges the kernel of such a convolution, or of its gradient, and the image. On a CPU the
    program then takes five times as long.
    """
    size, stride = conv.kernel_size[0], conv.strides
    assert isinstance(stride, int)  # as in all of this module
    rows, columns = (-(-n // stride) for n in x.shape[1:3])  # with padding on both sides
    if size == 1 or size**2 <= rows * columns:
        return conv(x)
    x = jnp.pad(x.astype(conv.dtype), ((0, 0), *[(size // 2,) * 2] * 2, (0, 0)))
    shifted = [
        x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
        for i, j in itertools.product(range(size), repeat=2)
    ]
    kernel = conv.kernel[...].astype(conv.dtype)
    patches = jnp.concatenate(shifted, axis=-1)  # [batch, rows, columns, size² * channels]
    return patches @ kernel.reshape(-1, kernel.shape[-1])


class _Shortcut(nnx.Module):
    """A projection to another shape."""

    def __init__(self, c_in: int, c_out: int, stride: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = _conv(c_in, c_out, 1, stride, dtype, rngs)
        self.norm = BatchNorm(c_out)

    def __call__(self, x: jax.Array, *, train: bool, num_views: int) -> jax.Array:
        return self.norm(self.conv(x), train=train, num_views=num_views)


class BasicBlock(nnx.Module):
    """A residual block of two 3 x 3 convolutions."""

    kernels: tuple[int, ...] = (3, 3)
    expansion = 1

    def __init__(
        self, c_in: int, width: int, stride: int, zero_init: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """Builds a block from `c_in` to `expansion * width` channels."""
        c_out, last = self.expansion * width, len(self.kernels) - 1
        sizes = itertools.pairwise([c_in, *[width] * last, c_out])
        for i, (before, after) in enumerate(sizes):
            conv = _conv(before, after, self.kernels[i], self.strides(stride)[i], dtype, rngs)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"norm{i + 1}", BatchNorm(after, zero_scale=zero_init and i == last))
        projects = stride != 1 or c_in != c_out
        self.shortcut = _Shortcut(c_in, c_out, stride, dtype, rngs) if projects else None

    @classmethod
    def strides(cls, stride: int) -> list[int]:
        """Returns the stride of each convolution; the first 3 x 3 one has that of the block."""
        return [stride if i == cls.kernels.index(3) else 1 for i in range(len(cls.kernels))]

    def __call__(self, x: jax.Array, *, train: bool, num_views: int) -> jax.Array:
        """Applies the block to a feature map [batch * num_views, height, width, c_in]."""
        y = x
        for i in range(1, len(self.kernels) + 1):
            y = nnx.relu(y) if i > 1 else y
            y = _convolve(getattr(self, f"conv{i}"), y)
            y = getattr(self, f"norm{i}")(y, train=train, num_views=num_views)
        if self.shortcut is not None:
            x = self.shortcut(x, train=train, num_views=num_views)
        return nnx.relu(y + x)


class Bottleneck(BasicBlock):
    """A residual block of 1 x 1, 3 x 3 and 1 x 1 convolutions."""

    kernels = (1, 3, 1)
    expansion = 4


class ResNet(nnx.Module):
    """A residual network, whose features are the average of the last feature map.

    Attributes:
      num_features: Size of the features.
    """

    def __init__(
        self,
        *,
        block: type[BasicBlock],
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

        def apply(block: BasicBlock, x: jax.Array) -> jax.Array:
            return block(x, train=train, num_views=num_views)

        for block in self.blocks:
            x = (nnx.remat(apply) if self.remat else apply)(block, x)
        return _grid_mean(x.astype(jnp.float32), self.pool_grid)


def _pool(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


@jax.custom_vjp
def _max_pool(x: jax.Array) -> jax.Array:
    """Max-pools 3 x 3 with stride 2; commutes with ReLU, which is increasing.

    The gradient of a window goes to its first maximum. XLA scatters it: on GPUs by atomic additions
    in any order or, if they have to be deterministic, after a sort, with four times the memory
    traffic. On GPUs it is computed by comparisons instead, always in the same order. Forward-mode
    differentiation raises TypeError.
    """
    return _pool(x)


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _pool(x)
    return y, (x, y)


def _max_pool_backward(
    residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array]:
    gpu = max_pool_gradient
    arguments = *residuals, cotangent
    return (jax.lax.platform_dependent(*arguments, cuda=gpu, rocm=gpu, default=_scattered),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _scattered(x: jax.Array, y: jax.Array, cotangent: jax.Array) -> jax.Array:
    del y
    return jax.vjp(_pool, x)[1](cotangent)[0]


def max_pool_gradient(x: jax.Array, y: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Returns the gradient of 3 x 3 max-pooling with stride 2 and a padding of 1.

    Args:
      x: Input [batch, height, width, channels].
      y: The pooled input, [batch, rows, columns, channels].
      cotangent: Gradient with respect to `y`, of its shape.

    Returns:
      An array of the type and shape of `x`, summed in at least float32.
    """
    (height, width), (rows, columns) = x.shape[1:3], y.shape[1:3]
    no_padding = (0, 0, 0)
    around = (no_padding, (1, 1, 0), (1, 1, 0), no_padding)
    padded = jax.lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), around)
    taken = jnp.zeros(y.shape, bool)
    wide = cotangent.astype(np.promote_types(x.dtype, np.float32))
    zero = jnp.zeros((), wide.dtype)
    total = jnp.zeros(padded.shape, wide.dtype)
    for i, j in itertools.product(range(3), repeat=2):
        ends = i + 2 * rows - 1, j + 2 * columns - 1
        element = padded[:, i : ends[0] : 2, j : ends[1] : 2]  # of each window
        is_first = (element == y) & ~taken
        taken |= is_first
        part = jnp.where(is_first, wide, zero)
        places = (i, height + 2 - ends[0], 1), (j, width + 2 - ends[1], 1)
        total += jax.lax.pad(part, zero, (no_padding, *places, no_padding))
    return total[:, 1:-1, 1:-1].astype(x.dtype)


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


class Layer(NamedTuple):
    """A layer of a residual network in inference mode, for conversions to other formats.

    Attributes:
      kind: `conv` (convolution and batch normalization), `max_pool`, `add` or `grid_mean`.
      inputs: Numbers of the layers whose outputs it takes, from 1; 0 stands for the images.
      conv: Name of the convolution's parameters, such as `blocks.0.conv1`.
      norm: Name of the batch normalization's parameters.
      stride: Stride of the convolution.
      relu: Whether ReLU follows.
      grid: Number of rows and columns of the grid.
    """

    kind: str
    inputs: tuple[int, ...]
    conv: str = ""
    norm: str = ""
    stride: int = 1
    relu: bool = False
    grid: int = 1


def inference_layers(sizes: dict[str, Any], stem: str) -> list[Layer]:
    """Returns the layers of a `ResNet` in order; the output of the last one are the features.

    Args:
      sizes: Arguments of `ResNet` that distinguish it from others.
      stem: Name of the stem.
    """
    layers: list[Layer] = []

    def add(kind: str, *inputs: int, **options: Any) -> int:
        layers.append(Layer(kind, inputs, **options))
        return len(layers)

    _, stride, pools = STEMS[stem]
    x = add("conv", 0, conv="conv", norm="norm", stride=stride, relu=True)
    if pools:
        x = add("max_pool", x)
    block, widths = sizes["block"], sizes["widths"]
    c_in, number = sizes.get("stem_width") or widths[0], 0
    for stage, (count, width) in enumerate(zip(sizes["stage_sizes"], widths, strict=True)):
        for i in range(count):
            stride = 1 if i > 0 else sizes.get("first_stride", 1) if stage == 0 else 2
            y, name, steps = x, f"blocks.{number}", block.strides(stride)
            for j, step in enumerate(steps, start=1):
                names = {"conv": f"{name}.conv{j}", "norm": f"{name}.norm{j}"}
                y = add("conv", y, **names, stride=step, relu=j < len(steps))
            if stride != 1 or c_in != width * block.expansion:
                names = {"conv": f"{name}.shortcut.conv", "norm": f"{name}.shortcut.norm"}
                x = add("conv", x, **names, stride=stride)
            x = add("add", y, x, relu=True)
            c_in, number = width * block.expansion, number + 1
    add("grid_mean", x, grid=sizes.get("pool_grid", 1))
    return layers
