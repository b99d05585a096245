"""Images that features are extracted from."""

import numpy as np
import pytest
from pixel_runs import digits_source, pixel_config, pixel_run
from tfds_sets import IMAGES

from music_jax.config import set_views


@pytest.mark.parametrize("flips", [True, False])
def test_crops_are_flipped_if_the_training_flips_views(flips, tmp_path):
    config = pixel_config()
    set_views(config, flip_probability=0.5 if flips else 0.0)
    train, test = digits_source("train", range(64)), digits_source("test", range(3))
    run = pixel_run(tmp_path, train, test, config)
    batches = run.random_crop_batches(train, batch_size=64, num_epochs=2)
    flipped = []
    for images, _ in batches:
        images = np.asarray(images)[..., 0]
        for image in images:
            same = np.any(np.all(image == IMAGES[:64], axis=(1, 2)))
            assert same or np.any(np.all(image[:, ::-1] == IMAGES[:64], axis=(1, 2)))
            flipped.append(not same)
    assert len(flipped) == 128
    # Of 128 fair coins fewer than 45 or more than 83 show heads once in 1,000 times.
    assert 45 <= sum(flipped) <= 83 if flips else not any(flipped)
    first, second = np.split(np.asarray(flipped), 2)
    assert flips == bool(np.any(first != second))  # drawn anew in each epoch
