"""Protocols on few, partly labeled or changed images, with diverged probes, and after training."""

import dataclasses
import json

import cv2
import jax
import numpy as np
import pytest
from etils import epath
from pixel_runs import digits_source, pixel_config, pixel_run
from small_runs import small_config

from music_jax.config import default_config
from music_jax.data import datasets
from music_jax.data.datasets import EvaluationSources
from music_jax.data.skipped import SkippedImages
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import DivergedError, NotMeasurableError, UserError
from music_jax.evaluation import protocols
from music_jax.evaluation.protocols import (
    PROTOCOLS,
    FinalEvaluation,
    _transfer_runs,
    provenance,
    read_final_results,
    run_protocols,
)
from music_jax.evaluation.run import Run

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


def test_the_training_images_have_features_alone_and_the_test_images_embeddings_too(partly):
    run, _ = partly
    assert {name: x.shape[1] for name, x in run.train("trained").arrays.items()} == {
        "features": run.network.num_features
    }
    assert {name: x.shape[1] for name, x in run.test("trained").arrays.items()} == {
        "features": run.network.num_features,
        "embeddings": run.network.num_embedding,
    }
    (other,) = [source for source in run.evaluation_sources() if source is not run.images]
    only = dataclasses.replace(run, images=other)  # to test with no image in common
    assert set(only.test("trained").arrays) == {"features", "embeddings"}
    assert set(only.train("trained").arrays) == {"features", "embeddings"}


@pytest.mark.parametrize("name", ["linear, fixed", *_LABELED])
def test_results_are_those_of_the_labeled_images_alone(partly, name, capsys):
    counts = {"test": 16} if name == "clustering" else {"train": 34, "test": 16}
    said = " and ".join(f"{count} {split} images" for split, count in counts.items())
    name, _, fixed = name.partition(", ")
    found = []
    for run in partly:
        run.config.linear_eval.random_crops = not fixed
        found.append(run_protocols(run, [name], force=True)[name])
        line = f"{name}: {said} without a label were excluded"
        assert (line in capsys.readouterr().out) == (run is partly[0])
    mixed, labeled = found
    assert mixed.pop("without_label") == counts
    assert "without_label" not in labeled
    assert mixed.pop("images_fingerprint") != labeled.pop("images_fingerprint")
    assert mixed == labeled


def test_protocols_without_labels_use_all_images(partly):
    mixed, labeled = (run_protocols(run, ["label_free", "segments"], force=True) for run in partly)
    for name in ("label_free", "segments"):
        assert (mixed[name]["num_images"], labeled[name]["num_images"]) == (50, 34)
        assert mixed[name]["data"] == {"images": "test"}
        assert "without_label" not in mixed[name]


def test_without_any_label_only_protocols_without_labels_run(tmp_path, capsys):
    train = digits_source("train", _TRAIN)
    run = pixel_run(tmp_path, train, digits_source("test", _TEST, unlabeled=_TEST))
    names = ["knn", "finetune", "linear", "segments"]
    assert list(run_protocols(run, names)) == ["segments"]
    assert "not measured: knn, finetune, linear: the images of test" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"measured: knn, fewshot: .* have labels of 0 classes"):
        run_protocols(run, ["knn", "fewshot"])


@pytest.mark.parametrize("name", _LABELED)
def test_a_single_training_class_is_an_error(tmp_path, name):
    zeros = np.flatnonzero(np.arange(30) % 10 == 0)  # the digits begin with 0 to 9, three times
    run = pixel_run(tmp_path, digits_source("train", zeros), digits_source("test", [30]))
    with pytest.raises(UserError, match=r"nothing can be measured: .* classes"):
        run_protocols(run, [name])


@pytest.mark.parametrize("name", ["label_free", "segments"])
def test_a_single_image_is_an_error_for_protocols_that_compare_images(tmp_path, name):
    run = pixel_run(tmp_path, digits_source("train", [0, 1]), digits_source("test", [30]))
    with pytest.raises(UserError, match="two images or more are needed; test has 1"):
        run_protocols(run, [name])


def test_a_few_images_are_enough(tmp_path):
    """Fewer than k, than shots, than a batch, than devices; the right values by hand."""
    train, test = digits_source("train", [0, 1, 2]), digits_source("test", [10])  # a 0
    found = run_protocols(
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
def test_a_diverged_linear_probe_is_an_error_and_other_protocols_run(tmp_path, rates, random_crops):
    run = pixel_run(tmp_path, digits_source("train", _TRAIN), digits_source("test", _TEST))
    run.config.linear_eval.update({"base_learning_rates": rates, "random_crops": random_crops})
    with pytest.raises(
        DivergedError, match=r"linear probe, trained: .*base_learning_rates"
    ) as told:
        run_protocols(run, ["linear", "retrieval"])
    assert told.value.exit_code == 3
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["retrieval.json"]


@pytest.mark.parametrize("random_crops", [True, False])
def test_a_diverged_learning_rate_is_not_selected(tmp_path, random_crops):
    run = pixel_run(tmp_path, digits_source("train", _TRAIN), digits_source("test", _TEST))
    run.config.linear_eval.update(
        {"base_learning_rates": (1e37, 0.1), "random_crops": random_crops}
    )
    found = run_protocols(run, ["linear"])["linear"]
    assert found["learning_rate"] == pytest.approx(0.1 * 16 / 256)
    assert found["top1"] > 0.5


def test_a_diverged_baseline_is_missing_with_a_warning(tmp_path, capsys):
    config = pixel_config()
    config.dataset.std = (1e-3,)
    train, test = digits_source("train", _TRAIN), digits_source("test", _TEST)
    run = pixel_run(tmp_path, train, test, config)
    run.params["scale"] *= 1e-30
    run.config.linear_eval.update(
        {"base_learning_rates": (1e37,), "raw_pixels": True, "weight_decay": 0.0}
    )
    found = run_protocols(run, ["linear"])["linear"]
    assert found["raw_pixels_top1"] is None
    assert 0 <= found["top1"] <= 1
    warning = "this baseline is missing: linear probe, raw pixels: training diverged"
    assert warning in capsys.readouterr().out


@pytest.fixture
def transfer(tmp_path, monkeypatch):
    """A function that transfers a run to sets, of which "none" has no label."""
    run = pixel_run(tmp_path, digits_source("train", _TRAIN), digits_source("test", _TEST))
    monkeypatch.setattr(datasets, "prepare", lambda *_: None)

    def evaluation_sources(config):
        name = config.evaluation.test.partition(":")[0]
        test = digits_source(name, _TEST)
        if name == "none":
            test = digits_source(name, _TEST[1:], unlabeled=_TEST)
        return EvaluationSources(digits_source(name, _TRAIN), test)

    monkeypatch.setattr(datasets, "evaluation_sources", evaluation_sources)
    return lambda *names: run_protocols(
        run, ["transfer"], transfer_sets=[f"{name}:train:test" for name in names]
    )["transfer"]


def test_a_transfer_set_that_cannot_be_measured_is_skipped_with_a_warning(transfer, capsys):
    for _ in range(2):  # measured, then read
        found = transfer("one", "none", "two")
        assert list(found["by_dataset"]) == ["one:train:test", "two:train:test"]
        assert found["by_dataset"]["one:train:test"]["linear"]["num_test"] == len(_TEST)
        assert list(found["not_measured"]) == ["none:train:test"]
        warning = "transfer to none:train:test was not measured: the images of none"
        assert warning in capsys.readouterr().out
    with pytest.raises(UserError, match=r"nothing can be measured: transfer: .* of none"):
        transfer("none")


def test_a_transfer_set_whose_probe_diverged_is_skipped(transfer, monkeypatch):
    linear = protocols.linear

    def diverge_on_two(run):
        if run.sources.test.name == "two":
            raise DivergedError("training diverged")
        return linear(run)

    monkeypatch.setattr(protocols, "linear", diverge_on_two)
    found = transfer("one", "two")
    assert list(found["by_dataset"]) == ["one:train:test"]
    assert found["not_measured"] == {"two:train:test": "training diverged"}
    with pytest.raises(DivergedError, match="transfer to two:train:test: training diverged"):
        transfer("two")


def test_a_transfer_set_that_cannot_be_opened_is_skipped(transfer, monkeypatch):
    opened = datasets.evaluation_sources

    def fail_on_one(config):
        if config.evaluation.test.startswith("one"):
            raise NotMeasurableError("one has no labels")
        return opened(config)

    monkeypatch.setattr(datasets, "evaluation_sources", fail_on_one)
    found = transfer("one", "two")
    assert list(found["by_dataset"]) == ["two:train:test"]
    assert found["not_measured"] == {"one:train:test": "one has no labels"}


@pytest.mark.parametrize("name", ["finetune", "semi"])
def test_diverged_fine_tuning_is_an_error(tmp_path, name):
    config = pixel_config()
    config.finetune.head_learning_rate = 1e37
    config.semi_supervised.head_learning_rates = (1e37,)
    train, test = digits_source("train", _TRAIN), digits_source("test", _TEST)
    with pytest.raises(DivergedError, match=r"fine-tuning.* diverged; lower its learning rates"):
        run_protocols(pixel_run(tmp_path, train, test, config), [name])


@pytest.mark.parametrize("name", ["linear", "knn", "fewshot", "retrieval", "clustering"])
def test_non_finite_features_are_an_error(tmp_path, name):
    run = pixel_run(tmp_path, digits_source("train", _TRAIN), digits_source("test", _TEST))
    run.params["scale"] *= np.inf
    with pytest.raises(UserError, match=r"some features of .* are not finite"):
        run_protocols(run, [name])


def _folder(path, *, classes=("a", "b"), images=2):
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(images):
            cv2.imwrite(str(path / name / f"{i}.png"), np.zeros((4, 4, 3), np.uint8))
    return str(path)


def _run(tmp_path, config, sources, images):
    return Run(
        config=config,
        workdir=epath.Path(tmp_path),
        sources=sources,
        images=images,
        network=None,
        params={},
        batch_stats={},
        step=3,
        mesh=make_data_mesh(),
        skipped=SkippedImages(epath.Path(tmp_path), max_share=0.5),
    )


def test_transfer_sets_may_include_the_training_images(tmp_path):
    config = small_config()
    config.dataset.path = _folder(tmp_path / "train", images=3)
    config.evaluation.train = config.dataset.path
    config.evaluation.test = _folder(tmp_path / "test", images=1)
    sources = datasets.evaluation_sources(config, datasets.training_source(config))
    run = _run(tmp_path, config, sources, sources.test)
    other = _folder(tmp_path / "other", images=2)
    spec = f"{config.dataset.path}:{other}"
    there = _transfer_runs(run, [spec])[0][spec]
    assert (len(there.sources.train), len(there.sources.test)) == (6, 4)
    assert there.images is there.sources.test


@pytest.mark.parametrize("flag", ["raw_pixels", "random_init"])
def test_provenance_of_knn_includes_the_requested_baselines(flag):
    config = small_config()
    before = provenance("knn", config, 3)
    assert set(before["hyper_parameters"]) > {"knn", "evaluation"}
    config.linear_eval.num_epochs = 7
    assert provenance("knn", config, 3) == before
    config.linear_eval[flag] = True
    assert provenance("knn", config, 3) != before


def test_results_of_changed_images_are_recomputed(tmp_path, monkeypatch):
    config = small_config()
    config.dataset.path = _folder(tmp_path / "train")
    config.evaluation.test = _folder(tmp_path / "test")
    measured = []

    def retrieval(run):
        measured.append(run)
        return {"map": 0.5}

    protocol = PROTOCOLS["retrieval"]._replace(measure=retrieval)
    monkeypatch.setitem(PROTOCOLS, "retrieval", protocol)
    monkeypatch.setattr(Run, "count_unlabeled", lambda *_: {})

    def measure_and_count(**fields):
        config.evaluation.update(fields)
        sources = datasets.evaluation_sources(config, datasets.training_source(config))
        run_protocols(_run(tmp_path, config, sources, sources.test), ["retrieval"])
        return len(measured)

    assert [measure_and_count(), measure_and_count()] == [1, 1]
    assert measure_and_count(test=f"{tmp_path}/./test/") == 1
    cv2.imwrite(str(tmp_path / "test" / "b" / "1.png"), np.ones((4, 4, 3), np.uint8))
    assert [measure_and_count(), measure_and_count()] == [2, 2]
    config.compute_dtype = "bfloat16"
    assert [measure_and_count(), measure_and_count()] == [3, 3]


def test_results_of_another_run_are_recomputed(tmp_path, monkeypatch):
    """Both have the same seed, step and images, as imported weights do, and one output."""
    config = small_config()
    config.evaluation.test = _folder(tmp_path / "test")
    config.dataset.path = _folder(tmp_path / "train")
    sources = datasets.evaluation_sources(config, datasets.training_source(config))
    run = _run(tmp_path, config, sources, sources.test)
    protocol = PROTOCOLS["retrieval"]._replace(measure=lambda run: {"map": float(run.params["w"])})
    monkeypatch.setitem(PROTOCOLS, "retrieval", protocol)
    monkeypatch.setattr(Run, "count_unlabeled", lambda *_: {})
    for value in (0.5, 0.25, 0.25):
        other = dataclasses.replace(run, params={"w": np.float32(value)})
        assert run_protocols(other, ["retrieval"])["retrieval"]["map"] == value


def test_images_without_labels_are_not_evaluated_unless_they_are_named(tmp_path, capsys):
    for name in ("a", "b"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((4, 4), np.uint8))
    config = default_config()
    config.dataset.path = str(tmp_path)
    source = datasets.training_source(config)
    final = FinalEvaluation(config, tmp_path, source)
    assert final.sources is None
    said = capsys.readouterr().out
    assert "the backbone will not be probed: " in said
    assert "no images to test with; name labeled images" in said
    assert final.is_done(6)
    assert capsys.readouterr().out == f"{tmp_path} is done: 6 steps trained\n"
    config.evaluation.test = str(tmp_path)
    with pytest.raises(NotMeasurableError, match="every image must be in one of two or more"):
        FinalEvaluation(config, tmp_path, source)


def test_final_results_belong_to_a_step_and_to_the_images(tmp_path):
    config, workdir, images = small_config(), epath.Path(tmp_path), ["train 1", "test 2"]

    def write(more):
        for name, file in (("linear", "linear_eval.json"), ("knn", "knn.json")):
            scores = {"top1": 0.5, "top5": 0.9, "top1_by_k": {"20": 0.5}}
            scores |= {"raw_pixels_top1": None, "random_init_top1": None}
            result = scores | json.loads(json.dumps(provenance(name, config, 3))) | more
            (tmp_path / file).write_text(json.dumps(result))

    write({"images_fingerprint": images})
    assert set(read_final_results(config, workdir, 3, images)) == {"linear", "knn"}
    assert read_final_results(config, workdir, 4, images) is None
    assert read_final_results(config, workdir, 3, ["train 1", "test 3"]) is None
    write({})
    assert read_final_results(config, workdir, 3, images) is None
