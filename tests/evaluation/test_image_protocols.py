"""The linear probe on random crops: what its features are scaled by, and how its rate is chosen."""

import jax.numpy as jnp
import numpy as np
import pytest
from pixel_runs import digits_source, pixel_config, pixel_run
from tfds_sets import IMAGES, LABELS, png

from music_jax.config import set_views
from music_jax.data.sources import Source
from music_jax.evaluation import image_protocols
from music_jax.evaluation.features import SplitFeatures, random_crop_batches
from music_jax.evaluation.image_protocols import full_finetune, random_crop_probe, semi_supervised
from music_jax.evaluation.metrics import linear_probe
from music_jax.evaluation.metrics.linear_probe import Heads, ProbeRecipe, split_for_validation

_ROWS = 40  # to learn from


def _recorded(monkeypatch, heads):
    """Has the probe record what it trains on, and gives it classifiers in place of its own."""
    seen = []

    def fit(batches, recipe, **_):
        seen.append([(np.asarray(x), np.asarray(y)) for x, y in batches])
        rates = len(recipe.base_learning_rates)
        return Heads(jnp.asarray(heads[-rates:]), jnp.zeros((rates, heads.shape[2])))

    monkeypatch.setattr(linear_probe, "fit", fit)
    return seen


def test_features_are_scaled_by_the_training_images(tmp_path, monkeypatch):
    config = pixel_config()
    config.linear_eval.feature_scaling = "standardize"
    train, test = digits_source("train", range(_ROWS)), digits_source("test", range(100, 160))
    run = pixel_run(tmp_path, train, test, config)
    seen = _recorded(monkeypatch, np.eye(64, 10, dtype=np.float32)[None])
    found = random_crop_probe(run, "trained", ProbeRecipe(1, _ROWS, (0.1,)), "probe")
    ((features, labels),) = seen[0]
    raw, tested = (
        (IMAGES[i].reshape(len(i), -1) / 255 - 0.13) / 0.31
        for i in (np.arange(_ROWS), np.arange(100, 160))
    )
    scale = lambda x: (x - raw.mean(0)) / (raw.std(0) + 1e-6)  # noqa: E731
    order = np.lexsort(np.round(features, 2).T)
    expected = np.lexsort(np.round(scale(raw), 2).T)
    np.testing.assert_allclose(features[order], scale(raw)[expected], atol=1e-3)
    np.testing.assert_array_equal(labels[order], LABELS[:_ROWS][expected])
    np.testing.assert_array_equal(found.predictions, scale(tested)[:, :10].argmax(1))


def _lookup(classes):
    """Images with one bright pixel each, and a kernel that gives each image a class of its own."""
    kernel = np.zeros((64, 2), np.float32)
    kernel[np.arange(len(classes)), classes] = 1
    return kernel


def test_the_rate_is_chosen_on_images_that_are_neither_learned_from_nor_tested_on(
    tmp_path, monkeypatch
):
    """One rate is right for the images held out alone, one for the rest, and one for the test.

    Each image is one bright pixel, so that a kernel can give each image any class.
    """
    count, tests = 30, 20
    images = np.zeros((count + tests, 8, 8), np.uint8)
    images.reshape(count + tests, -1)[np.arange(count + tests), np.arange(count + tests)] = 255
    labels = np.arange(count + tests) % 2
    records = [{"image": png(x), "label": int(y)} for x, y in zip(images, labels, strict=True)]
    train = Source("train", records[:count], "image", "label", 2, ("a", "b"))
    test = Source("test", records[count:], "image", "label", 2, ("a", "b"))
    config = pixel_config()
    config.dataset.update({"mean": (0.0,), "std": (1.0,)})
    config.linear_eval.validation_fraction = 0.3
    rest, held_out = split_for_validation(count, 0.3, config.seed)
    heads = []
    for right in (rest, held_out, np.arange(count, count + tests)):
        classes = 1 - labels
        classes[right] = labels[right]
        heads.append(_lookup(classes))
    seen = _recorded(monkeypatch, np.stack(heads))
    run = pixel_run(tmp_path, train, test, config)
    found = random_crop_probe(run, "trained", ProbeRecipe(1, 4, (0.1, 0.2, 0.3)), "probe")
    assert found.base_learning_rate == 0.2
    assert found.top1 == 1.0  # by the last kernel, that of the test
    chosen, final = (np.concatenate([x for x, _ in part]).argmax(1) for part in seen)
    assert set(chosen) <= set(rest)
    assert len(final) == 28  # seven batches of four of all thirty


@pytest.mark.parametrize("flips", [True, False])
def test_crops_are_flipped_where_the_training_flips(flips, tmp_path):
    config = pixel_config()
    set_views(config, flip_probability=0.5 if flips else 0.0)
    run = pixel_run(tmp_path, digits_source("train", range(64)), digits_source("test", range(3)))
    batches = random_crop_batches(
        run.sources.train,
        config,
        run.mesh,
        batch_size=64,
        num_epochs=2,
        seed=0,
        skipped=run.skipped,
    )
    flipped = []
    for images, _ in batches:
        images = np.asarray(images)[..., 0]
        for image in images:
            same = np.any(np.all(image == IMAGES[:64], axis=(1, 2)))
            assert same or np.any(np.all(image[:, ::-1] == IMAGES[:64], axis=(1, 2)))
            flipped.append(not same)
    assert len(flipped) == 128
    # Of 128 fair coins fewer than 45 or more than 83 show heads once in 1,000 times.
    assert 45 <= sum(flipped) <= 83 if flips else not any(flipped)
    first, second = np.split(np.asarray(flipped), 2)
    assert flips == bool(np.any(first != second))  # drawn anew in each epoch


def test_fine_tuning_counts_labels_among_the_best_and_learns_from_labeled_images(
    tmp_path, monkeypatch
):
    ranks = np.asarray([0, 1, 4, 5, 9, 0, 3, 4], np.int32)  # of the labels: logits fall with them
    logits = -np.tile(np.arange(10.0), (8, 1))
    tested = SplitFeatures({"logits": logits}, ranks, np.arange(8))
    monkeypatch.setattr(image_protocols, "finetune", lambda *_, **__: None)
    monkeypatch.setattr(image_protocols, "extract_split", lambda *_, **__: tested)
    monkeypatch.setattr(image_protocols, "rows_of_list", lambda *_: np.asarray([5, 3, 1]))
    config = pixel_config()
    config.semi_supervised.lists = ("list.txt",)
    train = digits_source("train", range(40), unlabeled={3, 7})
    run = pixel_run(tmp_path, train, digits_source("test", range(100, 108)), config)
    expected = {"top1": 2 / 8, "top5": 6 / 8, "num_test": 8}
    whole = full_finetune(run)
    assert whole.pop("without_label")["train"] == 2
    assert whole == expected | {"num_train": 38, "batch_size": 16}
    few = semi_supervised(run)["by_share"]
    assert few == {"20 %": expected | {"num_train": 2, "batch_size": 2, "list": "list.txt"}}
