"""Configs that are shipped, config files, and the configs of saved runs."""

import os
import runpy

import pytest
from processes import ROOT

from music_jax.config import (
    default_config,
    differences,
    from_file,
    from_json,
    normalize_path,
    shipped_configs,
    validate,
)
from music_jax.errors import UserError
from music_jax.models.network import make_network
from music_jax.train import train_and_evaluate  # noqa: F401, registers its choices
from music_jax.workdir.run_config import as_json

_MAKE = "from music_jax.config import default_config\ndef get_config():\n    c = default_config()\n"


@pytest.mark.parametrize("path", shipped_configs().values(), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_documented(path):
    config = from_file(path)
    validate(config)
    network = make_network(config)
    objective = config.objective
    assert network.num_embedding == objective.num_segments * objective.units_per_segment
    for word in ("Paper:", "Expected:", "Hardware and time:", "Command:", path.name):
        assert word in runpy.run_path(str(path))["__doc__"]


def test_imagenet_is_the_recipe_of_the_paper():
    config = from_file("imagenet")
    assert (config.batch_size, config.num_epochs) == (2048, 100)
    assert (config.objective.num_segments, config.objective.units_per_segment) == (102, 80)
    assert tuple(config.projector.hidden_sizes) == (8192,)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.base_learning_rate) == ("lars", 0.6)
    assert (optimizer.weight_decay, optimizer.warmup_epochs, optimizer.final_scale) == (
        1e-6,
        10,
        1e-3,
    )
    first, second = config.augmentation.view_1, config.augmentation.view_2
    for view in (first, second):
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (view.jitter_probability, view.grayscale_probability) == (0.8, 0.2)
        assert (view.flip_probability, tuple(view.blur_sigma)) == (0.5, (0.1, 2.0))
    assert (first.blur_probability, second.blur_probability) == (1.0, 0.1)
    assert (first.solarize_probability, second.solarize_probability) == (0.0, 0.2)


def test_a_shipped_config_is_found_by_its_name_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert from_file("cifar100").dataset.name == "cifar100"
    assert {path.parent for path in shipped_configs().values()} == {ROOT / "configs"}
    assert shipped_configs().keys() == {
        name.removesuffix(".py") for name in os.listdir(ROOT / "configs") if name.endswith(".py")
    }
    # A file of that name comes first.
    (tmp_path / "mnist5k").write_text("from music_jax.config import default_config as get_config")
    assert not from_file("mnist5k").dataset.name


def test_fields_that_are_not_given_keep_the_values_of_the_file():
    config = from_file("configs/digits.py", num_epochs=3, objective={"num_segments": 7})
    assert (config.num_epochs, config.objective.num_segments) == (3, 7)
    assert from_file("configs/digits.py", **{"objective.num_segments": 7}).objective == (
        config.objective
    )
    assert config.objective.units_per_segment == 16


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("configs/nowhere.py", {}, "there is no config file 'configs/nowhere.py'; give the path"),
        ("mnist", {}, "no config file 'mnist'; .* one of the names cifar10, .*mnist5k, shapes"),
        ("setup.cfg", {}, "is not a config file"),
        ("tests/small_runs.py", {}, "is not a config file"),
        ("configs/digits.py", {"num_epoch": 3}, "num_epoch"),
        ("configs/digits.py", {"objective": {"segments": 3}}, "segments"),
        ("configs/digits.py", {"num_epochs": "many"}, "config.num_epochs must be of type int; got"),
        (
            "configs/digits.py",
            {"num_epochs": True},
            "config.num_epochs must be an integer of at most 4294967296; got True",
        ),
        (
            "configs/digits.py",
            {"num_epochs": None},
            "config.num_epochs must be an integer of .* got None",
        ),
        ("configs/digits.py", {"objective": "vicreg"}, "config.objective is a group of fields and"),
        ("configs/digits.py", {"objective": None}, "config.objective is a group of fields and"),
        ("configs/digits.py", {"augmentation": {"view_1": 1}}, "config.augmentation.view_1 is a"),
        ("configs/digits.py", {"dataset": {"path": 3}}, "config.dataset.path must be of type str"),
        ("configs/digits.py", {"dataset": {"data_dir": 3}}, "dataset.data_dir must be of type str"),
        ("configs/digits.py", {"seed": {"x": 1}}, "config.seed must be of type int"),
        (
            "configs/digits.py",
            {"crop": {"scale": ("a", 1)}},
            "config.crop.scale must be a tuple of numbers",
        ),
        ("configs/digits.py", {"objective.nam": "x"}, "the nearest known one is 'objective.name'"),
    ],
)
def test_a_wrong_config_file_or_field_is_named(path, fields, message):
    with pytest.raises(UserError, match=message):
        from_file(path, **fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_MAKE + "    c.batchsize = 3", 'fails: .*"batchsize".* Did you mean "batch_size"'),
        (_MAKE + "    c.batch_size = 'x'", "fails: TypeError: .*'batch_size'"),
        (_MAKE + "    c.batch_size = 3", "must return a config, .*; got None"),
        ("def get_config(): return {'seed': 0}", "must return a config, .*; got {'seed': 0}"),
    ],
)
def test_a_mistake_in_a_config_file_is_described_in_one_line(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        from_file(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400  # not all the fields that there are


def test_a_config_survives_its_json():
    config = from_file("digits")
    assert as_json(from_json(as_json(config))) == as_json(config)


@pytest.mark.parametrize("record", [{"bath_size": 3}, {"batch_size": "many"}, {"objective": 3}])
def test_a_damaged_saved_config_is_an_error(record):
    with pytest.raises(UserError, match="saved config"):
        from_json(record)


def test_differences_exclude_free_fields():
    old, new = as_json(from_file("digits")), as_json(from_file("digits"))
    new["optimizer"]["base_learning_rate"] = 7.0
    new["checkpoint"]["every_steps"] = 3
    new["dataset"]["data_dir"] = "elsewhere"
    new["sharding"]["fsdp"] = 2
    new["backbone"]["remat"] = True
    found = differences(old, new)
    assert len(found) == 1
    assert "optimizer.base_learning_rate" in found[0]
    assert "7.0 now" in found[0]


def test_spellings_of_one_folder_do_not_differ():
    old, new = (
        {"dataset": {"path": path}} for path in ("~/photos/", os.path.expanduser("~/./photos"))
    )
    assert not differences(old, new)
    assert differences(old, {"dataset": {"path": "photos"}})
    assert not differences({"backbone": {"init_from": "a/"}}, {"backbone": {"init_from": "./a"}})
    assert differences({"dataset": {"path": ""}}, {"dataset": {"path": "."}})


def test_fields_of_earlier_versions_that_did_not_change_the_training_are_dropped():
    record = as_json(from_file("digits"))
    assert from_json(record | {"retrieval": {"max_gallery": 9}}) == from_file("digits")
    assert not differences(record | {"clustering": {"num_starts": 3}}, record)


@pytest.mark.parametrize("path", ["~/a/b/", "~//a/./b", "/home/me/a/c/../b", "/home/me/a/b"])
def test_all_spellings_of_a_folder_give_one_path(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert normalize_path(path) == "/home/me/a/b"


@pytest.mark.parametrize(
    "name", ["", "photos", "cifar10:train[:50%]", "gs://bucket//a/", "imagenet/c:1.0.0:test"]
)
def test_names_of_datasets_and_buckets_are_not_changed(name):
    assert normalize_path(name) == name


def test_fields_of_local_views_count_only_if_there_are_any():
    old, new = default_config(), default_config()
    new.local_views.size, new.augmentation.local.hue = 64, 0.25
    assert differences(old.to_dict(), new.to_dict()) == []
    new.local_views.count = 2
    found = differences(old.to_dict(), new.to_dict())
    names = ["augmentation.local.hue", "local_views.count", "local_views.size"]
    assert [line.partition(":")[0] for line in found] == names
    validate(from_file("imagenet_vit", local_views={"size": 100}))  # no multiple of 16


@pytest.mark.parametrize(
    "record", [{"batch_size": {}}, {"bogus": {}}, {"dataset": {"bogus": {}}}, {"dataset.path": "x"}]
)
def test_damaged_records_do_not_fit(record):
    with pytest.raises(UserError, match="the saved config does not fit this version"):
        from_json(record)
