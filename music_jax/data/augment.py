"""Augments batches of views on the device, inside the jitted training step.

Crops are made on the host, where the images are decoded. The augmentation of a sample depends only
on the key, the sample's global index and the number of the view, so that it is the same in any
batch, on any number of devices, and after a resume.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import config_dict

from music_jax.data import transforms
from music_jax.data.arrays import PIXEL_TYPES


@dataclasses.dataclass(frozen=True)
class ViewAugmentation:
    """Augmentation of one view; by default none.

    Strengths are those of torchvision's `RandomAffine`, `ColorJitter`, `GaussianBlur` and
    `GaussianNoise`. The operations are applied in the order of the attributes here. The ranges of
    the values are checked in the config.

    Values of uint8 images are in [0, 1], and are clipped to it after each operation. Those of other
    images are standardized with the mean and the standard deviation of their channel, and are not
    clipped; jitter, grayscale and solarize see them divided by the largest value of uint16, and as
    they are for float32. These three need one or three channels, and leave other images unchanged.

    The attributes are the fields of `config.augmentation.view_1`, which `--helpfields` describes.
    Translations are not rounded to whole pixels, and a color jitter changes brightness, contrast,
    saturation and hue in this order (torchvision's is random; see `transforms.color_jitter`).
    """

    flip_probability: float = 0.0
    jitter_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0
    affine_probability: float = 0.0
    rotation_degrees: float = 0.0
    translation: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear_degrees: float = 0.0
    noise_probability: float = 0.0
    noise_std: float = 0.0

    @property
    def warps(self) -> bool:
        """Whether the affine warp can change anything."""
        strengths = (self.rotation_degrees, self.translation, self.shear_degrees)
        return self.affine_probability > 0 and (any(strengths) or self.scale != (1.0, 1.0))


def view_augmentations(config: config_dict.ConfigDict) -> tuple[ViewAugmentation, ...]:
    """Returns the augmentation of each of the two views of a config."""
    return tuple(
        ViewAugmentation(**config.augmentation[view].to_dict()) for view in ("view_1", "view_2")
    )


def local_augmentations(config: config_dict.ConfigDict) -> tuple[ViewAugmentation, ...]:
    """Returns the augmentation of each local view of a config."""
    augmentation = ViewAugmentation(**config.augmentation.local.to_dict())
    return (augmentation,) * config.local_views.count


# The uniform numbers drawn for each sample and view. Append new ones: the others must not change.
_Draw = enum.IntEnum(
    "_Draw",
    "AFFINE ROTATION TRANSLATION_X TRANSLATION_Y SCALE SHEAR FLIP JITTER BRIGHTNESS CONTRAST "
    "SATURATION HUE GRAYSCALE BLUR BLUR_SIGMA SOLARIZE NOISE",
    start=0,
)


class _Randomness:
    """Random numbers of a batch of views, each a function of (key, index, view)."""

    def __init__(
        self,
        key: jax.Array,
        indices: jax.Array,
        views: tuple[ViewAugmentation, ...],
        first_view: int,
    ):
        self.views = views
        numbers = jnp.arange(first_view, first_view + len(views), dtype=jnp.uint32)
        fold_each = jax.vmap(jax.random.fold_in, (None, 0))
        sample_keys = fold_each(key, indices.astype(jnp.uint32))  # [batch]
        keys = jax.vmap(fold_each, (0, None))(sample_keys, numbers)  # [batch, views]
        split = jax.vmap(jax.vmap(jax.random.split))(keys)  # [batch, views, 2]
        draw = jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, (len(_Draw),))))
        self._uniform = draw(split[..., 0])  # [batch, views, draws], in [0, 1)
        self._noise_keys = split[..., 1]

    def option(self, name: str) -> jax.Array:
        """Returns a field of every view, float32 [1, views], or [1, views, 2] for a range."""
        return jnp.asarray([[getattr(view, name) for view in self.views]], jnp.float32)

    def ends(self, name: str) -> tuple[jax.Array, jax.Array]:
        """Returns the ends of a range field of every view, each [1, views]."""
        return self.option(name)[..., 0], self.option(name)[..., 1]

    def flag(self, draw: _Draw) -> jax.Array:
        """Returns bool [batch, views], True with the probability that each view sets."""
        return self._uniform[..., draw] < self.option(f"{draw.name.lower()}_probability")

    def symmetric(self, draw: _Draw, largest: jax.Array) -> jax.Array:
        """Returns uniform numbers [batch, views] in [-largest, largest)."""
        return (2.0 * self._uniform[..., draw] - 1.0) * largest

    def between(self, draw: _Draw, low: jax.Array, high: jax.Array) -> jax.Array:
        """Returns uniform numbers [batch, views] in [low, high)."""
        return low + (high - low) * self._uniform[..., draw]

    def normal(self, shape: tuple[int, ...]) -> jax.Array:
        """Returns standard normal numbers [batch, views, *shape]."""
        draw = jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (math.prod(shape),))))
        numbers = draw(self._noise_keys)  # [batch, views, size]; flat counters are cheaper to make
        return numbers.reshape(*numbers.shape[:2], *shape)  # [batch, views, *shape]


def augment_views(
    images: jax.Array,
    sample_indices: jax.Array,
    key: jax.Array,
    *,
    views: tuple[ViewAugmentation, ...],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
    first_view: int = 0,
) -> jax.Array:
    """Augments and normalizes a batch of views.

    The order is affine, flip, jitter, grayscale, blur, solarize, noise. An operation that no view
    has is not compiled. An operation that a view does not have, or that is not drawn for it, leaves
    that view exactly as it was, in every dtype. Everything is per sample, so a batch that is
    sharded along its first axis needs no communication.

    Args:
        images: uint8, uint16 or float32 [batch, views, height, width, channels].
        sample_indices: Integers [batch], the global index of each sample, which continues to
            increase from epoch to epoch. Indices are taken modulo 2**32: 3,300 epochs of ImageNet.
        key: Typed key (`jax.random.key(seed)`), the same for the whole run.
        views: Augmentation of each view.
        mean: Mean of each channel: of uint8 values divided by 255, of other values as they are.
        std: Standard deviation of each channel, likewise.
        dtype: Type of the result, and of the blur's products.
        first_view: Number of the first view. Views of a sample with other numbers are augmented
            independently.

    Returns:
        [batch, views, height, width, channels], `(x - mean) / std`.

    Raises:
        ValueError: Shapes, dtypes or lengths do not match.
    """
    _check_arguments(images, sample_indices, key, views)
    random = _Randomness(key, sample_indices, views, first_view)
    is_uint8, channels = images.dtype == jnp.uint8, images.shape[-1]
    has_color = channels in (1, 3)
    limit = functools.partial(transforms.limit, clip=is_uint8)

    planes = transforms.split_planes(images)
    if not is_uint8:
        planes = _standardize(planes, mean, std, jnp.float32)
    if any(view.warps for view in views):
        planes = _warp_views(planes, _draw_affine(random, *images.shape[2:4]))
    if any(view.flip_probability for view in views):
        planes = transforms.flip_left_right(planes, random.flag(_Draw.FLIP))
    if is_uint8:
        planes = _to_unit(planes)
    change_colors = functools.partial(_change_colors, dtype=images.dtype, mean=mean, std=std)
    if has_color and any(view.jitter_probability for view in views):
        drawn = _draw_jitter(random)
        planes = change_colors(
            planes, lambda planes: transforms.color_jitter(planes, clip=is_uint8, **drawn)
        )
    if channels == 3 and any(view.grayscale_probability for view in views):
        apply = random.flag(_Draw.GRAYSCALE)
        planes = change_colors(planes, functools.partial(transforms.grayscale, apply=apply))
    if any(view.blur_probability for view in views):
        sigma = random.between(_Draw.BLUR_SIGMA, *random.ends("blur_sigma"))
        blurred = transforms.gaussian_blur(transforms.join_planes(planes).astype(dtype), sigma)
        apply = transforms.per_pixel(random.flag(_Draw.BLUR))
        planes = tuple(
            jnp.where(apply, limit(new.astype(jnp.float32)), old)
            for new, old in zip(transforms.split_planes(blurred), planes, strict=True)
        )
    if has_color and any(view.solarize_probability for view in views):
        apply = random.flag(_Draw.SOLARIZE)
        planes = change_colors(planes, functools.partial(transforms.solarize, apply=apply))
    if any(view.noise_probability and view.noise_std for view in views):
        std_here = jnp.where(random.flag(_Draw.NOISE), random.option("noise_std"), 0.0)
        noise = transforms.split_planes(random.normal(images.shape[2:]))
        planes = tuple(
            limit(plane + transforms.per_pixel(std_here) * extra)
            for plane, extra in zip(planes, noise, strict=True)
        )
    if is_uint8:
        planes = _standardize(planes, mean, std, dtype)
    return transforms.join_planes(tuple(plane.astype(dtype) for plane in planes))


def normalize_images(
    images: jax.Array,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Normalizes images without augmenting them, for evaluation.

    Args:
        images: uint8, uint16 or float32 [..., height, width, channels].
        mean: Mean of each channel: of uint8 values divided by 255, of other values as they are.
        std: Standard deviation of each channel, likewise.
        dtype: Type of the result.

    Returns:
        [..., height, width, channels], `(x / 255 - mean) / std` or `(x - mean) / std`.

    Raises:
        ValueError: The images have another type, or mean or std do not match the channels.
    """
    _check_type(images)
    planes = transforms.split_planes(images)
    if images.dtype == jnp.uint8:
        planes = _to_unit(planes)
    return transforms.join_planes(_standardize(planes, mean, std, dtype))


def _draw_affine(random: _Randomness, height: int, width: int) -> jax.Array:
    """Draws matrices [batch, views, 2, 3], the identity where no warp is drawn."""
    apply = random.flag(_Draw.AFFINE)

    def draw(number: _Draw, option: str, unit: float) -> jax.Array:
        return jnp.where(apply, random.symmetric(number, random.option(option) * unit), 0.0)

    return transforms.affine_matrices(
        rotation=draw(_Draw.ROTATION, "rotation_degrees", math.pi / 180),
        translation_x=draw(_Draw.TRANSLATION_X, "translation", width),
        translation_y=draw(_Draw.TRANSLATION_Y, "translation", height),
        scale=jnp.where(apply, random.between(_Draw.SCALE, *random.ends("scale")), 1.0),
        shear=draw(_Draw.SHEAR, "shear_degrees", math.pi / 180),
    )


def _warp_views(planes: transforms.Planes, matrices: jax.Array) -> transforms.Planes:
    """Warps one view after the other.

    The loop writes its result to memory. Otherwise XLA on CPU fuses the sampling into the color
    jitter and repeats it for every use of a pixel (41 ms instead of 2.6 ms).
    """
    swap = functools.partial(jnp.swapaxes, axis1=0, axis2=1)  # [batch, views] <-> [views, batch]
    views_first = jax.tree.map(swap, (planes, matrices))
    warped = jax.lax.map(lambda view: transforms.warp_affine(*view), views_first)
    return jax.tree.map(swap, warped)


def _draw_jitter(random: _Randomness) -> dict[str, jax.Array]:
    """Draws factors and shifts, 1 and 0 where no jitter is drawn, for what any view changes."""
    apply = random.flag(_Draw.JITTER)
    drawn: dict[str, jax.Array] = {}
    for name in ("brightness", "contrast", "saturation", "hue"):
        number, strength = _Draw[name.upper()], random.option(name)
        if not any(getattr(view, name) for view in random.views):
            continue
        if name == "hue":
            drawn[name] = jnp.where(apply, random.symmetric(number, strength), 0.0)
        else:
            factor = random.between(number, jnp.maximum(0.0, 1.0 - strength), 1.0 + strength)
            drawn[name] = jnp.where(apply, factor, 1.0)
    return drawn


def _change_colors(
    planes: transforms.Planes,
    operation: Callable[[transforms.Planes], transforms.Planes],
    *,
    dtype: DTypeLike,
    mean: Sequence[float],
    std: Sequence[float],
) -> transforms.Planes:
    """Applies an operation to the values of colors, whose largest is 1 for types of integers.

    Args:
        planes: Planes, in [0, 1] for uint8 images, standardized for other types.
        operation: Operation; a value that it leaves unchanged stays exactly as it was.
        dtype: Type of the images.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """
    if dtype == jnp.uint8:
        return operation(planes)
    largest = 65535.0 if dtype == jnp.uint16 else 1.0
    scales = [(m / largest, s / largest) for m, s in zip(mean, std, strict=True)]
    before = tuple(plane * s + m for plane, (m, s) in zip(planes, scales, strict=True))
    after = operation(before)
    return tuple(
        jnp.where(new == old, plane, (new - m) / s)
        for plane, old, new, (m, s) in zip(planes, before, after, scales, strict=True)
    )


def _to_unit(planes: transforms.Planes) -> transforms.Planes:
    """Converts values of 0 to 255, uint8 or float32, to float32 in [0, 1]."""
    return tuple(plane.astype(jnp.float32) / 255.0 for plane in planes)


def _standardize(
    planes: transforms.Planes, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike
) -> transforms.Planes:
    """Returns `(planes - mean) / std`, computed in float32 and rounded to dtype once."""
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != len(planes):
            raise ValueError(
                f"expected {name} to hold one number for each of {len(planes)} channels, "
                f"got {tuple(numbers)}"
            )
    triples = zip(planes, mean, std, strict=True)
    return tuple(((plane.astype(jnp.float32) - m) / s).astype(dtype) for plane, m, s in triples)


def _check_type(images: jax.Array) -> None:
    if images.dtype not in PIXEL_TYPES:
        raise ValueError(f"expected uint8, uint16 or float32 images, got {images.dtype}")


def _check_arguments(
    images: jax.Array,
    sample_indices: jax.Array,
    key: jax.Array,
    views: tuple[ViewAugmentation, ...],
) -> None:
    _check_type(images)
    if images.ndim != 5:
        layout = "[batch, views, height, width, channels]"
        raise ValueError(f"expected images of shape {layout}, got {images.shape}")
    batch, num_views = images.shape[:2]
    if len(views) != num_views:
        raise ValueError(f"expected augmentations of each of {num_views} views, got {len(views)}")
    is_integer = jnp.issubdtype(sample_indices.dtype, jnp.integer)
    if not is_integer or sample_indices.shape != (batch,):
        got = f"{sample_indices.dtype} of shape {sample_indices.shape}"
        raise ValueError(f"expected integer sample_indices of shape {(batch,)}, got {got}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape != ():
        got = f"{key.dtype} of shape {key.shape}"
        raise ValueError(f"expected one typed key, as jax.random.key(seed) gives, got {got}")
