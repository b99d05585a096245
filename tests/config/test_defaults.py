"""The defaults of a config and the descriptions of its fields."""

import pytest

from music_jax.config import default_config, descriptions, field_names, set_views
from music_jax.config.fields import _CHOICES
from music_jax.data.augment import ViewAugmentation, view_augmentations
from music_jax.metrics.scaling import FEATURE_SCALINGS
from music_jax.models.resnet import STEMS
from music_jax.train import train_and_evaluate  # noqa: F401, registers its choices


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
        "local_views.count",
        "local_views.size",
        "local_views.scale",
        "augmentation.local.hue",
        "optimizer.name",
        "optimizer.base_learning_rate",
        "checkpoint.every_steps",
    ):
        assert field in field_names(config)


def test_descriptions_are_the_comments_beside_the_fields():
    found = descriptions()
    assert sorted(found) == sorted(field_names(default_config()))
    groups = {name.rpartition(".")[0] for name in found}
    assert [name for name, text in found.items() if not text and name not in groups] == []
    assert found["batch_size"] == "Global batch size, over all devices and processes."
    assert found["compute_dtype"].startswith("float32 or bfloat16; ")
    assert found["sharding.fsdp"].endswith("or of a machine with GPUs.")
    for view in ("view_2", "local"):
        assert found["augmentation.view_1.hue"] == found[f"augmentation.{view}.hue"] != ""
    assert found["guards"] == "Checks that end a failing training early."


def test_descriptions_name_every_choice():
    found = descriptions()
    for field, known in _CHOICES.items():
        for choice in known:
            assert str(choice) in found[field], field
    assert _CHOICES["backbone.stem"] == tuple(STEMS)
    assert _CHOICES["linear_eval.feature_scaling"] == FEATURE_SCALINGS


def test_by_default_the_views_are_not_augmented():
    assert view_augmentations(default_config()) == (ViewAugmentation(), ViewAugmentation())


def test_all_views_are_set_at_once():
    config = default_config()
    set_views(config, hue=0.25)
    assert {view.hue for view in config.augmentation.values()} == {0.25}
    with pytest.raises(KeyError, match='Did you mean "hue"'):
        set_views(config, huee=0.25)
