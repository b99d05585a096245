"""Random boxes, cutting and resizing them, and the central view."""

import cv2
import numpy as np
import pytest
import skimage.measure
import skimage.transform
from PIL import Image

from music_jax.data import crops
from music_jax.data.crops import (
    NUMBERS_PER_BOX,
    Box,
    Crop,
    center_crop,
    central_view,
    cut,
    draw_boxes,
    resize,
)
from music_jax.data.decode import decode


def _boxes(height, width, crop, count, seed=0):
    numbers = np.random.default_rng(seed).random((count, NUMBERS_PER_BOX))
    boxes = draw_boxes(np.full(count, height), np.full(count, width), crop, numbers)
    return [Box(*box) for box in boxes.tolist()]


def _gradient(height, width):
    """Red grows downwards by 1 a row, green to the right by 1 a column."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(height)[:, None]
    image[..., 1] = np.arange(width)[None, :]
    return image


def test_crop_areas_and_ratios_stay_in_their_ranges():
    crop = Crop(size=128, scale=(0.2, 0.6), aspect_ratio=(0.75, 1.25))
    areas, ratios = [], []
    for box in _boxes(128, 128, crop, 300):
        assert 0 <= box.top <= 128 - box.height
        assert 0 <= box.left <= 128 - box.width
        areas.append(box.height * box.width / 128**2)
        ratios.append(box.width / box.height)
    # One pixel of rounding at each side.
    assert min(areas) > 0.18
    assert max(areas) < 0.63
    assert min(ratios) > 0.71
    assert max(ratios) < 1.31
    np.testing.assert_allclose(np.mean(areas), 0.4, atol=0.02)


def test_areas_are_uniform_and_aspect_ratios_log_uniform():
    crop = Crop(size=8, scale=(0.04, 0.2), aspect_ratio=(1 / 4, 4))
    numbers = np.zeros((4, NUMBERS_PER_BOX))
    numbers[:, :10] = np.asarray([0, 0.5, 1, 0])[:, None]  # the area
    numbers[:, 10:20] = np.asarray([0.5, 0.5, 0.75, 0])[:, None]  # the ratio: 1, 1, 2, 1 / 4
    numbers[:, 20:] = (0.25, 0.5)  # top and left
    boxes = draw_boxes(np.full(4, 800), np.full(4, 1250), crop, numbers)
    areas = np.asarray([0.04, 0.12, 0.2, 0.04]) * 1_000_000
    ratios = np.asarray([1, 1, 2, 1 / 4])  # width over height
    height, width = np.rint(np.sqrt(areas / ratios)), np.rint(np.sqrt(areas * ratios))
    top, left = (801 - height) * 0.25, (1251 - width) * 0.5
    np.testing.assert_array_equal(boxes, np.stack([top, left, height, width], 1).astype(int))


def test_positions_of_boxes_are_uniform():
    crop = Crop(size=8, scale=(0.25, 0.25), aspect_ratio=(1.0, 1.0))
    boxes = np.asarray(_boxes(10, 10, crop, 600))
    for side in (0, 1):  # top and left are 0 to 5
        counts = np.bincount(boxes[:, side], minlength=6)
        assert len(counts) == 6
        assert counts.min() > 60  # 100 expected, deviation 9


def test_a_box_as_high_or_as_wide_as_the_image_fits():
    crop = Crop(size=8, scale=(0.25, 0.25), aspect_ratio=(1.0, 1.0))
    numbers = np.full((1, NUMBERS_PER_BOX), 0.99)
    for shape, box in (((50, 200), (0, 149, 50, 50)), ((200, 50), (149, 0, 50, 50))):
        height, width = np.asarray([shape]).T
        assert draw_boxes(height, width, crop, numbers).tolist() == [list(box)]


def test_each_box_depends_on_its_own_numbers_and_image_alone():
    crop = Crop(size=16, scale=(0.1, 0.9))
    numbers = np.random.default_rng(0).random((50, NUMBERS_PER_BOX))
    heights, widths = np.random.default_rng(1).integers(5, 300, (2, 50))
    together = draw_boxes(heights, widths, crop, numbers)
    one = [
        draw_boxes(heights[i : i + 1], widths[i : i + 1], crop, numbers[i : i + 1])
        for i in range(50)
    ]
    np.testing.assert_array_equal(together, np.concatenate(one))


@pytest.mark.parametrize("shape", [(375, 500), (200, 900), (40, 41)])
def test_boxes_are_distributed_as_torchvisions(shape):
    # Its algorithm, written anew with its own calls: areas, tries and the last resort.
    height, width = shape
    crop = Crop(size=8, scale=(0.08, 1.0))
    rng = np.random.default_rng(3)

    def one():
        for _ in range(10):
            area = height * width * rng.uniform(*crop.scale)
            ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
        ratio = width / height
        h = height if ratio > 4 / 3 else round(width / (3 / 4)) if ratio < 3 / 4 else height
        w = round(height * 4 / 3) if ratio > 4 / 3 else width
        return (height - h) // 2, (width - w) // 2, h, w

    expected = np.asarray([one() for _ in range(4000)])
    found = np.asarray(_boxes(height, width, crop, 4000))
    for quantile in (0.1, 0.5, 0.9):
        a, b = (np.quantile(boxes, quantile, axis=0) for boxes in (expected, found))
        np.testing.assert_allclose(a, b, atol=0.03 * max(shape))


def test_a_crop_of_everything_takes_the_whole_of_a_square_image():
    crop = Crop(size=8, scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0))
    for side in range(1, 200):
        assert set(_boxes(side, side, crop, 5)) == {Box(0, 0, side, side)}


@pytest.mark.parametrize(
    ("shape", "box"),
    [((40, 101), (0, 24, 40, 53)), ((101, 40), (24, 0, 53, 40))],  # 53: 40 * 4 / 3
)
def test_if_no_box_fits_the_largest_central_one_is_taken(shape, box):
    assert set(_boxes(*shape, Crop(size=8, scale=(0.9, 1.0)), 5)) == {Box(*box)}


@pytest.mark.parametrize(
    ("shape", "aspect_ratio"),
    [
        ((1, 1), (3 / 4, 4 / 3)),
        ((1, 500), (3 / 4, 4 / 3)),
        ((700, 2), (3 / 4, 4 / 3)),
        ((1, 500), (1 / 4, 1 / 3)),  # of one row, no column is narrow enough
        ((500, 1), (3.0, 4.0)),
    ],
)
def test_images_too_narrow_for_any_box_are_still_cut(shape, aspect_ratio):
    image = np.full((*shape, 3), 7, np.uint8)
    (box,) = _boxes(*shape, Crop(size=8, scale=(0.9, 1.0), aspect_ratio=aspect_ratio), 1)
    np.testing.assert_array_equal(_cut(image, box, 8), np.full((8, 8, 3), 7))


def _cut(image, box, size, **kwargs):
    out = np.full((size, size, image.shape[2]), 99, np.uint8)
    cut(image, box, out, **kwargs)
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_a_box_of_the_size_of_the_view_is_not_resized(channels):
    image = _gradient(50, 60)[..., :channels]
    np.testing.assert_array_equal(_cut(image, Box(5, 7, 28, 28), 28), image[5:33, 7:35])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("box", [(3, 5, 40, 30), (0, 0, 150, 200), (10, 0, 101, 99)])
def test_a_view_matches_pillows_resize(box, channels):
    noise = np.random.default_rng(0).random((150, 200, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 4)
    image = cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)[..., :channels]
    top, left, height, width = box
    expected = Image.fromarray(image.squeeze()).resize(
        (48, 48), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    found = _cut(image, Box(*box), 48)
    difference = np.abs(found.squeeze().astype(int) - np.asarray(expected))
    assert difference.mean() < 2


def test_a_large_box_is_averaged_so_that_fine_patterns_do_not_alias():
    checks = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]
    assert np.all(np.abs(_cut(checks, Box(0, 0, 256, 256), 60).astype(int) - 128) <= 1)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (48, 90), (90, 48)])
def test_a_box_twice_as_large_as_the_view_is_averaged_over_two_by_two_pixels(height, width):
    image = np.random.default_rng(0).integers(0, 256, (100, 110, 3), np.uint8)
    found = _cut(image, Box(3, 7, height, width), 24)
    part = image[3 : 3 + height, 7 : 7 + width]
    means = part.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    expected = cv2.resize(means, (24, 24), interpolation=cv2.INTER_LINEAR)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("shape", [(47, 110), (110, 47)])
def test_a_box_that_is_long_on_one_side_alone_is_not_averaged(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    expected = cv2.resize(image, (24, 24), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(_cut(image, Box(0, 0, *shape), 24), expected)


@pytest.mark.parametrize("reduction", [2, 4])
def test_a_box_of_an_image_that_was_decoded_smaller_is_the_same_part(reduction):
    image = cv2.GaussianBlur(_gradient(256, 248), (0, 0), 2)
    side = (248 // reduction, 256 // reduction)
    reduced = cv2.resize(image, side, interpolation=cv2.INTER_AREA)
    box = Box(61, 40, 150, 131)
    whole, smaller = _cut(image, box, 32), _cut(reduced, box, 32, reduction=reduction)
    assert np.abs(whole.astype(int) - smaller.astype(int)).max() <= reduction


def test_center_crop_takes_the_center():
    image = np.zeros((40, 80, 1), np.uint8)
    image[:, 30:50] = 255  # the central quarter
    cut = center_crop(image, size=20, resize_shorter_side=20)
    assert cut.shape == (20, 20, 1)
    assert np.all(cut[:, 6:14] == 255)
    assert not np.any(cut[:, [0, 1, 2, -3, -2, -1]])


@pytest.mark.parametrize(("height", "width"), [(200, 40), (40, 200), (97, 40)])
def test_center_crop_of_a_long_image_takes_the_middle_of_its_longer_side(height, width):
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    got = center_crop(np.stack([rows, columns], axis=-1), 32, 40)
    top, left = (height - 32) // 2, (width - 32) // 2
    np.testing.assert_array_equal(got[:, 0, 0], np.arange(top, top + 32))
    np.testing.assert_array_equal(got[0, :, 1], np.arange(left, left + 32))


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(300, 300, 256), (300, 2000, 256), (2000, 300, 256), (1200, 640, 64), (90, 150, 96)],
)
def test_a_jpeg_is_never_decoded_smaller_than_its_central_view(height, width, size):
    noise = np.random.default_rng(0).uniform(size=(height, width, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), max(1.0, min(height, width) / size))
    image = cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    got = central_view(jpeg, size=size, resize_shorter_side=size, channels=3)
    expected = center_crop(decode(jpeg, 3), size, size)
    difference = np.abs(got.astype(float) - expected)
    assert difference.mean() < 0.15 * np.std(expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_only_the_middle_of_a_long_strip_is_enlarged(axis, monkeypatch):
    strip = np.random.default_rng(0).integers(0, 256, (161, 10, 3), np.uint8)
    middle, shorter = strip[60:101], strip[:160]  # 40 rows, and one to keep the center
    if axis == 1:
        strip, middle, shorter = (x.swapaxes(0, 1) for x in (strip, middle, shorter))
    enlarged = []
    monkeypatch.setattr(crops, "resize", lambda image, h, w: enlarged.append(image) or image)
    for image in (strip, shorter):
        center_crop(image, 20, 20)
    np.testing.assert_array_equal(enlarged[0], middle)
    np.testing.assert_array_equal(enlarged[1], shorter)


def test_center_crop_of_an_image_of_that_size_is_the_image():
    image = _gradient(28, 28)
    np.testing.assert_array_equal(center_crop(image, 28, 28), image)


def test_shrinking_averages_so_that_fine_patterns_do_not_alias():
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None]
    small = resize(checks, 16, 16)
    assert np.all(np.abs(small.astype(int) - 128) <= 1)


_TYPES = ("uint8", "uint16", "float32")


def _channels(count, dtype, shape=(48, 36)):
    """Smooth channels of different means."""
    noise = np.random.default_rng(count).normal(0, 1, (*shape, count)).astype(np.float32)
    smooth = np.stack([cv2.GaussianBlur(noise[..., i], (0, 0), 3) for i in range(count)], axis=2)
    return ((smooth / np.abs(smooth).max() + 1) * 100 + np.arange(count) % 50).astype(dtype)


@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("count", [2, 4, 5, 13, 130])
def test_any_number_of_channels_is_shrunk_by_averaging(count, dtype):
    image = _channels(count, dtype)
    expected = skimage.measure.block_reduce(image.astype(np.float64), (3, 3, 1), np.mean)
    found = resize(image, 16, 12)
    assert (found.dtype, found.shape) == (dtype, (16, 12, count))
    np.testing.assert_allclose(found, expected, atol=1e-3 if dtype == "float32" else 1)


@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("count", [2, 5, 13, 130])
def test_any_number_of_channels_is_enlarged_bilinearly(count, dtype):
    image = _channels(count, dtype)
    expected = skimage.transform.resize(
        image.astype(np.float64), (80, 60), order=1, mode="edge", anti_aliasing=False
    )
    found = resize(image, 80, 60)
    np.testing.assert_allclose(found, expected, atol=0.01 if dtype == "float32" else 1)


@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("size", [11, 24, 40])
def test_each_channel_of_a_view_is_cut_as_if_it_were_alone(size, dtype):
    image, box = _channels(13, dtype, (90, 80)), Box(5, 9, 70, 61)
    found = np.empty((size, size, 13), dtype)
    cut(image, box, found)
    for channel in range(13):
        alone = np.empty((size, size, 1), dtype)
        cut(image[..., channel : channel + 1], box, alone)
        np.testing.assert_allclose(found[..., channel : channel + 1], alone, rtol=1e-6, atol=1)


def test_the_central_view_of_an_array_file_has_its_type():
    image = _channels(13, "float32", (60, 40))
    view = crops.central_view(image, size=20, resize_shorter_side=20, channels=13, dtype=np.float32)
    means = image.reshape(30, 2, 20, 2, 13).mean(axis=(1, 3))
    np.testing.assert_allclose(view, means[5:25], rtol=1e-5)


def test_a_box_is_never_rounded_to_no_pixels():
    crop = Crop(size=8, scale=(0.001, 0.3), aspect_ratio=(1 / 4, 4.0))
    for height, width in ((1, 30), (30, 1), (2, 3)):
        boxes = _boxes(height, width, crop, 500)
        assert min(min(box.height, box.width) for box in boxes) == 1
        assert all(box.top + box.height <= height for box in boxes)
        assert all(box.left + box.width <= width for box in boxes)
