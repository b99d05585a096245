"""Pictures of images of many channels and types."""

import numpy as np
import pytest

from music_jax.data.pictures import as_pictures, shown_channels


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3), (13, 3)])
def test_the_first_three_channels_are_shown_or_one(channels, shown):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 6, channels), dtype=np.uint8)
    np.testing.assert_array_equal(shown_channels(images), images[..., :shown])
    mean, std = np.linspace(0.2, 0.6, channels), np.linspace(0.1, 0.3, channels)
    normalized = (images / 255 - mean) / std
    found = as_pictures(normalized, mean=mean, std=std, pixel_type="uint8")
    np.testing.assert_array_equal(found, images[..., :shown])


@pytest.mark.parametrize("pixel_type", ["uint16", "float32"])
def test_other_types_are_shown_from_two_deviations_below_the_mean_to_two_above(pixel_type):
    normalized = np.array([-9.0, -2.0, -1.0, 0.0, 1.0, 2.0, 9.0], np.float32).reshape(7, 1, 1)
    found = as_pictures(normalized, mean=(1e4,), std=(500,), pixel_type=pixel_type)
    np.testing.assert_array_equal(found.ravel(), [0, 0, 64, 128, 191, 255, 255])
