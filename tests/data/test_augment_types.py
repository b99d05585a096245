"""The augmentation of images of other types than uint8, and of other numbers of channels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_jax.data.augment import ViewAugmentation, augment_views, normalize_images

# Means and standard deviations of thirteen bands of Sentinel-2 are about these.
_MEANS, _STDS = np.linspace(200.0, 3000.0, 13), np.linspace(50.0, 900.0, 13)
_NOTHING = ViewAugmentation()
_WARP = ViewAugmentation(
    affine_probability=0.5, rotation_degrees=40.0, translation=0.2, shear_degrees=10.0
)
_COLORS = {
    "jitter": ViewAugmentation(jitter_probability=0.5, brightness=0.2, saturation=0.3, hue=0.1),
    "grayscale": ViewAugmentation(grayscale_probability=0.5),
    "solarize": ViewAugmentation(solarize_probability=0.5),
}
_FLIP = ViewAugmentation(flip_probability=0.5)
_BLUR = ViewAugmentation(blur_probability=0.5, blur_sigma=(1.0, 2.0))
_NOISE = ViewAugmentation(noise_probability=0.5, noise_std=0.3)
_OTHERS = (_WARP, _FLIP, _BLUR, _NOISE)


def _bands(count, views, channels=13, side=20):
    rng = np.random.default_rng(1)
    shape = (count, views, side, side, channels)
    return rng.normal(_MEANS[:channels], _STDS[:channels], shape).astype(np.float32)


def _augmented(images, views, mean=None, std=None, dtype=jnp.float32):
    """Augments with the statistics of the bands, or others."""
    channels, indices = images.shape[-1], np.arange(len(images))
    mean, std = (tuple(_MEANS), tuple(_STDS)) if mean is None else (mean, std)
    options = {"views": views, "mean": mean[:channels], "std": std[:channels], "dtype": dtype}
    program = jax.jit(
        functools.partial(augment_views, **options),
        compiler_options={"xla_backend_optimization_level": 0},  # compiles in less time
    )
    return np.asarray(program(images, indices, jax.random.key(7)), np.float32)


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint16), (13, np.float32)])
def test_values_are_standardized_in_their_own_units(channels, dtype):
    images = np.clip(_bands(3, 1, channels), 0, None).astype(dtype)
    mean, std = tuple(_MEANS[:channels]), tuple(_STDS[:channels])
    expected = (images.astype(np.float64) - mean) / std
    np.testing.assert_allclose(normalize_images(images, mean=mean, std=std), expected, atol=1e-4)
    np.testing.assert_allclose(_augmented(images, (_NOTHING,)), expected, atol=1e-4)


def test_each_of_thirteen_channels_is_changed_as_if_it_were_alone():
    views = (_WARP, _FLIP, _BLUR)
    images = _bands(6, 3)
    together = _augmented(images, views)
    for channel in (0, 12):
        mean, std = (_MEANS[channel],), (_STDS[channel],)
        alone = _augmented(images[..., channel : channel + 1], views, mean, std)
        np.testing.assert_allclose(together[..., channel : channel + 1], alone, atol=1e-4)


def test_a_warp_is_that_of_bytes_but_with_the_mean_around_the_image():
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 20, 20, 1), dtype=np.uint8)
    black = _augmented(images, (_WARP,), (0.5,), (0.25,))
    white = _augmented(np.full_like(images, 255), (_WARP,), (0.5,), (0.25,))
    outside = 1 - (white + 2) / 4  # share of the surroundings in a pixel
    assert 0.05 < outside.mean() < 0.5
    found = _augmented(images.astype(np.uint16), (_WARP,), (127.5,), (63.75,))
    np.testing.assert_allclose(found, black + 2 * outside, atol=1e-4)


def test_noise_is_relative_to_the_deviation_of_each_channel():
    images = _bands(64, 1)
    noise = _augmented(images, (_NOISE,)) - (images - _MEANS) / _STDS
    drawn = np.abs(noise).max(axis=(1, 2, 3, 4)) > 0.1
    assert 20 < drawn.sum() < 44
    assert np.abs(noise[~drawn]).max() < 1e-3
    np.testing.assert_allclose(noise[drawn].std(axis=(0, 1, 2, 3)), 0.3, rtol=0.03)


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint16, 65535), (np.float32, 1)])
def test_colors_change_as_those_of_bytes(dtype, largest):
    views, rng = tuple(_COLORS.values()), np.random.default_rng(0)
    images = rng.integers(100, 156, (8, 3, 20, 20, 3), dtype=np.uint8)  # nothing is clipped
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = _augmented(images, views, mean, std)
    wide = (images / np.float64(255) * largest).astype(dtype)
    scaled = (tuple(x * largest for x in numbers) for numbers in (mean, std))
    np.testing.assert_allclose(_augmented(wide, views, *scaled), expected, atol=2e-3)


@pytest.mark.parametrize(("channels", "dtype"), [(2, np.uint8), (13, np.float32)])
def test_other_numbers_of_channels_keep_their_colors(channels, dtype):
    images = (_bands(4, 3, channels, side=8) % 256).astype(dtype)
    views = tuple(_COLORS.values())
    plain = _augmented(images, (_NOTHING,) * 3)
    np.testing.assert_array_equal(_augmented(images, views), plain)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_what_is_not_drawn_leaves_a_view_exactly_as_it_was(dtype):
    """Also far from zero, where a value and its difference from the mean round differently."""
    views = (*_OTHERS, *_COLORS.values())
    images = _bands(40, len(views), 3, side=12) + np.float32(2e4)
    images /= np.float32(3e4)  # so that some values are above 0.5 and some below
    mean, std = (0.67, 0.68, 0.7), (0.03, 0.06, 0.09)
    plain = _augmented(images, (_NOTHING,) * len(views), mean, std, dtype)
    found = _augmented(images, views, mean, std, dtype)
    same = np.all(found == plain, axis=(2, 3, 4))
    assert np.all((same.sum(axis=0) > 8) & (same.sum(axis=0) < 32))
    changed = np.abs(found - plain).max(axis=(2, 3, 4))[~same]
    assert changed.min() > 0.02  # as drawn, and not by rounding
