"""Labels and images of TFDS datasets of all kinds, written by the test."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered
from tfds_sets import GRAY, IMAGES, png

from music_jax.config import default_config
from music_jax.data import tfds_source
from music_jax.errors import UserError

F = tfds.features
_COUNT = 12
_KINDS = {
    "image": GRAY,
    "number": F.Scalar(np.int64),
    "flag": F.Scalar(np.bool_),
    "text": F.Text(),
    "real": F.Scalar(np.float32),
    "id": F.Text(),
    "kind": F.ClassLabel(names=["cat", "dog", "owl"]),
    "binary": F.ClassLabel(names=["no", "yes"]),
    "tags": F.Sequence(F.ClassLabel(names=["red", "green", "blue"])),
    "pair": F.Sequence(F.ClassLabel(names=["a", "b"])),
    "hot": F.Tensor(shape=(4,), dtype=np.int64),
    "fixed": F.Sequence(np.int64, length=2),
    "findings": F.Sequence(F.ClassLabel(names=["uncertain", "positive", "negative"])),
    "attributes": {"smiling": np.bool_, "hat": np.bool_},
    "objects": F.Sequence({"label": F.ClassLabel(names=["x", "y", "z"]), "size": np.int64}),
    "bands": F.Tensor(shape=(8, 8, 5), dtype=np.uint8),
    "b1": F.Tensor(shape=(8, 8), dtype=np.float32),
    "b2": F.Tensor(shape=(4, 4), dtype=np.float32),
}


def _record(i):
    return {
        "image": io.BytesIO(png(IMAGES[i])),
        "number": [-1, 3, 7][i % 3],
        "flag": i % 2 == 1,
        "text": ["", "ant", "bee"][i % 3],
        "real": 0.5,
        "id": f"image {i}",
        "kind": i % 3 if i else -1,
        "binary": i % 2,
        "tags": [[], [2], [0, 2]][i % 3],
        "pair": [[0], [0, 1]][i % 2],
        "hot": [1, 0, -1, i % 2],
        "fixed": [0, i % 2],
        "findings": [1, 2, 0],
        "attributes": {"smiling": i % 2 == 1, "hat": i % 3 == 1},
        "objects": [{"label": k, "size": 1} for k in [[], [1, 1], [0, 2]][i % 3]],
        "bands": np.full((8, 8, 5), i, np.uint8),
        "b1": np.full((8, 8), 1.5, np.float32),
        "b2": np.full((4, 4), 2.5, np.float32),
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    class Kinds(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(_KINDS))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            return ((i, _record(i)) for i in range(_COUNT))

    directory = str(tmp_path_factory.mktemp("tfds"))
    with registered.skip_registration():
        builder = Kinds(data_dir=directory, file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    return directory


def _open(data_dir, **fields):
    dataset = default_config().dataset
    dataset.update({"name": "kinds", "data_dir": data_dir} | fields)
    return tfds_source.open_split(dataset, "train")


def _labels(data_dir, key):
    """Returns the source, and the labels in the order of the images, which TFDS shuffles."""
    source = _open(data_dir, label_key=key)
    order = np.argsort([source.record(i)["bands"][0, 0, 0] for i in range(_COUNT)])
    labels = source.labels()
    for i in range(_COUNT):
        np.testing.assert_array_equal(source.example(i)[1], labels[i])
    return source, labels[order].tolist()


@pytest.mark.parametrize(
    ("key", "names", "labels"),
    [
        ("number", ("3", "7"), [-1, 0, 1, -1]),
        ("flag", ("False", "True"), [0, 1, 0, 1]),
        ("text", ("ant", "bee"), [-1, 0, 1, -1]),
        ("kind", ("cat", "dog", "owl"), [-1, 1, 2, 0]),
        ("attributes/hat", ("False", "True"), [0, 1, 0, 0]),
    ],
)
def test_a_label_of_one_class(data_dir, key, names, labels):
    source, found = _labels(data_dir, key)
    assert (source.class_names, source.multi_label, source.no_classes) == (names, False, "")
    assert found[:4] == labels


@pytest.mark.parametrize(
    ("key", "names", "labels"),
    [
        ("tags", ("red", "green", "blue"), [[0, 0, 0], [0, 0, 1], [1, 0, 1]]),
        ("pair", ("a", "b"), [[1, 0], [1, 1], [1, 0]]),
        ("hot", ("0", "1", "2", "3"), [[1, 0, -1, 0], [1, 0, -1, 1], [1, 0, -1, 0]]),
        ("fixed", ("0", "1"), [[0, 0], [0, 1], [0, 0]]),
        ("findings", ("0", "1", "2"), [[1, 0, -1]] * 3),
        ("attributes", ("hat", "smiling"), [[0, 0], [1, 1], [0, 0]]),
        ("objects/label", ("x", "y", "z"), [[0, 0, 0], [0, 1, 0], [1, 0, 1]]),
        (
            "flag, binary,kind",
            ("flag", "binary: yes", "kind: cat", "kind: dog", "kind: owl"),
            [[0, 0, -1, -1, -1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 1]],
        ),
    ],
)
def test_a_label_of_several_classes(data_dir, key, names, labels):
    source, found = _labels(data_dir, key)
    assert (source.class_names, source.multi_label, source.no_classes) == (names, True, "")
    assert found[:3] == labels
    assert source.labels().dtype == np.int8


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("real", "'real' is a Scalar of float32; labels are a ClassLabel"),
        ("flag,real", "'real' is a Scalar of float32"),
        ("flag,text", "'text' is a Text"),
        ("bands", "'bands' is a Tensor of uint8"),
        ("image", "'image' is a Image"),
        ("objects", "'objects' is a Sequence of FeaturesDict"),
        ("", "no feature ''"),
        ("label", "no feature 'label'"),
    ],
)
def test_other_features_are_no_labels(data_dir, key, reason):
    source = _open(data_dir, label_key=key)
    assert source.num_classes == 0
    assert reason in source.no_classes
    assert source.example(0)[1] == -1


def test_as_many_values_as_images_are_no_classes(data_dir, monkeypatch):
    monkeypatch.setattr("music_jax.data.labels._FEW", 5)
    assert "'id' has 12 values in 12 images" in _open(data_dir, label_key="id").no_classes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_key": "flag,nothing"}, "no feature 'nothing'"),
        ({"label_key": "attributes/nothing"}, "no feature 'attributes/nothing'"),
        ({"label_key": "flag,number"}, "'number' of kinds:train cannot be read: expected 1 elem"),
        ({"image_key": "hot"}, r"'hot'.* is not an Image.*'b1', 'b2', 'bands', 'image'\]"),
        ({"image_key": "b1,b3"}, "no feature 'b3'"),
    ],
)
def test_a_key_that_cannot_be_used_is_an_error(data_dir, fields, message):
    with pytest.raises(UserError, match=message):
        _open(data_dir, **fields)


def test_channels_are_one_feature_or_several(data_dir):
    source = _open(data_dir, image_key="bands", label_key="flag")
    assert source.example(0)[0].shape == (8, 8, 5)
    image = _open(data_dir, image_key="b2, b1", label_key="").record(0)["b2, b1"]
    assert image.shape == (8, 8, 2)
    assert image[..., 0].tolist() == [[2.5] * 8] * 8
    assert image[..., 1].tolist() == [[1.5] * 8] * 8
    both = _open(data_dir, image_key="image,bands", label_key="").record(0)["image,bands"]
    np.testing.assert_array_equal(both[..., 0], IMAGES[both[0, 0, 1]])
    assert (both.shape, both.dtype) == ((8, 8, 6), np.uint8)
