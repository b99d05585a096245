"""Decoding and cropping on the host."""

import cv2
import numpy as np
import pytest

from music_jax.data.crops import Crop, center_crop, decode, random_resized_crop, resize
from music_jax.errors import UnusableDataError


def _rng(seed=0):
    return np.random.Generator(np.random.Philox(key=[seed, 0]))


def _gradient(height, width):
    """Red grows downwards by 1 a row, green to the right by 1 a column."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(height)[:, None]
    image[..., 1] = np.arange(width)[None, :]
    return image


def _encode(image, suffix):
    bgr = image[..., ::-1] if image.shape[-1] == 3 else image
    return cv2.imencode(suffix, bgr)[1].tobytes()


def test_png_decodes_to_the_same_rgb():
    image = _gradient(20, 30)
    np.testing.assert_array_equal(decode(_encode(image, ".png"), 3), image)


def test_jpeg_decodes_to_nearly_the_same_rgb():
    image = np.full((16, 16, 3), (200, 60, 20), np.uint8)
    difference = decode(_encode(image, ".jpg"), 3).astype(int) - image
    assert np.abs(difference).max() <= 3


def test_a_gray_image_can_be_read_as_either():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    encoded = _encode(image, ".png")
    np.testing.assert_array_equal(decode(encoded, 1), image)
    np.testing.assert_array_equal(decode(encoded, 3), np.repeat(image, 3, axis=2))


@pytest.mark.parametrize("encoded", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 20])
def test_what_is_no_image_is_an_error(encoded):
    with pytest.raises(UnusableDataError, match="cannot be decoded"):
        decode(encoded, 3)


def test_crop_areas_and_ratios_stay_in_their_ranges():
    crop = Crop(size=128, scale=(0.2, 0.6), aspect_ratio=(0.75, 1.25))
    areas, ratios = [], []
    for seed in range(300):
        part = random_resized_crop(_gradient(128, 128), crop, _rng(seed))
        assert part.shape == (128, 128, 3)
        height = int(part[..., 0].max()) - int(part[..., 0].min()) + 1
        width = int(part[..., 1].max()) - int(part[..., 1].min()) + 1
        areas.append(height * width / 128**2)
        ratios.append(width / height)
    # One pixel of rounding at each side.
    assert min(areas) > 0.18
    assert max(areas) < 0.63
    assert min(ratios) > 0.71
    assert max(ratios) < 1.31
    np.testing.assert_allclose(np.mean(areas), 0.4, atol=0.02)


def test_the_same_state_gives_the_same_crop_and_another_another():
    crop = Crop(size=16, scale=(0.1, 0.5))
    image = _gradient(60, 90)
    first = random_resized_crop(image, crop, _rng(1))
    np.testing.assert_array_equal(first, random_resized_crop(image, crop, _rng(1)))
    assert np.any(first != random_resized_crop(image, crop, _rng(2)))


def test_the_whole_image_is_taken_where_the_crop_says_so():
    crop = Crop(size=28, scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0))
    image = _gradient(28, 28)
    np.testing.assert_array_equal(random_resized_crop(image, crop, _rng()), image)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (700, 2)])
def test_images_too_narrow_for_any_crop_are_cropped_all_the_same(shape):
    image = np.full((*shape, 3), 7, np.uint8)
    part = random_resized_crop(image, Crop(size=8, scale=(0.9, 1.0)), _rng())
    np.testing.assert_array_equal(part, np.full((8, 8, 3), 7))


def test_center_crop_takes_the_centre():
    image = np.zeros((40, 80, 1), np.uint8)
    image[:, 30:50] = 255  # the central quarter
    cut = center_crop(image, size=20, resize_shorter_side=20)
    assert cut.shape == (20, 20, 1)
    assert np.all(cut[:, 6:14] == 255)
    assert not np.any(cut[:, [0, 1, 2, -3, -2, -1]])


def test_center_crop_of_an_image_of_that_size_is_the_image():
    image = _gradient(28, 28)
    np.testing.assert_array_equal(center_crop(image, 28, 28), image)


def test_shrinking_averages_so_that_fine_patterns_do_not_alias():
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]
    small = resize(checks, 16, 16)
    assert np.all(np.abs(small.astype(int) - 128) <= 1)
