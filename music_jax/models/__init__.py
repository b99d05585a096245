"""Backbones, by name."""

from collections.abc import Callable
from functools import partial

from music_jax.models.resnet import Backbone, BasicBlock, Bottleneck, ResNet

_IMAGENET_WIDTHS = (64, 128, 256, 512)

# Each takes the keyword arguments stem, zero_init_residual, channels, dtype and rngs.
BACKBONES: dict[str, Callable[..., Backbone]] = {
    # For 8-32 px on a CPU: with the `strided` stem only the first convolution sees over 16 px.
    "small_resnet": partial(
        ResNet,
        block=BasicBlock,
        stage_sizes=(1, 1),
        widths=(64, 128),
        stem_width=32,
        first_stride=2,
        pool_grid=4,
    ),
    "resnet18": partial(
        ResNet, block=BasicBlock, stage_sizes=(2, 2, 2, 2), widths=_IMAGENET_WIDTHS
    ),
    "resnet34": partial(
        ResNet, block=BasicBlock, stage_sizes=(3, 4, 6, 3), widths=_IMAGENET_WIDTHS
    ),
    "resnet50": partial(
        ResNet, block=Bottleneck, stage_sizes=(3, 4, 6, 3), widths=_IMAGENET_WIDTHS
    ),
}
