"""Which sets a config or a flag names: versions of TFDS, pairs, and sets without labels."""

import cv2
import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from tfds_sets import IMAGES, LABELS, png, write_set

from music_jax.config import default_config, from_file
from music_jax.data import datasets, tfds_source
from music_jax.data.decode import decode
from music_jax.errors import NotMeasurableError, UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Sets of a few digits."""
    directory = tmp_path_factory.mktemp("tfds")
    train, test = LABELS[:20], LABELS[:6]
    both = {"train": train, "test": test}
    mixed = np.where(np.arange(20) % 3 == 1, -1, train)
    write_set(directory, "partly", {"train": mixed, "test": test, "unlabeled": [-1] * 5})
    write_set(directory, "one_class", {"train": [-1, 4, 4, -1], "test": test})
    write_set(directory, "without", {"train": [None] * 20}, label=None)
    write_set(directory, "only_train", {"train": train})
    write_set(directory, "versioned", both, version="2.1.0")
    write_set(directory, "versioned", {"train": train[:9], "test": test}, version="2.2.0")
    write_set(directory, "several", both, version="1.2.0", config="small-v2")
    write_set(directory, "real", both, tfds.features.Scalar(np.float32))
    many = {split: [[int(i), 3] for i in labels] for split, labels in both.items()}
    write_set(directory, "many", many, tfds.features.Sequence(np.int64))
    return str(directory)


def _config(data_dir, **fields):
    config = default_config()
    config.dataset.data_dir = data_dir
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("versioned:train", 9),  # the newest version
        ("versioned:2.1.0:train", 20),
        ("versioned:2.1.*:train[:50%]", 10),
        ("several/small-v2:train", 20),
        ("several/small-v2:1.2.0:train[5:]", 15),
        ("partly:train+unlabeled", 25),
    ],
)
def test_a_split_is_named_with_its_config_and_version(data_dir, name, images):
    source = datasets.open_named(_config(data_dir), name)
    assert len(source) == images
    dataset, _, split = name.rpartition(":") if "[" not in name else name.partition(":train")
    config = _config(data_dir, dataset__name=dataset)
    split = "train" + split if "[" in name else split
    assert len(tfds_source.open_split(config.dataset, split)) == images


def test_a_missing_version_is_an_error(data_dir):
    with pytest.raises(UserError, match=r"versioned:3\.0\.0"):
        datasets.open_named(_config(data_dir), "versioned:3.0.0:train")


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("cifar10:train:test", ("cifar10:train", "cifar10:test")),
        ("cifar10:train[:90%]:train[90%:]", ("cifar10:train[:90%]", "cifar10:train[90%:]")),
        ("cifar10:3.0.2:train:test", ("cifar10:3.0.2:train", "cifar10:3.0.2:test")),
        ("a/b-v2:1.*.*:train:val", ("a/b-v2:1.*.*:train", "a/b-v2:1.*.*:val")),
        ("mnist:train:digits:test", ("mnist:train", "digits:test")),
        ("mnist:1.0.0:train:digits:test", ("mnist:1.0.0:train", "digits:test")),
        ("mnist:train:digits:1.0.0:test", ("mnist:train", "digits:1.0.0:test")),
        ("a:1.0.0:train:b/c:2.0.0:test", ("a:1.0.0:train", "b/c:2.0.0:test")),
        ("photos:x/y", ("photos", "x/y")),
        ("a:b:c:d", ("a:b", "c:d")),  # folders
        ("photos:a:b", ("photos", "a:b")),
        ("photos:digits:1.0.0:test", ("photos", "digits:1.0.0:test")),
        ("./photos:digits:test", ("./photos", "digits:test")),
        ("digits:train:./photos", ("digits:train", "./photos")),
        ("digits:train:photos", ("digits:train", "digits:photos")),
        ("digits:1.0.0:test", None),
        ("digits", None),
        ("digits:train", None),
        ("digits::test", None),
        ("digits:train:/nowhere", None),
        ("photos:nowhere", None),
    ],
)
def test_a_pair_of_sets_is_split_where_both_sides_are_sets(text, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "x/y", "a:b", "c:d"):
        (tmp_path / name).mkdir(parents=True)
    assert datasets.parse_pair(text) == pair


@pytest.mark.parametrize("name", ["without", "real", "many"])
def test_a_set_without_classes_is_read_without_labels(data_dir, name):
    source = tfds_source.open_split(_config(data_dir, dataset__name=name).dataset, "train")
    assert (len(source), source.num_classes, source.class_names) == (20, 0, ())
    encoded, label = source.example(7)
    assert any(np.array_equal(decode(encoded, 1)[..., 0], image) for image in IMAGES[:20])
    assert label == -1
    assert source.labels().tolist() == [-1] * 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset__name": "without"}, "without has no split 'test' to test with"),
        ({"dataset__name": "only_train"}, "only_train has no split 'test' to test with"),
        ({"dataset__name": "only_train", "dataset__test_split": ""}, "no images to test with"),
        ({"dataset__name": "real"}, "its feature 'label' is a Scalar of float32; labels are a Cl"),
        ({"dataset__name": "many"}, "its feature 'label' is a Sequence of Tensor of int64; label"),
        (
            {"dataset__name": "one_class"},
            r"4 images that have a label are all of one class.*evaluation\.train=",
        ),
        (
            {"dataset__name": "partly", "evaluation__test": "partly:unlabeled"},
            "none of its 5 images has a label.*evaluation.test",
        ),
        (
            {"dataset__name": "partly", "evaluation__train": "without:train"},
            "without has no feature 'label'.*evaluation.train",
        ),
    ],
)
def test_the_error_says_why_a_source_cannot_be_used_for_evaluation(data_dir, fields, message):
    with pytest.raises(NotMeasurableError, match=message):
        datasets.evaluation_sources(_config(data_dir, **fields))


@pytest.mark.parametrize("split", ["tset", "test[:50%]", "validation"])
def test_only_the_default_test_split_may_be_missing(data_dir, split):
    config = _config(data_dir, dataset__name="only_train", dataset__test_split=split)
    with pytest.raises(UserError, match="cannot read split") as told:
        datasets.evaluation_sources(config)
    assert not isinstance(told.value, NotMeasurableError)


def test_all_labels_are_read_from_the_records(data_dir):
    source = datasets.open_named(_config(data_dir), "partly:train+unlabeled")
    images = [decode(source.example(i)[0], 1)[..., 0] for i in range(25)]
    digits = [int(np.flatnonzero([np.array_equal(x, y) for y in IMAGES])[0]) for x in images]
    expected = [
        -1 if i >= 20 or digit % 3 == 1 else LABELS[digit] for i, digit in enumerate(digits)
    ]
    assert expected.count(-1) == 12
    assert source.labels().tolist() == expected
    assert [source.example(i)[1] for i in range(25)] == expected
    rows = np.asarray([24, 3, 0, 11])
    assert source.subset(rows).labels().tolist() == [expected[i] for i in rows]
    assert [source.count_classes(n) for n in (1, 2, 99)] == [1, 2, len({*expected} - {-1})]


def test_sources_that_are_not_needed_are_not_opened(tmp_path, data_dir):
    config = _config(data_dir, dataset__path=str(tmp_path / "gone"))
    config.evaluation.update({"train": "partly:train", "test": "versioned:2.1.0:test"})
    datasets.prepare(config)
    found = datasets.evaluation_sources(config)
    assert (len(found.train), len(found.test)) == (20, 6)
    assert len(datasets.evaluation_images(config)) == 6
    config.evaluation.train = ""
    with pytest.raises(UserError, match="no folder"):
        datasets.evaluation_sources(config)


def test_a_test_set_may_be_one_image_of_one_class(tmp_path, data_dir):
    (tmp_path / "test" / "7").mkdir(parents=True)
    (tmp_path / "test" / "7" / "a.png").write_bytes(png(IMAGES[7]))
    config = _config(data_dir, evaluation__train="only_train:train")
    config.evaluation.test = str(tmp_path / "test")
    found = datasets.evaluation_sources(config)
    assert [found.test.example(i)[1] for i in range(len(found.test))] == [7]
    config.evaluation.update({"train": config.evaluation.test, "test": "only_train:train"})
    with pytest.raises(NotMeasurableError, match="two or more class folders"):
        datasets.evaluation_sources(config)


def test_a_feature_that_is_no_image_is_an_error(data_dir):
    config = _config(data_dir, dataset__name="versioned", dataset__image_key="label")
    with pytest.raises(UserError, match=r"'label' of dataset 'versioned' is not an Image"):
        tfds_source.open_split(config.dataset, "train")


def test_images_are_loaded_as_arrays(tmp_path):
    config = from_file(
        "configs/digits.py",
        dataset={"data_dir": str(tmp_path)},
        crop={"size": 8, "eval_resize": 8},
        num_epochs=9,
    )
    digits = sklearn.datasets.load_digits()
    parts = [datasets.load_images(config, split) for split in ("train", "test")]
    assert [len(images) for images, _ in parts] == [1437, 360]
    for images, labels in parts:
        assert images.dtype == np.uint8
        assert images.shape[1:] == (8, 8, 1)
        assert np.array_equal(np.unique(labels), np.arange(10))
    mean = np.concatenate([images for images, _ in parts]).mean() / 255
    assert mean == pytest.approx(digits.images.mean() / 16, abs=0.005)
    few, labels = datasets.load_images(config, "test", at_most=7)
    np.testing.assert_array_equal(few, parts[1][0][:7])
    np.testing.assert_array_equal(labels, parts[1][1][:7])


def test_images_of_an_unlabeled_folder_are_loaded_without_labels(tmp_path):
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), np.full((9, 9), 200, np.uint8))
    config = from_file(
        "configs/digits.py", dataset={"name": "", "path": str(tmp_path)}, crop={"size": 8}
    )
    images, labels = datasets.load_images(config, "train")
    assert images.shape == (2, 8, 8, 1)
    assert np.all(images == 200)
    assert labels.tolist() == [-1, -1]
    with pytest.raises(UserError, match="no images to test with"):
        datasets.load_images(config)
