"""Parts that a user registers, in this process."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from own_parts import write_examples
from processes import start

import music_jax
import music_jax.train
from music_jax import config as config_lib
from music_jax import registry
from music_jax.config import from_file, validate
from music_jax.data.datasets import evaluation_sources, open_named, training_source
from music_jax.data.decode import decode
from music_jax.data.loader import evaluation_batches
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import NotMeasurableError, UndecodableError, UserError
from music_jax.models.network import init_network, make_network
from music_jax.train.recipe import make_recipe
from music_jax.train.state import abstract_state
from music_jax.train.step import crop_shapes, lower_step

_TABLES = (registry.BACKBONES, registry.DATASETS, registry.OBJECTIVES)


@pytest.fixture(autouse=True)
def _own_tables():
    """Restores the tables after each test."""
    kept = [dict(table) for table in _TABLES]
    yield
    for table, entries in zip(_TABLES, kept, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("modules")).split(":")


@pytest.fixture
def examples(folders, monkeypatch):
    """Imports the examples of the documentation as `--import` does."""
    monkeypatch.setenv("MUSIC_JAX_IMPORT", "my_backbone")
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    for name in ("my_backbone", "my_objective", "my_dataset"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    registry.import_modules("my_objective, my_dataset")


def _config(**fields):
    config = from_file("digits")
    config.backbone.name = "patches"
    config.dataset.update({"name": "stripes", "data_dir": None})
    config.objective.name = "uniformity"
    config.crop.size = config.crop.eval_resize = 16
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"backbone.name": "patch"}, "--import=MODULE; got 'patch'"),
        ({"objective.name": "unity"}, "--import=MODULE; got 'unity'"),
        ({"backbone.options": {"depth": 2}}, "unexpected keyword argument 'depth'"),
        (
            {"backbone.options": {"width": {1, 2}}},
            "config.backbone.options must hold values of JSON",
        ),
        ({"backbone.options": {"width": float("nan")}}, "must hold values of JSON"),
        ({"objective.options": {"power": 2}}, "does not fit the objective 'uniformity'"),
        (
            {"objective.name": "vicreg", "objective.options": {"a": 1}},
            "is for a registered objective",
        ),
        ({"dataset.options": {"size": 2}}, "does not fit the dataset 'stripes'"),
        ({"backbone.remat": True}, "config.backbone.remat is not supported by patches"),
        (
            {"backbone.frozen_stages": 1},
            "config.backbone.frozen_stages is not supported by patches",
        ),
    ],
)
def test_wrong_fields_are_one_clear_error(fields, expected):
    validate(_config())
    with pytest.raises(UserError, match=expected.replace("(", r"\(")):
        validate(_config(**fields))


def test_a_module_that_computes_at_import_is_one_clear_error(tmp_path):
    (tmp_path / "early.py").write_text("import jax.numpy as jnp\nMEAN = jnp.zeros(3)\n")
    process = start(
        "music_jax.evaluate",
        "--import=early",
        "--workdir=absent",
        env={"PYTHONPATH": str(tmp_path)},
    )
    _, err = process.communicate(timeout=100)
    assert (process.returncode, len(err.splitlines())) == (2, 1)
    assert "--import=early computes with JAX when it is imported" in err


@pytest.mark.usefixtures("examples")
def test_an_objective_need_not_be_known_except_to_train():
    validate(_config(**{"objective.name": "of another process"}), training=False)


@pytest.mark.usefixtures("examples")
def test_options_survive_the_record_of_a_run():
    config = _config(**{"backbone.options": {"width": 8, "sizes": (1, 2), "a": {"b": None}}})
    saved = config_lib.from_json(json.loads(config.to_json()))
    assert registry.options(saved.backbone) == {"width": 8, "sizes": [1, 2], "a": {"b": None}}
    assert registry.options(config.backbone) == registry.options(saved.backbone)


def test_names_of_this_package_are_taken():
    for register, name in (
        (music_jax.register_backbone, "resnet50"),
        (music_jax.register_objective, "music"),
    ):
        with pytest.raises(ValueError, match=f"'{name}' is taken"):
            register(name, dict)
        register("mine", dict)
        register("mine", dict)  # as a cell of a notebook does that is run again
    with pytest.raises(ValueError, match="consists of letters"):
        music_jax.register_dataset("a:b", dict)


class _Noisy(nnx.Module):
    """Returns a constant in training mode, with dropout."""

    def __init__(self, *, channels, dtype, rngs):
        self.num_features = 64
        self.scale = nnx.Param(jnp.ones(64))
        self.seen = nnx.Variable(jnp.zeros((), jnp.int32))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, images, *, train, num_views):
        self.seen[...] = self.seen[...] + 1
        features = jnp.ones((len(images), 64)) * self.scale[...][None]
        return self.dropout(features, deterministic=not train)


def test_random_layers_depend_on_the_key_alone_and_variables_are_kept():
    music_jax.register_backbone("noisy", _Noisy)
    config = _config(
        **{"backbone.name": "noisy", "dataset.name": "digits", "objective.name": "music"}
    )
    network = make_network(config)
    assert hash(network) == hash(make_network(config))  # one compiled step serves both
    params, stats = init_network(config, jax.random.key(0))
    assert set(params["backbone"]) == {"scale"}
    views = jnp.zeros((2, 2, 16, 16, 1))
    one, again, other = (
        network.embed(params, stats, views, jax.random.key(k))[0] for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert 0.2 < np.mean(one != other) < 0.8
    assert 0.2 < np.mean(one == 0) < 0.8
    assert network.embed(params, stats, views)[2]["backbone"] == {"seen": 1}
    np.testing.assert_array_equal(network.features(params, stats, views[:, 0]), np.ones((2, 64)))


def test_features_of_another_shape_are_one_clear_error():
    class Wrong(_Noisy):
        def __call__(self, images, *, train, num_views):
            return jnp.ones((len(images), 3))

    music_jax.register_backbone("wrong", Wrong)
    with pytest.raises(UserError, match=r"features of shape \(4, 64\), float32.*got \(4, 3\)"):
        make_network(_config(**{"backbone.name": "wrong"}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda **_: None, "must be a Flax NNX module; got NoneType"),
        (lambda **_: nnx.Dropout(0.5), "must be a module with the attribute num_features"),
        (lambda **_: _OnlyImages(), r"must be a module with __call__\(self, images, \*, train"),
        (lambda **_: _List(), "must return an array; got a list"),
    ],
)
def test_a_backbone_of_another_interface_is_one_clear_error(make, message):
    music_jax.register_backbone("wrong", make)
    with pytest.raises(UserError, match=f"backbone 'wrong' {message}"):
        make_network(_config(**{"backbone.name": "wrong"}))


class _OnlyImages(nnx.Module):
    num_features = 64

    def __call__(self, images):
        return images


class _List(nnx.Module):
    num_features = 64

    def __call__(self, images, *, train, num_views):
        return [images]


@pytest.mark.parametrize(
    "result", [lambda a: a.sum(), lambda a: (a, {}), lambda a: (a.sum(), {"all": a})]
)
def test_an_objective_that_returns_something_else_is_one_clear_error(result):
    music_jax.register_objective("wrong", lambda: lambda a, b: result(a))
    parts = {"objective.name": "wrong", "backbone.name": "tiny_resnet"}
    config = _config(**parts, **{"projector.output_size": 8})
    with pytest.raises(UserError, match="objective 'wrong' must return a pair: the loss"):
        make_recipe(config, 4)


def test_values_to_search_are_sequences():
    with pytest.raises(ValueError, match=r"search\['weight'\] must be a sequence"):
        music_jax.register_objective("mine", dict, search={"weight": 3})
    with pytest.raises(ValueError, match="consists of letters"):
        music_jax.register_objective(3, dict)


class _Images:
    """A dataset whose records are counted."""

    def __init__(self, images, given=None, **attributes):
        self.images, self.given, self.reads = images, given, 0
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        record = {"image": self.images[index]}
        return record if self.given is None else record | {"label": self.given[index]}


def _source(records, config=None):
    music_jax.register_dataset("mine", lambda split: records if split == "train" else None)
    config = config or _config(**{"dataset.name": "mine"})
    return training_source(config)


def test_arrays_are_read_as_they_are_and_files_are_decoded():
    import cv2

    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1), np.uint8)
    files = [cv2.imencode(".png", image)[1].tobytes() for image in images]
    for records in (list(images), files):
        source = _source(_Images(records, [0, None, 1, -1]))
        assert (source.num_classes, source.labels().tolist()) == (2, [0, -1, 1, -1])
        (batch,) = evaluation_batches(
            source,
            size=16,
            resize_shorter_side=16,
            channels=1,
            batch_size=4,
            positions=np.arange(4),
        )
        np.testing.assert_array_equal(batch["images"], images)
        assert batch["label"].tolist() == [0, -1, 1, -1]


def test_labels_as_an_attribute_save_reading_the_records():
    images, labels = np.zeros((50, 8, 8, 1), np.uint8), np.arange(50) % 7 - 1
    records = _Images(images, labels=labels, class_names="abcdef")
    source = _source(records)
    assert source.num_classes == 6
    assert source.class_names == tuple("abcdef")
    assert records.reads == 1  # whose channels are checked


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint64, np.int8, np.int64])
@pytest.mark.parametrize("as_attribute", [True, False])
def test_labels_may_be_of_any_type_of_integers(kind, as_attribute):
    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.asarray([0, 2, 1, 0], kind)
    records = _Images(images, None if as_attribute else list(labels))
    if as_attribute:
        records.labels = labels
    source = _source(records)
    assert (source.num_classes, source.labels().tolist()) == (3, [0, 2, 1, 0])


@pytest.mark.parametrize("as_attribute", [True, False])
def test_negative_labels_are_none_and_huge_ones_are_refused(as_attribute):
    def source(labels):
        images = np.zeros((len(labels), 8, 8, 1), np.uint8)
        more = {"labels": np.asarray(labels)} if as_attribute else {"given": labels}
        return _source(_Images(images, **more))

    found = source([0, -999, 1, -2])
    assert (found.num_classes, found.labels().tolist()) == (2, [0, -1, 1, -1])
    with pytest.raises(UserError, match=f"has the label {2**40}; labels are the numbers of"):
        source([0, 2**40])


def test_class_names_may_be_numbers_or_none():
    images = np.zeros((2, 8, 8, 1), np.uint8)
    assert _source(_Images(images, [0, 1], class_names=[7, 8])).class_names == ("7", "8")
    assert _source(_Images(images, [0, 1], class_names=None)).class_names == ()


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([[1, 0, -1], [0, 0, 1]], "", [[1, 0, -1], [0, 0, 1]]),
        (np.asarray([[1, 0], [1, 1]]), "", [[1, 0], [1, 1]]),
        ([np.asarray([True, False]), None], "ab", [[1, 0], [-1, -1]]),
        ([[2], [0, 1], [], -1], "abc", [[0, 0, 1], [1, 1, 0], [0, 0, 0], [-1, -1, -1]]),
        ([[1, 0, 1], (2, 0)], "abc", [[1, 0, 1], [1, 0, 1]]),
    ],
)
@pytest.mark.parametrize("as_attribute", [True, False])
def test_an_image_may_have_several_classes(labels, names, expected, as_attribute):
    records = _Images(np.zeros((len(labels), 8, 8, 1), np.uint8), [*labels])
    if names:
        records.class_names = names
    if as_attribute:
        records.labels = labels
    source = _source(records)
    assert (source.multi_label, source.num_classes) == (True, len(expected[0]))
    assert source.class_names == tuple(names or map(str, range(len(expected[0]))))
    assert source.labels().tolist() == expected
    assert [source.example(i)[1].tolist() for i in range(len(labels))] == expected
    others = source.no_labels(2)
    assert (others.dtype, others.shape) == (np.int8, (2, len(expected[0])))


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([{"image": b"", "label": [1]}, {"image": b"", "label": [0, 2]}], "attribute class_names"),
        (_Images([b""], [[1]], class_names="ab"), "expected 2 elements of -1, 0 or 1; got"),
        ([{"image": b"", "label": [1, 2]}] * 2, "the label 0 of mine:train cannot be used: expe"),
        ([{"image": b"", "label": [0.5, 1]}] * 2, "the label 0 of .*float64"),
        (_Images([b""], labels=[[0, 3]], class_names="abc"), "numbers of classes below 3"),
        (_Images([b""], labels=np.eye(2, dtype=int)), "must be 1 integers"),
        (7, "must give an object with len"),
        ([], "has no images"),
        (["a"], "must be dictionaries with the key 'image'"),
        ([{"image": b""}, {"image": b"", "label": 0}, "a"], "must be dictionaries"),
        ([{"image": b"", "label": 0.5}] * 2, "must be 2 integers"),
        (_Images([b""], labels=[0, 1]), "must be 1 integers"),
        (_Images([b""], labels=[3], class_names=("a", "b")), "has the label 3, but 2 class names"),
    ],
)
def test_wrong_records_are_one_clear_error(records, expected):
    with pytest.raises(UserError, match=expected):
        _source(records)


def test_arrays_that_are_no_images_are_told():
    images = [np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8), np.float32), np.zeros(8, np.uint8)]
    with pytest.raises(UserError, match="4 channels, not 1"):
        _source(_Images(images[:1]))
    with pytest.raises(UserError, match="values are float32, not uint8"):
        _source(_Images(images[1:]))
    with pytest.raises(Exception, match="neither an encoded image nor an array of numbers"):
        _source(_Images(images[2:])).example(0)


def _two(train, test):
    music_jax.register_dataset("mine", {"train": train, "test": test}.get)
    return evaluation_sources(_config(**{"dataset.name": "mine"}))


def test_the_labels_of_two_splits_mean_the_same_classes():
    images = np.zeros((4, 8, 8, 1), np.uint8)
    assert _two(_Images(images, [0, 1, 2, 0]), _Images(images, [0, 1, 1, 0])).test.num_classes == 3
    with pytest.raises(UserError, match="mine:test has labels of 4 classes, mine:train of 3"):
        _two(_Images(images, [0, 1, 2, 0]), _Images(images, [0, 3, 1, 0]))
    named = _Images(images, [0, 1, 0, 1], class_names=("a", "b"))
    with pytest.raises(UserError, match="mine:test has classes that mine:train does not have: 0, "):
        _two(named, _Images(images, [0, 1, 0, 1]))
    numbers = _Images(images, [0, 1, 2, 0], class_names=("2", "0", "1"))  # as in packed images
    assert _two(numbers, _Images(images, [0, 1, 0, 1])).test.labels().tolist() == [1, 2, 1, 2]
    for names in ("01", "0"):  # Images without a label stay what they are.
        test = _Images(images, labels=np.array([0, 0, -1, -2]), class_names=names)
        assert _two(numbers, test).test.labels().tolist() == [1, 1, -1, -1]
    swapped = _Images(images, [0, 1, 0, 1], class_names=("b", "a"))
    assert _two(named, swapped).test.labels().tolist() == [1, 0, 1, 0]


class _Broken(_Images):
    def __getitem__(self, index):
        if index == 1:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_a_record_that_cannot_be_read_is_skipped():
    source = _source(_Broken(np.zeros((4, 8, 8, 1), np.uint8), [0, 1, 1, 0]))
    assert source.labels().tolist() == [0, -2, 1, 0]
    assert source.num_classes == 2
    with pytest.raises(UndecodableError, match="the disk is gone"):
        source.example(1)


def test_a_dataset_that_cannot_be_opened_is_one_clear_error():
    def missing(split):
        raise FileNotFoundError(2, "No such file", "images.npy")

    music_jax.register_dataset("mine", missing)
    with pytest.raises(UserError, match=r"cannot open mine:train: .*images\.npy"):
        training_source(_config(**{"dataset.name": "mine"}))


def test_gray_and_color_arrays_are_converted_as_files_are():
    import cv2

    gray, color = (np.random.default_rng(0).integers(0, 256, (9, 7, c), np.uint8) for c in (1, 3))
    for image, channels in ((gray, 3), (color, 1)):
        file = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
        np.testing.assert_allclose(decode(image, channels), decode(file, channels), atol=1)


@pytest.mark.parametrize("name", ["step", "online_seconds"])
def test_scalars_of_an_objective_do_not_take_the_names_of_the_training(name):
    music_jax.register_objective("mine", lambda: lambda a, b: (jnp.sum(a), {name: jnp.sum(b)}))
    config = _config(**{"objective.name": "mine", "backbone.name": "tiny_resnet"})
    recipe, mesh = make_recipe(config, 1), make_data_mesh(1)
    with pytest.raises(UserError, match=f"the objective's scalars include '{name}'"):
        lower_step(recipe, abstract_state(config, recipe.optimizer), mesh, crop_shapes(config))


def test_splits_that_are_absent():
    _source(_Images(np.zeros((5, 8, 8, 1), np.uint8), [0, 1, 0, 1, 0]))
    config = _config(**{"dataset.name": "mine"})
    with pytest.raises(NotMeasurableError, match="mine has no split 'test'"):
        evaluation_sources(config)
    config.evaluation.test = "mine:train"
    assert evaluation_sources(config).test.name == "mine:train"
    config.dataset.test_split = config.dataset.train_split = "validation"
    with pytest.raises(UserError, match="the dataset 'mine' has no split 'validation'"):
        training_source(config)
    assert len(open_named(config, "mine:train")) == 5


def test_a_dataset_of_another_process_names_the_flag():
    config = _config(**{"dataset.name": "elsewhere", "dataset.options": {"a": 1}})
    with pytest.raises(UserError, match=r"'elsewhere' is not registered.*--import=MODULE"):
        training_source(config)


def test_images_that_change_have_another_fingerprint():
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
    first = _source(_Images(images)).fingerprint(times=False)
    assert _source(_Images(images.copy())).fingerprint(times=True) == first
    assert _source(_Images(images[::-1])).fingerprint(times=False) != first
    assert _source(_Images(images, [0, 1, 2] * 3)).fingerprint(times=False) != first
