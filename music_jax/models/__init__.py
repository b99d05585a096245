"""Backbones, by name."""

import dataclasses
from functools import partial
from typing import Any

from music_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from music_jax.models.vision_transformer import VisionTransformer


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """What a config can ask of a backbone.

    Attributes:
      make: its class with its sizes; takes the keyword arguments channels, dtype, rngs, remat and
        those of `fields`.
      fields: the fields of `config.backbone` that are its own; for others it has no use.
      image_multiple: the side of an image is a multiple of this.
    """

    make: partial[Any]
    fields: tuple[str, ...] = ()
    image_multiple: int = 1


def _resnet(**arguments: Any) -> BackboneSpec:
    return BackboneSpec(partial(ResNet, **arguments), fields=("stem", "zero_init_residual"))


def _vit(**arguments: Any) -> BackboneSpec:
    return BackboneSpec(
        partial(VisionTransformer, patch_size=16, **arguments),
        fields=("num_heads",),
        image_multiple=16,
    )


_IMAGENET_WIDTHS = (64, 128, 256, 512)

BACKBONES: dict[str, BackboneSpec] = {
    # For 8-32 px on a CPU: with the `strided` stem only the first convolution sees over 16 px.
    "small_resnet": _resnet(
        block=BasicBlock,
        stage_sizes=(1, 1),
        widths=(32, 64),
        stem_width=24,
        first_stride=2,
        pool_grid=4,
    ),
    # A quarter of it, for sweeps of many small runs.
    "tiny_resnet": _resnet(
        block=BasicBlock,
        stage_sizes=(1, 1),
        widths=(24, 48),
        stem_width=16,
        first_stride=2,
        pool_grid=4,
    ),
    "resnet18": _resnet(block=BasicBlock, stage_sizes=(2, 2, 2, 2), widths=_IMAGENET_WIDTHS),
    "resnet34": _resnet(block=BasicBlock, stage_sizes=(3, 4, 6, 3), widths=_IMAGENET_WIDTHS),
    "resnet50": _resnet(block=Bottleneck, stage_sizes=(3, 4, 6, 3), widths=_IMAGENET_WIDTHS),
    "vit_s16": _vit(width=384, depth=12, num_heads=6),
    "vit_b16": _vit(width=768, depth=12, num_heads=12),
}
