"""Flip, affine warp and blur against OpenCV and scipy."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from music_jax.data import color, geometry


def pictures(channels, count=6, height=28, width=24):
    shape = (count, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@jax.jit
def warped(images, **draws):
    draws = {name: jnp.asarray(value, jnp.float32) for name, value in draws.items()}
    matrices = geometry.affine_matrices(**draws)
    return color.join_planes(geometry.warp_affine(color.split_planes(images), matrices))


def still(count, **draws):
    names = ("rotation", "translation_x", "translation_y", "shear")
    values = {name: np.zeros(count) for name in names} | {"scale": np.ones(count)}
    return values | {name: np.asarray(value) for name, value in draws.items()}


@pytest.mark.parametrize("channels", [1, 3])
def test_affine_matches_scipy(channels):
    """Rotation, shear, scale and shift together, in torchvision's order."""
    images = pictures(channels)
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
    center = np.array([(28 - 1) / 2, (24 - 1) / 2])
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


def test_rotation_matches_opencv():
    """Same sense of rotation (clockwise), same center; OpenCV interpolates on a grid of 1/32 px."""
    images = cv2.GaussianBlur(pictures(1, count=1)[0], (0, 0), 3)[None, ..., None]
    got = warped(images, **still(1, rotation=[np.radians(20)], scale=[1.2]))
    matrix = cv2.getRotationMatrix2D(((24 - 1) / 2, (28 - 1) / 2), -20, 1.2)
    expected = cv2.warpAffine(images[0, ..., 0].astype(np.float32), matrix, (24, 28))
    np.testing.assert_allclose(got[0, ..., 0], expected, atol=3.0)


def test_a_shift_moves_right_and_down_and_leaves_black():
    images = pictures(3)
    got = np.asarray(warped(images, **still(6, translation_x=[3] * 6, translation_y=[2] * 6)))
    np.testing.assert_allclose(got[:, 2:, 3:], images[:, :-2, :-3], atol=1e-3)
    assert not got[:, :2].any()
    assert not got[:, :, :3].any()


def test_far_out_of_the_image_is_black_and_the_identity_is_exact():
    images = pictures(1)
    got = np.asarray(warped(images, **still(6, translation_x=[0, 0, 1e6, -1e6, 25, -25])))
    np.testing.assert_array_equal(got[:2], images[:2])
    assert not got[2:].any()


def test_flip_mirrors_the_selected_images():
    images = pictures(3)
    apply = np.arange(6) % 2 == 0
    planes = geometry.flip_left_right(color.split_planes(jnp.asarray(images)), jnp.asarray(apply))
    expected = np.where(apply[:, None, None, None], images[:, :, ::-1], images)
    np.testing.assert_array_equal(color.join_planes(planes), expected)


@pytest.mark.parametrize(("height", "width", "kernel"), [(224, 224, 23), (60, 90, 7), (32, 32, 3)])
def test_blur_matches_opencv(height, width, kernel):
    images = pictures(3, count=4, height=height, width=width).astype(np.float32) / 255
    sigma = np.array([0.1, 0.7, 2.0, 1.3], np.float32)
    got = jax.jit(geometry.gaussian_blur)(images, sigma)
    for n in range(4):
        expected = cv2.GaussianBlur(
            images[n], (kernel, kernel), float(sigma[n]), borderType=cv2.BORDER_REFLECT_101
        )
        np.testing.assert_allclose(got[n], expected, atol=3e-6)


def test_blur_in_bfloat16_stays_within_a_gray_level():
    images = jnp.asarray(pictures(3, count=4, height=64, width=64)).astype(jnp.float32) / 255
    sigma = jnp.asarray([0.1, 0.7, 2.0, 1.3])
    blur = jax.jit(geometry.gaussian_blur)
    exact, half = blur(images, sigma), blur(images.astype(jnp.bfloat16), sigma)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=1.5 / 255)


def test_an_image_one_pixel_wide_cannot_be_blurred():
    with pytest.raises(ValueError, match="expected images of 2 x 2 pixels or more to blur"):
        geometry.gaussian_blur(jnp.zeros((1, 4, 1, 1)), jnp.ones(1))
