"""What the augmentation refuses, and what it says then."""

import functools

import jax
import jax.numpy as jnp
import pytest

from music_jax.data import geometry
from music_jax.data.augment import ViewAugmentation
from music_jax.data.augment import augment_views as augment
from music_jax.data.augment import normalize_images as normalize

NOTHING = ViewAugmentation()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip_probability": 1.5}, r"expected flip_probability in \[0, 1\], got 1.5"),
        ({"jitter_probability": -0.1}, r"expected jitter_probability in \[0, 1\], got -0.1"),
        ({"noise_probability": float("nan")}, r"expected noise_probability in \[0, 1\], got nan"),
        ({"brightness": -0.4}, r"expected brightness in \[0, inf\), got -0.4"),
        ({"contrast": float("inf")}, r"expected contrast in \[0, inf\), got inf"),
        ({"hue": 0.6}, r"expected hue in \[0, 0.5\], got 0.6"),
        ({"translation": 2.0}, r"expected translation in \[0, 1\], got 2.0"),
        ({"noise_std": -1.0}, r"expected noise_std in \[0, inf\), got -1.0"),
        ({"blur_sigma": (-0.1, 2.0)}, r"expected blur_sigma .* 0 < low <= high, got \(-0.1, 2.0\)"),
        ({"blur_sigma": (2.0, 0.1)}, r"expected blur_sigma .* got \(2.0, 0.1\)"),
        ({"scale": (0.0, 1.0)}, r"expected scale .* got \(0.0, 1.0\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ViewAugmentation(**options)


def test_arguments_that_do_not_fit_are_refused():
    images, indices = jnp.zeros((4, 2, 8, 8, 3), jnp.uint8), jnp.arange(4)
    key = jax.random.key(7)
    run = functools.partial(augment, views=(NOTHING, NOTHING), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ValueError, match="expected uint8 images, got float32"):
        run(images.astype(jnp.float32), indices, key)
    with pytest.raises(ValueError, match="expected images of shape"):
        run(images[..., :2], indices, key)
    with pytest.raises(ValueError, match="for each of 2 views, got 1"):
        run(images, indices, key, views=(NOTHING,))
    with pytest.raises(ValueError, match="expected integer sample_indices of shape"):
        run(images, indices[:3], key)
    with pytest.raises(ValueError, match="expected one typed key"):
        run(images, indices, jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="expected mean to hold one number for each of 3 channels"):
        run(images, indices, key, mean=(0.5,))
    with pytest.raises(ValueError, match="expected uint8 images, got float32"):
        normalize(images.astype(jnp.float32), mean=(0.5,) * 3, std=(0.5,) * 3)


def test_an_image_one_pixel_wide_cannot_be_blurred():
    with pytest.raises(ValueError, match="expected images of 2 x 2 pixels or more to blur"):
        geometry.gaussian_blur(jnp.zeros((1, 4, 1, 1)), jnp.ones(1))
