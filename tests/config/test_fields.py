"""Configs that are shipped, config files, the config of a saved run, and wrong values of fields."""

import os
import runpy
import subprocess
import sys

import pytest
from ml_collections import config_dict
from processes import ROOT

from music_jax import models, registry
from music_jax.config import (
    default_config,
    differences,
    field_names,
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


_MAKE = "from music_jax.config import default_config\ndef get_config():\n    c = default_config()\n"


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


@pytest.mark.parametrize(("name", "most"), [("resnet50", 5), ("tiny_resnet", 3), ("vit_s16", 13)])
def test_only_stages_that_exist_can_be_frozen(name, most):
    config = default_config()
    config.backbone.update({"name": name, "frozen_stages": most})
    validate(config)
    for wrong, expected in ((most + 1, f"most {most} for {name}"), (-1, "least 0")):
        config.backbone.frozen_stages = wrong
        with pytest.raises(UserError, match=rf"backbone\.frozen_stages must be at {expected}"):
            validate(config)


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


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("objective.name", "musik", "must be one of music"),
        ("backbone.name", "resnet51", "must be one of .*resnet50"),
        ("backbone.stem", "big", "must be one of"),
        ("optimizer.name", "adam", "must be one of lars"),
        ("compute_dtype", "float16", "must be one of"),
        ("accumulation_steps", 3, "accumulation_steps must divide batch_size = "),
        ("accumulation_steps", 0, "accumulation_steps must be at least 1"),
        ("sharding.fsdp", 0, "fsdp must be at least 1"),
        ("sharding.fsdp", True, "fsdp must be an integer of .* got True"),
        ("num_decode_threads", True, "num_decode_threads must be an integer of .* got True"),
        ("batch_size", 0, "batch_size must be at least 2"),
        ("batch_size", 1, "batch_size must be at least 2"),
        ("accumulation_steps", 128, "leave at least two samples of batch_size = 128 to each"),
        ("finetune.batch_size", 1, "finetune.batch_size must be at least 2"),
        ("semi_supervised.batch_size", 1, "semi_supervised.batch_size must be at least 2"),
        ("online_probe.batch_size", 1, "online_probe.batch_size must be at least 2"),
        ("num_epochs", -3, "num_epochs must be at least 1"),
        ("optimizer.warmup_epochs", 1000, "warmup_epochs must be in"),
        ("optimizer.base_learning_rate", float("nan"), "must be a finite number"),
        ("objective.temperature", 0.0, "must be positive"),
        ("objective.sigreg_weight", 1.5, r"must be in \[0, 1\]"),
        ("objective.num_slices", 0, "must be at least 1"),
        ("objective.num_points", 1, "must be at least 2"),
        ("objective.t_max", 0.0, "must be positive"),
        ("objective.epsilon_squared", 0.0, "must be positive"),
        ("objective.num_segments", 1, "must be at least 2"),
        ("projector.output_size", 100, "32 segments of 16 units need an embedding of 512.* is 100"),
        ("projector.hidden_sizes", (0,), "at least 1 in each entry"),
        ("crop.scale", (0.5, 2.0), r"must be in \(0, 1\]"),
        ("crop.scale", (0.5, 0.2), "be a pair"),
        ("crop.scale", (0.5,), "be a pair"),
        ("crop.eval_resize", 1, "at least crop.size"),
        ("local_views.count", -1, r"local_views.count must be in \[0, 100\]; got -1"),
        ("local_views.size", 0, "local_views.size must be at least 1"),
        ("local_views.scale", (0.0, 0.3), r"scale must be in \(0, 1\] in each entry"),
        ("local_views.scale", (0.3, 0.05), "be a pair"),
        ("augmentation.local.hue", 0.6, r"local.hue must be in \[0, 0.5\]"),
        ("dataset.num_channels", 0, "must be at least 1"),
        ("dataset.num_channels", 13, r"dataset.mean must have .* = 13 numbers; .*mean=\(\)"),
        ("dataset.pixel_type", "float64", "must be one of uint8, uint16, float32"),
        ("dataset.mean", (0.1, 0.2), "num_channels"),
        ("dataset.std", (0.0,), "positive in each entry"),
        ("dataset.max_skipped_share", 1.5, r"in \[0, 1\]"),
        (
            "augmentation.view_1.flip_probability",
            1.5,
            r"view_1.flip_probability must be in \[0, 1\]",
        ),
        ("augmentation.view_2.hue", 0.6, r"view_2.hue must be in \[0, 0.5\]"),
        ("augmentation.view_2.blur_sigma", (2.0, 0.1), "be a pair"),
        ("augmentation.view_2.scale", (0.0, 1.0), "must be positive in each entry"),
        ("augmentation.view_1.contrast", -0.1, "contrast must be at least 0"),
        ("augmentation.view_1.shear_degrees", 90.0, r"shear_degrees must be in \[0, 89\]"),
        ("optimizer.momentum", 1.0, r"momentum must be in \[0, 1\)"),
        ("optimizer.weight_decay", -1.0, "weight_decay must be at least 0"),
        ("guards.max_dead_units", 1.5, r"max_dead_units must be in \[0, 1\]"),
        ("guards.check_replicas_every_steps", -1, "must be at least 0"),
        ("linear_eval.base_learning_rates", (), "have at least one entry"),
        ("linear_eval.validation_fraction", 1.0, r"in \(0, 1\)"),
        ("evaluation.num_views", 1, "at least 2"),
        ("few_shot.shots", (5, 0), "at least 1 in each entry"),
        ("knn.more_k", (0,), "at least 1 in each entry"),
        ("semi_supervised.fractions", (0.01, 1.5), r"in \(0, 1\]"),
        ("semi_supervised.lists", ("a.txt",), "one entry for each"),
        ("semi_supervised.head_learning_rates", (0.1, -1.0), "positive"),
        ("online_probe.every_steps", 0, "at least 1"),
        ("online.every_steps", -1, "at least 0"),
        ("online.measures", ("knn", "rank"), "must hold some of knn, rankme, lidar; got"),
        ("online.measures", (), "have at least one entry"),
        ("online.num_images", 1, "at least 2"),
        ("checkpoint.every_steps", 0, "at least 1"),
        ("seed", -1, "seed must"),
        ("num_decode_threads", -1, r"num_decode_threads must be in \[1, 1024\]; got -1"),
        ("num_decode_threads", 0, r"num_decode_threads must be in \[1, 1024\]"),
        ("num_decode_threads", 2**20, r"num_decode_threads must be in \[1, 1024\]"),
    ],
)
def test_a_wrong_value_is_named(field, value, message):
    config = from_file("digits")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("backbone.stem", "imagenet", "stem = 'imagenet' is not supported by vit_s16"),
        ("backbone.zero_init_residual", False, "is not supported by vit_s16"),
        ("crop.size", 100, "crop.size must be a multiple of 16 for vit_s16; got 100"),
        ("local_views.size", 100, "local_views.size must be a multiple of 16 for vit_s16; got 100"),
    ],
)
def test_options_and_sizes_that_a_vision_transformer_lacks_are_named(field, value, message):
    config = from_file("imagenet_vit", local_views={"count": 2})
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        validate(config)


def test_fields_of_local_views_count_only_if_there_are_any():
    old, new = default_config(), default_config()
    new.local_views.size, new.augmentation.local.hue = 64, 0.25
    assert differences(old.to_dict(), new.to_dict()) == []
    new.local_views.count = 2
    found = differences(old.to_dict(), new.to_dict())
    names = ["augmentation.local.hue", "local_views.count", "local_views.size"]
    assert [line.partition(":")[0] for line in found] == names
    validate(from_file("imagenet_vit", local_views={"size": 100}))  # no multiple of 16


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match="lacks the field 'accumulation_steps'; a config file"):
        validate(config_dict.ConfigDict({"batch_size": 3}))


_ALONE = """
import sys
from music_jax.config import from_file, validate
validate(from_file("digits", batch_size=64, backbone={"name": "not registered yet"}))
print([m for m in sys.modules if m.startswith("music_jax.")], "jax" in sys.modules)
"""


def test_a_config_is_validated_without_the_packages_that_use_it():
    done = subprocess.run(
        [sys.executable, "-c", _ALONE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith(" False\n")
    for package in ("models", "train", "data", "evaluation", "workdir"):
        assert f"music_jax.{package}" not in done.stdout


def test_the_tables_are_filled_by_the_packages_with_the_choices():
    assert registry.BACKBONES is models.BACKBONES
    assert {"music", "vicreg"} < registry.OBJECTIVES.keys()
    assert {"lars", "adamw"} < registry.OPTIMIZERS.keys()


def test_names_come_with_each_group_before_its_fields():
    names = field_names(default_config())
    assert names.index("augmentation") < names.index("augmentation.view_1")
    assert names.index("augmentation.view_1") < names.index("augmentation.view_1.hue")
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "record", [{"batch_size": {}}, {"bogus": {}}, {"dataset": {"bogus": {}}}, {"dataset.path": "x"}]
)
def test_damaged_records_do_not_fit(record):
    with pytest.raises(UserError, match="the saved config does not fit this version"):
        from_json(record)


def test_statistics_may_be_left_to_a_training_alone():
    config = default_config()
    config.dataset.update(num_channels=13, pixel_type="float32", mean=())
    validate(config)
    with pytest.raises(UserError, match=r"dataset.mean must have .* = 13 numbers; got \(\)$"):
        validate(config, training=False)
    config = from_file("imagenet", dataset={"pixel_type": "uint16"})
    with pytest.raises(UserError, match="be of the images' uint16 values, not of ImageNet's"):
        validate(config)
