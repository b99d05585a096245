"""Datasets in the format of MNIST, prepared from files on this machine."""

import gzip
import struct

import numpy as np
import pytest

from music_jax.config import default_config
from music_jax.data import datasets
from music_jax.data.idx import read_idx
from music_jax.errors import UserError

_NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def _write(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for count, names in ((40, _NAMES[:2]), (20, _NAMES[2:])):
        arrays[names[0]] = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        arrays[names[1]] = rng.integers(10, size=count, dtype=np.uint8)
    directory = tmp_path / "idx"
    directory.mkdir()
    for name, array in arrays.items():
        _write(directory / f"{name}-ubyte.gz", array)
    return directory, arrays


def _config(tmp_path, directory):
    config = default_config()
    config.dataset.update(name="fashion_mnist", num_channels=1, mean=(0.3,), std=(0.3,))
    config.dataset.update(data_dir=str(tmp_path / "tfds"), manual_dir=str(directory))
    config.crop.update(size=28, eval_resize=28)
    return config


def test_a_dataset_is_prepared_from_its_files(tmp_path, files):
    directory, arrays = files
    config = _config(tmp_path, directory)
    for split, names in (("train", _NAMES[:2]), ("test", _NAMES[2:])):
        images, labels = datasets.load_images(config, split)
        saved = {
            image.tobytes(): label for image, label in zip(images[..., 0], labels, strict=True)
        }
        expected = zip(*(arrays[name] for name in names), strict=True)
        assert saved == {image.tobytes(): label for image, label in expected}  # TFDS shuffles
    assert datasets.training_source(config).class_names[9] == "Ankle boot"
    config.dataset.manual_dir = None  # the files are not needed any more
    assert len(datasets.training_source(config)) == 40


def test_a_damaged_file_is_an_error(tmp_path, files):
    directory, _ = files
    path = directory / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"t10k-labels.* is not a complete gzip file"):
        datasets.prepare(_config(tmp_path, directory))
    whole = bytearray(gzip.compress(bytes(range(200))))
    whole[12:40] = bytes(28)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="is not a complete gzip file"):
        read_idx(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "not an IDX file of unsigned bytes"),
        (b"", "not an IDX file of unsigned bytes"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", r"has 3 values; its header says \[5\]"),
    ],
)
def test_only_whole_files_of_bytes_are_read(tmp_path, content, message):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message):
        read_idx(path)
