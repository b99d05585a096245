"""Backbones, by name."""

from functools import partial
from typing import Any

from music_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from music_jax.models.vision_transformer import VisionTransformer
from music_jax.registry import BACKBONES, BackboneSpec


def _resnet(**arguments: Any) -> BackboneSpec:
    return BackboneSpec(partial(ResNet, **arguments), fields=("stem", "zero_init_residual"))


def _vit(**arguments: Any) -> BackboneSpec:
    return BackboneSpec(
        partial(VisionTransformer, patch_size=16, **arguments),
        fields=("num_heads",),
        image_multiple=16,
    )


_IMAGENET_WIDTHS = (64, 128, 256, 512)

BACKBONES |= {
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
