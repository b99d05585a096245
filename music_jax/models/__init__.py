"""Backbones by name."""

from functools import partial
from typing import Any, Protocol

import jax

from music_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from music_jax.models.vision_transformer import VisionTransformer
from music_jax.registry import BACKBONES, BackboneSpec


class Backbone(Protocol):
    """A module that maps images to features.

    Attributes:
      num_features: Size of the features.
    """

    num_features: int

    def __call__(self, images: jax.Array, *, train: bool, num_views: int) -> jax.Array:
        """Maps images [batch * num_views, height, width, channels] to features.

        Args:
          images: Normalized images; the views of each sample are side by side.
          train: Whether to normalize by the statistics of the batch, and update the running ones.
          num_views: Number of views per sample, each normalized by its own statistics.

        Returns:
          Features [batch * num_views, num_features], float32.
        """


def _resnet(**arguments: Any) -> BackboneSpec:
    return BackboneSpec(
        partial(ResNet, **arguments),
        fields=("remat", "stem", "zero_init_residual"),
        stem=("conv", "norm"),
    )


def _vit(**arguments: Any) -> BackboneSpec:
    make = partial(VisionTransformer, patch_size=16, **arguments)
    return BackboneSpec(
        make,
        fields=("remat", "num_heads"),
        image_multiple=16,
        takes_image_size=True,
        stem=("patches", "class_token"),
    )


# For 8-32 px on a CPU. With the `strided` stem only the first convolution runs at more than 16 px.
_small_resnet = partial(_resnet, block=BasicBlock, stage_sizes=(1, 1), first_stride=2, pool_grid=4)
_IMAGENET_WIDTHS = (64, 128, 256, 512)

BACKBONES |= {
    "small_resnet": _small_resnet(widths=(32, 64), stem_width=24),
    # Narrower, for sweeps of many small runs.
    "tiny_resnet": _small_resnet(widths=(24, 48), stem_width=16),
    # For comparisons: the global average makes the features of random weights poor.
    "pooled_resnet": _resnet(
        block=BasicBlock,
        stage_sizes=(1, 1, 1),
        widths=(24, 48, 96),
        stem_width=16,
        first_stride=2,
    ),
    "resnet18": _resnet(block=BasicBlock, stage_sizes=(2, 2, 2, 2), widths=_IMAGENET_WIDTHS),
    "resnet34": _resnet(block=BasicBlock, stage_sizes=(3, 4, 6, 3), widths=_IMAGENET_WIDTHS),
    "resnet50": _resnet(block=Bottleneck, stage_sizes=(3, 4, 6, 3), widths=_IMAGENET_WIDTHS),
    "vit_s16": _vit(width=384, depth=12, num_heads=6),
    "vit_b16": _vit(width=768, depth=12, num_heads=12),
}
