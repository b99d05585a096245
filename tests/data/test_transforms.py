"""Operations against PIL, colorsys, OpenCV, scipy, and torchvision's formulas in numpy."""

import colorsys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageOps

from music_jax.data import transforms

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
    return {
        name: jnp.broadcast_to(jnp.asarray(draws.get(name, value), jnp.float32), (count,))
        for name, value in neutral.items()
    }


def unit(pictures):
    return pictures.astype(np.float32) / np.float32(255)


@jax.jit
def jittered(images, jitter):
    return transforms.join_planes(
        transforms.color_jitter(transforms.split_planes(images), **jitter)
    )


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
    planes = transforms.split_planes(jnp.asarray(unit(pictures)))
    apply = jnp.arange(24) % 2 == 0
    gray = np.stack([np.asarray(ImageOps.grayscale(Image.fromarray(p))) for p in pictures]) / 255
    gray = np.repeat(gray[..., None], 3, axis=-1)
    solar = [np.asarray(ImageOps.solarize(Image.fromarray(p), 128)) / 255 for p in pictures]
    for operation, expected, tolerance in (
        (transforms.grayscale, gray, 0.51 / 255),
        (transforms.solarize, np.stack(solar), 1e-6),
    ):
        got = transforms.join_planes(jax.jit(operation)(planes, apply))
        np.testing.assert_allclose(got[::2], expected[::2], atol=tolerance)
        np.testing.assert_array_equal(got[1::2], unit(pictures[1::2]))


def noise_images(channels, count=6, height=28, width=24):
    shape = (count, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@jax.jit
def warped(images, **draws):
    draws = {name: jnp.asarray(value, jnp.float32) for name, value in draws.items()}
    matrices = transforms.affine_matrices(**draws)
    return transforms.join_planes(transforms.warp_affine(transforms.split_planes(images), matrices))


def still(count, **draws):
    names = ("rotation", "translation_x", "translation_y", "shear")
    values = {name: np.zeros(count) for name in names} | {"scale": np.ones(count)}
    return values | {name: np.asarray(value) for name, value in draws.items()}


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 24), (3, 27, 23)])
def test_affine_matches_scipy(channels, height, width):
    """Rotation, shear, scale and shift together, in torchvision's order."""
    images = noise_images(channels, height=height, width=width)
    rng = np.random.default_rng(1)
    draws = still(
        6,
        rotation=rng.uniform(-1, 1, 6),
        translation_x=rng.uniform(-5, 5, 6),
        translation_y=rng.uniform(-5, 5, 6),
        scale=rng.uniform(0.7, 1.4, 6),
        shear=rng.uniform(-0.5, 0.5, 6),
    )
    got = warped(images, **draws)
    center = np.array([(height - 1) / 2, (width - 1) / 2])
    for n, image in enumerate(images):
        angle, shear = draws["rotation"][n], draws["shear"][n]
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        forward = draws["scale"][n] * turn @ np.array([[1, -np.tan(shear)], [0, 1]])
        pull = np.linalg.inv(forward)[::-1, ::-1]  # from (x, y) to (row, column)
        shift = np.array([draws["translation_y"][n], draws["translation_x"][n]])
        offset = center - pull @ (center + shift)
        expected = np.stack(
            [
                scipy.ndimage.affine_transform(
                    plane.astype(np.float64), pull, offset, order=1, mode="grid-constant"
                )
                for plane in np.moveaxis(image, -1, 0)
            ],
            axis=-1,
        )
        np.testing.assert_allclose(got[n], expected, atol=5e-3)  # of 255


def test_affine_of_float32_is_that_of_uint8():
    images = noise_images(3)
    draws = still(6, rotation=np.linspace(-1, 1, 6), translation_x=np.linspace(-4, 4, 6))
    expected = warped(images, **draws)
    np.testing.assert_allclose(warped(images.astype(np.float32), **draws), expected, atol=1e-4)


def test_planes_with_several_leading_axes_are_warped():
    planes = noise_images(1).reshape(2, 3, 28, 24)
    matrices = transforms.affine_matrices(**still(6, rotation=np.linspace(-1, 1, 6)))
    (expected,) = transforms.warp_affine((jnp.asarray(planes).reshape(6, 28, 24),), matrices)
    (found,) = transforms.warp_affine((jnp.asarray(planes),), matrices.reshape(2, 3, 2, 3))
    np.testing.assert_allclose(found.reshape(6, 28, 24), expected, atol=1e-4)


def test_rotation_matches_opencv():
    """Same sense of rotation (clockwise), same center; OpenCV interpolates on a grid of 1/32 px."""
    images = cv2.GaussianBlur(noise_images(1, count=1)[0], (0, 0), 3)[None, ..., None]
    got = warped(images, **still(1, rotation=[np.radians(20)], scale=[1.2]))
    matrix = cv2.getRotationMatrix2D(((24 - 1) / 2, (28 - 1) / 2), -20, 1.2)
    expected = cv2.warpAffine(images[0, ..., 0].astype(np.float32), matrix, (24, 28))
    np.testing.assert_allclose(got[0, ..., 0], expected, atol=3.0)


def test_a_shift_moves_right_and_down_and_leaves_black():
    images = noise_images(3)
    got = np.asarray(warped(images, **still(6, translation_x=[3] * 6, translation_y=[2] * 6)))
    np.testing.assert_allclose(got[:, 2:, 3:], images[:, :-2, :-3], atol=1e-3)
    assert not got[:, :2].any()
    assert not got[:, :, :3].any()


def test_far_out_of_the_image_is_black_and_the_identity_is_exact():
    images = noise_images(1)
    got = np.asarray(warped(images, **still(6, translation_x=[0, 0, 1e6, -1e6, 25, -25])))
    np.testing.assert_array_equal(got[:2], images[:2])
    assert not got[2:].any()


def test_flip_mirrors_the_selected_images():
    images = noise_images(3)
    apply = np.arange(6) % 2 == 0
    planes = transforms.flip_left_right(
        transforms.split_planes(jnp.asarray(images)), jnp.asarray(apply)
    )
    expected = np.where(apply[:, None, None, None], images[:, :, ::-1], images)
    np.testing.assert_array_equal(transforms.join_planes(planes), expected)


@pytest.mark.parametrize(("height", "width", "kernel"), [(224, 224, 23), (60, 90, 7), (32, 32, 3)])
def test_blur_matches_opencv(height, width, kernel):
    images = noise_images(3, count=4, height=height, width=width).astype(np.float32) / 255
    sigma = np.array([0.1, 0.7, 2.0, 1.3], np.float32)
    got = jax.jit(transforms.gaussian_blur)(images, sigma)
    for n in range(4):
        expected = cv2.GaussianBlur(
            images[n], (kernel, kernel), float(sigma[n]), borderType=cv2.BORDER_REFLECT_101
        )
        np.testing.assert_allclose(got[n], expected, atol=3e-6)


def test_blur_in_bfloat16_stays_within_a_gray_level():
    images = jnp.asarray(noise_images(3, count=4, height=64, width=64)).astype(jnp.float32) / 255
    sigma = jnp.asarray([0.1, 0.7, 2.0, 1.3])
    blur = jax.jit(transforms.gaussian_blur)
    exact, half = blur(images, sigma), blur(images.astype(jnp.bfloat16), sigma)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=1.5 / 255)


def test_an_image_one_pixel_wide_cannot_be_blurred():
    with pytest.raises(ValueError, match="expected images of 2 x 2 pixels or more to blur"):
        transforms.gaussian_blur(jnp.zeros((1, 4, 1, 1)), jnp.ones(1))
