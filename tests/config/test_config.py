"""The configs that are shipped, and what a config must not say."""

import pathlib
import runpy

import pytest
from ml_collections import config_dict

from music_jax.config import default_config, differences, from_file, from_json, validate
from music_jax.config.values import field_names
from music_jax.errors import UserError
from music_jax.models.network import make_network
from music_jax.workdir.run_config import as_json

_CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


def _load(path):
    return runpy.run_path(str(path))["get_config"]()


def _config():
    return _load(next(path for path in _CONFIGS if path.stem == "digits"))


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_what_it_is(path):
    config = _load(path)
    validate(config)
    network = make_network(config)
    objective = config.objective
    assert network.num_embedding == objective.num_segments * objective.units_per_segment
    for word in ("Paper:", "Expected:", "Hardware and time:", "Command:", path.name):
        assert word in runpy.run_path(str(path))["__doc__"]


def test_imagenet_is_the_recipe_of_the_paper():
    config = _load(next(path for path in _CONFIGS if path.stem == "imagenet"))
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
        ("batch_size", 0, "batch_size must be at least 2"),
        ("batch_size", 1, "batch_size must be at least 2: it is normalized as a whole"),
        ("accumulation_steps", 128, "leave two samples or more of batch_size = 128 to each"),
        ("finetune.batch_size", 1, "finetune.batch_size must be at least 2"),
        ("semi_supervised.batch_size", 1, "semi_supervised.batch_size must be at least 2"),
        ("online_probe.batch_size", 1, "online_probe.batch_size must be at least 2"),
        ("num_epochs", -3, "num_epochs must be at least 1"),
        ("optimizer.warmup_epochs", 1000, "warmup_epochs must be in"),
        ("optimizer.base_learning_rate", float("nan"), "must be a finite number"),
        ("objective.temperature", 0.0, "must be positive"),
        ("objective.num_segments", 1, "must be at least 2"),
        ("projector.output_size", 100, "32 segments of 16 units need an embedding of 512.* is 100"),
        ("projector.hidden_sizes", (0,), "positive sizes"),
        ("crop.scale", (0.5, 2.0), "pair"),
        ("crop.eval_resize", 1, "at least crop.size"),
        ("dataset.num_channels", 2, "must be one of 1, 3"),
        ("dataset.mean", (0.1, 0.2), "num_channels"),
        ("dataset.std", (0.0,), "positive"),
        ("dataset.max_skipped_share", 1.5, r"in \[0, 1\]"),
        ("augmentation.view_1.flip_probability", 1.5, "flip_probability"),
        ("linear_eval.base_learning_rates", (), "one or more"),
        ("linear_eval.validation_fraction", 1.0, r"in \(0, 1\)"),
        ("evaluation.num_views", 1, "at least 2"),
        ("few_shot.shots", (5, 0), "positive numbers"),
        ("knn.more_k", (0,), "positive numbers"),
        ("semi_supervised.fractions", (0.01, 1.5), r"in \(0, 1\]"),
        ("semi_supervised.lists", ("a.txt",), "one entry for each"),
        ("semi_supervised.head_learning_rates", (0.1, -1.0), "positive"),
        ("online_probe.every_steps", 0, "at least 1"),
        ("checkpoint.every_steps", 0, "at least 1"),
        ("seed", -1, "seed must"),
        ("num_decode_threads", -1, r"num_decode_threads must be in \[1, 1024\] or unset.*got -1"),
        ("num_decode_threads", 0, r"num_decode_threads must be in \[1, 1024\]"),
        ("num_decode_threads", 2**20, r"num_decode_threads must be in \[1, 1024\]"),
    ],
)
def test_a_value_that_cannot_be_meant_is_named(field, value, message):
    config = _config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("backbone.stem", "imagenet", "stem = 'imagenet' means nothing to vit_s16; leave it unset"),
        ("backbone.zero_init_residual", False, "means nothing to vit_s16"),
        ("crop.size", 100, "crop.size must be a multiple of 16 for vit_s16; got 100"),
    ],
)
def test_what_a_vision_transformer_cannot_take_is_named(field, value, message):
    config = _load(next(path for path in _CONFIGS if path.stem == "imagenet_vit"))
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        validate(config)


def test_a_config_survives_its_json():
    config = _config()
    assert as_json(from_json(as_json(config))) == as_json(config)


@pytest.mark.parametrize("record", [{"bath_size": 3}, {"batch_size": "many"}, {"objective": 3}])
def test_a_damaged_saved_config_is_an_error(record):
    with pytest.raises(UserError, match="saved config"):
        from_json(record)


def test_differences_name_what_is_trained_and_pass_over_the_rest():
    old, new = as_json(_config()), as_json(_config())
    new["optimizer"]["base_learning_rate"] = 7.0
    new["checkpoint"]["every_steps"] = 3
    new["dataset"]["data_dir"] = "elsewhere"
    new["sharding"]["fsdp"] = 2
    new["backbone"]["remat"] = True
    found = differences(old, new)
    assert len(found) == 1
    assert "optimizer.base_learning_rate" in found[0]
    assert "7.0 now" in found[0]


def test_every_field_of_the_interface_is_there():
    config = default_config()
    for field in (
        "seed",
        "batch_size",
        "num_epochs",
        "objective.name",
        "objective.num_segments",
        "objective.units_per_segment",
        "dataset.name",
        "backbone.name",
        "projector.hidden_sizes",
        "optimizer.name",
        "optimizer.base_learning_rate",
        "checkpoint.every_steps",
    ):
        assert field in field_names(config)


def test_a_config_file_with_other_values_keeps_the_rest():
    config = from_file("configs/digits.py", num_epochs=3, objective={"num_segments": 7})
    assert (config.num_epochs, config.objective.num_segments) == (3, 7)
    assert from_file("configs/digits.py", **{"objective.num_segments": 7}).objective == (
        config.objective
    )
    assert config.objective.units_per_segment == 16
    validate(from_file("configs/digits.py"))


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("configs/nowhere.py", {}, "'configs/nowhere.py' is no config file"),
        ("setup.cfg", {}, "is no config file"),
        ("tests/small_runs.py", {}, "is no config file"),
        ("configs/digits.py", {"num_epoch": 3}, "num_epoch"),
        ("configs/digits.py", {"objective": {"segments": 3}}, "segments"),
        ("configs/digits.py", {"num_epochs": "many"}, "config.num_epochs must be of type int; got"),
        ("configs/digits.py", {"num_epochs": True}, "config.num_epochs must be a number; got True"),
        ("configs/digits.py", {"num_epochs": None}, "config.num_epochs must be of type int"),
        ("configs/digits.py", {"objective": "vicreg"}, "config.objective is a group of fields and"),
        ("configs/digits.py", {"objective": None}, "config.objective is a group of fields and"),
        ("configs/digits.py", {"augmentation": {"view_1": 1}}, "config.augmentation.view_1 is a"),
        ("configs/digits.py", {"dataset": {"path": 3}}, "config.dataset.path must be of type str"),
        ("configs/digits.py", {"dataset": {"data_dir": 3}}, "dataset.data_dir must be of type str"),
        ("configs/digits.py", {"seed": {"x": 1}}, "config.seed must be of type int"),
        (
            "configs/digits.py",
            {"crop": {"scale": ("a", 1)}},
            "config.crop.scale must be a tuple of",
        ),
        ("configs/digits.py", {"objective.nam": "x"}, "the nearest known one is 'objective.name'"),
    ],
)
def test_a_config_file_or_a_field_that_is_none_is_named(path, fields, message):
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
def test_what_a_config_file_does_wrong_is_told_in_a_line(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        from_file(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400  # not all the fields that there are


def test_a_config_that_lacks_fields_is_told():
    with pytest.raises(UserError, match="lacks the field 'accumulation_steps'; a config file"):
        validate(config_dict.ConfigDict({"batch_size": 3}))
