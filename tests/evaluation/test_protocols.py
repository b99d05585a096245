"""The protocols on images of which some, or all, have no label, or which are too few."""

import jax
import numpy as np
import pytest
from pixel_runs import digits_source, pixel_config, pixel_run

from music_jax.errors import DivergedError, UserError
from music_jax.evaluation.runner import measure

_LABELED = ("linear", "knn", "fewshot", "retrieval", "clustering", "semi", "finetune")
_TRAIN, _TEST = range(100), range(100, 150)
_NO_LABEL = frozenset(range(0, 150, 3))  # 34 to learn from and 16 to test on


@pytest.fixture(autouse=True)
def _promotion():
    """optax's schedules need the standard one."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    """A run with images of which every third has no label, and one with the others alone."""
    directory = tmp_path_factory.mktemp("partly")
    found = []
    for name, left in (("mixed", frozenset()), ("labeled", _NO_LABEL)):
        train, test = (
            digits_source(split, [i for i in rows if i not in left], unlabeled=_NO_LABEL)
            for split, rows in (("train", _TRAIN), ("test", _TEST))
        )
        found.append(pixel_run(directory / name, train, test))
    return found


@pytest.mark.parametrize("name", ["linear, fixed", *_LABELED])
def test_figures_are_those_of_the_labeled_images_alone(partly, name, capsys):
    counts = {"test": 16} if name == "clustering" else {"train": 34, "test": 16}
    said = " and ".join(f"{count} {split} images" for split, count in counts.items())
    name, _, fixed = name.partition(", ")
    found = []
    for run in partly:
        run.config.linear_eval.random_crops = not fixed
        found.append(measure(run, [name], again=True)[name])
        line = f"{name}: {said} without a label were left out"
        assert (line in capsys.readouterr().out) == (run is partly[0])
    mixed, labeled = found
    assert mixed.pop("without_label") == counts
    assert "without_label" not in labeled
    assert mixed.pop("images_fingerprint") != labeled.pop("images_fingerprint")
    assert mixed == labeled


def test_what_needs_no_labels_is_measured_on_all_images(partly):
    mixed, labeled = (measure(run, ["label_free", "segments"], again=True) for run in partly)
    for name in ("label_free", "segments"):
        assert (mixed[name]["num_images"], labeled[name]["num_images"]) == (50, 34)
        assert "without_label" not in mixed[name]


def test_without_any_label_only_what_needs_none_is_measured(tmp_path, capsys):
    train = digits_source("train", _TRAIN)
    run = pixel_run(tmp_path, train, digits_source("test", _TEST, unlabeled=_TEST))
    names = ["knn", "finetune", "linear", "segments"]
    assert list(measure(run, names)) == ["segments"]
    assert "not measured: knn, finetune, linear: the images of test" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"measured: knn, fewshot: .* have labels of 0 classes"):
        measure(run, ["knn", "fewshot"])


@pytest.mark.parametrize("name", _LABELED)
def test_one_class_to_learn_from_is_an_error(tmp_path, name):
    zeros = np.flatnonzero(np.arange(30) % 10 == 0)  # the digits begin with 0 to 9, three times
    run = pixel_run(tmp_path, digits_source("train", zeros), digits_source("test", [30]))
    with pytest.raises(UserError, match=r"nothing can be measured: .* classes"):
        measure(run, [name])


@pytest.mark.parametrize("name", ["label_free", "segments"])
def test_one_image_is_too_few_for_what_compares_images(tmp_path, name):
    run = pixel_run(tmp_path, digits_source("train", [0, 1]), digits_source("test", [30]))
    with pytest.raises(UserError, match="two images or more are needed; test has 1"):
        measure(run, [name])


def test_few_images_are_measured_with_all_of_them(tmp_path):
    """Fewer than k, than shots, than a batch, than devices; the right values by hand."""
    train, test = digits_source("train", [0, 1, 2]), digits_source("test", [10])  # a 0
    found = measure(
        pixel_run(tmp_path, train, test),
        ["linear", "knn", "fewshot", "retrieval", "finetune"],
    )
    for k in ("10", "20", "200"):
        assert found["knn"]["top1_by_k"][k] == 1.0
    assert found["fewshot"]["top1_by_shots"]["2"]["draws"] == [1.0, 1.0]
    assert found["retrieval"] | {"map": 1.0, "num_gallery": 3} == found["retrieval"]
    assert (found["linear"]["num_train"], found["linear"]["num_test"]) == (3, 1)
    assert (found["finetune"]["batch_size"], found["finetune"]["num_train"]) == (3, 3)


@pytest.mark.parametrize("random_crops", [True, False])
@pytest.mark.parametrize("rates", [(1e37,), (3e36, 1e37)])
def test_a_linear_probe_that_diverged_is_an_error_and_the_others_are_measured(
    tmp_path, rates, random_crops
):
    run = pixel_run(tmp_path, digits_source("train", _TRAIN), digits_source("test", _TEST))
    run.config.linear_eval.update({"base_learning_rates": rates, "random_crops": random_crops})
    with pytest.raises(
        DivergedError, match=r"linear probe, trained: .*base_learning_rates"
    ) as told:
        measure(run, ["linear", "retrieval"])
    assert told.value.exit_code == 3
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["retrieval.json"]


@pytest.mark.parametrize("random_crops", [True, False])
def test_a_learning_rate_that_diverged_loses(tmp_path, random_crops):
    run = pixel_run(tmp_path, digits_source("train", _TRAIN), digits_source("test", _TEST))
    run.config.linear_eval.update(
        {"base_learning_rates": (1e37, 0.1), "random_crops": random_crops}
    )
    found = measure(run, ["linear"])["linear"]
    assert found["learning_rate"] == pytest.approx(0.1 * 16 / 256)
    assert found["top1"] > 0.5


def test_a_baseline_whose_probe_diverged_is_named(tmp_path):
    config = pixel_config()
    config.dataset.std = (1e-3,)
    train, test = digits_source("train", _TRAIN), digits_source("test", _TEST)
    run = pixel_run(tmp_path, train, test, config)
    run.params["scale"] *= 1e-30
    run.config.linear_eval.update(
        {"base_learning_rates": (1e37,), "raw_pixels": True, "weight_decay": 0.0}
    )
    with pytest.raises(DivergedError, match="linear probe, raw pixels: it diverged"):
        measure(run, ["linear"])


@pytest.mark.parametrize("name", ["finetune", "semi"])
def test_fine_tuning_that_diverged_is_an_error(tmp_path, name):
    config = pixel_config()
    config.finetune.head_learning_rate = 1e37
    config.semi_supervised.head_learning_rates = (1e37,)
    train, test = digits_source("train", _TRAIN), digits_source("test", _TEST)
    with pytest.raises(DivergedError, match=r"fine-tuning.* diverged; lower its learning rates"):
        measure(pixel_run(tmp_path, train, test, config), [name])


@pytest.mark.parametrize("name", ["linear", "knn", "fewshot", "retrieval", "clustering"])
def test_features_that_are_not_finite_are_one_clear_error(tmp_path, name):
    run = pixel_run(tmp_path, digits_source("train", _TRAIN), digits_source("test", _TEST))
    run.params["scale"] *= np.inf
    with pytest.raises(UserError, match=r"some features of .* are not finite"):
        measure(run, [name])
