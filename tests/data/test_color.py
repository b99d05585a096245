"""Color operations against PIL, colorsys and torchvision's formulas in numpy."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from music_jax.data import color

# PIL computes in uint8, and rounds contrast's mean to an integer.
PIL_TOLERANCE = 1.6 / 255


@pytest.fixture(name="pictures")
def fixture_pictures():
    """uint8 [24, 8, 9, 3], with pure black, white, gray and saturated pixels among the others."""
    pictures = np.random.default_rng(0).integers(0, 256, (24, 8, 9, 3), dtype=np.uint8)
    pictures[:, 0, :5] = [[0, 0, 0], [255, 255, 255], [77, 77, 77], [255, 0, 0], [0, 255, 255]]
    return pictures


def jitter_of(count, **draws):
    """A draw for each of `count` images, neutral where nothing else is given."""
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    arrays = {
        name: jnp.broadcast_to(jnp.asarray(draws.get(name, value), jnp.float32), (count,))
        for name, value in neutral.items()
    }
    return color.ColorJitter(**arrays)


def unit(pictures):
    return pictures.astype(np.float32) / np.float32(255)


@jax.jit
def jittered(images, jitter):
    return color.join_planes(color.color_jitter(color.split_planes(images), jitter))


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_blends_match_pil(pictures, name, enhance, factor):
    expected = [np.asarray(enhance(Image.fromarray(p)).enhance(factor)) / 255 for p in pictures]
    got = jittered(unit(pictures), jitter_of(len(pictures), **{name: factor}))
    np.testing.assert_allclose(got, np.stack(expected), atol=PIL_TOLERANCE)


def turn_hue(picture, shift):
    """[height, width, 3] float64 through colorsys, pixel by pixel."""
    pixels = []
    for pixel in picture.reshape(-1, 3):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        pixels.append(colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value))
    return np.array(pixels).reshape(picture.shape)


def test_hue_matches_colorsys(pictures):
    shifts = np.linspace(-0.5, 0.5, len(pictures))
    expected = [turn_hue(p / 255, shift) for p, shift in zip(pictures, shifts, strict=True)]
    got = jittered(unit(pictures), jitter_of(len(pictures), hue=shifts))
    np.testing.assert_allclose(got, np.stack(expected), atol=2e-6)


def test_jitter_operations_are_applied_in_order(pictures):
    """Brightness, contrast, saturation, hue, each image its own strengths."""
    rng = np.random.default_rng(1)
    brightness, contrast, saturation = rng.uniform(0.4, 1.6, (3, 24))
    hue = rng.uniform(-0.3, 0.3, 24)

    def gray_of(picture):
        return (picture @ np.array([0.299, 0.587, 0.114]))[..., None]

    def blend(picture, factor, base):
        return np.clip(factor * picture + (1 - factor) * base, 0, 1)

    expected = []
    for n, picture in enumerate(pictures / 255):
        picture = blend(picture, brightness[n], 0.0)
        picture = blend(picture, contrast[n], gray_of(picture).mean())
        picture = blend(picture, saturation[n], gray_of(picture))
        expected.append(turn_hue(picture, hue[n]))
    draws = jitter_of(24, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    np.testing.assert_allclose(jittered(unit(pictures), draws), np.stack(expected), atol=2e-5)


def test_neutral_jitter_changes_nothing_at_all(pictures):
    got = jittered(unit(pictures), jitter_of(24))
    np.testing.assert_array_equal(got, unit(pictures))


def test_one_channel_has_brightness_and_contrast_only(pictures):
    gray = pictures[..., :1]
    expected = [
        np.asarray(ImageEnhance.Contrast(Image.fromarray(p[..., 0])).enhance(0.5)) / 255
        for p in gray
    ]
    got = jittered(unit(gray), jitter_of(24, contrast=0.5, saturation=0.1, hue=0.3))
    np.testing.assert_allclose(got[..., 0], np.stack(expected), atol=PIL_TOLERANCE)


def test_grayscale_and_solarize_match_pil(pictures):
    planes = color.split_planes(jnp.asarray(unit(pictures)))
    apply = jnp.arange(24) % 2 == 0
    gray = np.stack([np.asarray(ImageOps.grayscale(Image.fromarray(p))) for p in pictures]) / 255
    gray = np.repeat(gray[..., None], 3, axis=-1)
    solar = [np.asarray(ImageOps.solarize(Image.fromarray(p), 128)) / 255 for p in pictures]
    for operation, expected, tolerance in (
        (color.grayscale, gray, 0.51 / 255),
        (color.solarize, np.stack(solar), 1e-6),
    ):
        got = color.join_planes(jax.jit(operation)(planes, apply))
        np.testing.assert_allclose(got[::2], expected[::2], atol=tolerance)
        np.testing.assert_array_equal(got[1::2], unit(pictures[1::2]))
