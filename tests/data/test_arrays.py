"""Images as arrays, against the package that they come from."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from music_jax.config import from_file
from music_jax.data.arrays import load_images
from music_jax.errors import UserError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = {"data_dir": str(tmp_path_factory.mktemp("tfds"))}
    return from_file(
        "configs/digits.py", dataset=data, crop={"size": 8, "eval_resize": 8}, num_epochs=9
    )


def test_digits_of_both_splits_are_scikit_learns(config):
    digits = load_digits()
    parts = [load_images(config, split) for split in ("train", "test")]
    assert [len(images) for images, _ in parts] == [1437, 360]
    for images, labels in parts:
        assert images.dtype == np.uint8
        assert images.shape[1:] == (8, 8, 1)
        assert np.array_equal(np.unique(labels), np.arange(10))
    mean = np.concatenate([images for images, _ in parts]).mean() / 255
    assert mean == pytest.approx(digits.images.mean() / 16, abs=0.005)
    few, labels = load_images(config, "test", at_most=7)
    np.testing.assert_array_equal(few, parts[1][0][:7])
    np.testing.assert_array_equal(labels, parts[1][1][:7])


def test_a_folder_alone_has_no_test_images(config, tmp_path):
    import cv2

    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), np.full((9, 9), 200, np.uint8))
    config = from_file(
        "configs/digits.py", dataset={"name": "", "path": str(tmp_path)}, crop={"size": 8}
    )
    images, labels = load_images(config, "train")
    assert images.shape == (2, 8, 8, 1)
    assert np.all(images == 200)
    assert labels.tolist() == [-1, -1]
    with pytest.raises(UserError, match="no images to test with"):
        load_images(config)
