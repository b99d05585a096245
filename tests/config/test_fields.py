"""The fields of a config, and wrong values of them."""

import subprocess
import sys

import pytest
from ml_collections import config_dict
from processes import ROOT

from music_jax import models, registry
from music_jax.config import (
    default_config,
    field_names,
    from_file,
    validate,
)
from music_jax.errors import UserError
from music_jax.train import train_and_evaluate  # noqa: F401, registers its choices


@pytest.mark.parametrize(("name", "most"), [("resnet50", 5), ("tiny_resnet", 3), ("vit_s16", 13)])
def test_only_stages_that_exist_can_be_frozen(name, most):
    config = default_config()
    config.backbone.update({"name": name, "frozen_stages": most})
    validate(config)
    for wrong, expected in ((most + 1, f"most {most} for {name}"), (-1, "least 0")):
        config.backbone.frozen_stages = wrong
        with pytest.raises(UserError, match=rf"backbone\.frozen_stages must be at {expected}"):
            validate(config)


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


def test_statistics_may_be_left_to_a_training_alone():
    config = default_config()
    config.dataset.update(num_channels=13, pixel_type="float32", mean=())
    validate(config)
    with pytest.raises(UserError, match=r"dataset.mean must have .* = 13 numbers; got \(\)$"):
        validate(config, training=False)
    config = from_file("imagenet", dataset={"pixel_type": "uint16"})
    with pytest.raises(UserError, match="be of the images' uint16 values, not of ImageNet's"):
        validate(config)
