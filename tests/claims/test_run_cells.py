"""One cell: its training, its measures and its labels; and the process that runs it."""

import concurrent.futures
import dataclasses
import json
import os
import signal
import time
import types
from concurrent.futures.process import BrokenProcessPool

import faked_claims as faked
import jax
import numpy as np
import pytest
import threadpoolctl
from etils import epath
from listed_records import list_source
from sklearn.metrics import mutual_info_score

from music_jax import config as config_lib
from music_jax import registry
from music_jax.claims import measure, references, run_cells
from music_jax.claims.cells import Cell, Results
from music_jax.claims.planning import make_plan, missing_cells
from music_jax.data.datasets import EvaluationSources
from music_jax.errors import DivergedError, NonFiniteError
from music_jax.workdir.run_config import as_json


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def _sweep(tmp_path, data, **options):
    config = faked.load("digits")
    config.dataset.data_dir = str(data)
    config.num_epochs = 40
    config.optimizer.warmup_epochs = 0
    config.optimizer.name = "lars"  # optax.adamw needs implicit promotion, which tests forbid
    config.backbone.name = "tiny_resnet"
    return faked.make_sweep(tmp_path / "results", config=config, seeds=2, **options)


def _run(sweep, tmp_path, name, **fields):
    cells = {cell.name: cell for cell in make_plan(sweep, assume=True).cells}
    cell = dataclasses.replace(cells[name], fields={**cells[name].fields, **fields})
    error = run_cells._try_job(run_cells._job(sweep, cell, epath.Path(tmp_path / "runs")))
    assert error is None, error
    return cell, sweep.results.read(cell)


@pytest.mark.slow
def test_a_final_cell_is_measured_on_test_images_and_its_predictions_are_kept(tmp_path, data):
    sweep = _sweep(tmp_path, data)
    cell, result = _run(sweep, tmp_path, "final/music/01")
    kept = sweep.results.predictions(cell)
    labels = sweep.results.labels()
    assert len(labels) == 360
    assert np.mean(kept["linear"] == labels) == pytest.approx(result["linear_top1"])
    assert np.mean(kept["knn"] == labels) == pytest.approx(result["knn_top1"])
    assert 0.3 < result["ten_shot_top1"] < 1
    assert result["linear_top1"] != result["validation_top1"]
    assert result["first_grad_norm"] > 0
    assert result["converged"]
    assert result["segment_information"] > result["null_information"]
    assert (tmp_path / "runs" / cell.name / "checkpoints").exists()
    assert not list((tmp_path / "runs").glob("**/features"))


@pytest.mark.slow
def test_a_cell_of_a_search_has_only_the_probe_of_validation_images(tmp_path, data):
    sweep = _sweep(tmp_path, data)
    cell, result = _run(sweep, tmp_path, "search/vicreg/01")
    assert {"validation_top1", "penalty", "converged"} < set(result)
    assert not {"linear_top1", "knn_top1"} & set(result)
    assert not (tmp_path / "results" / f"{cell.name}.npz").exists()
    assert not (tmp_path / "results" / "labels.npz").exists()
    assert not (tmp_path / "runs" / cell.name).exists()


@pytest.mark.slow
def test_a_training_on_a_part_of_the_images_is_probed_with_all(tmp_path, data):
    sweep = _sweep(tmp_path, data, methods=("vicreg",), claims=(4,))
    cell, result = _run(sweep, tmp_path, "batch=8,steps=4/vicreg/00")
    assert cell.fields["dataset.train_split"] == "train[:32]"  # whose labels are not all there are
    assert result["linear_top1"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("start", ["constant", "saturated"])
def test_all_methods_start_from_the_same_collapse(tmp_path, data, start):
    sweep = _sweep(tmp_path, data, methods=("music_centered", "vicreg"), claims=(5,))
    found = [
        _run(sweep, tmp_path, f"start={start}/{method}/00", num_epochs=8)[1]["start_state"]
        for method in ("music_centered", "vicreg")
    ]
    assert found[0]["embedding_std"] == pytest.approx(found[1]["embedding_std"], rel=1e-4)
    assert found[0]["embedding_std"] < 0.7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [("raw_pixels", 0.85), ("hog_svm", 0.6), ("random_backbone", 0.5), ("supervised", 0.2)],
)
def test_references_are_measured_on_the_same_images(tmp_path, data, name, least):
    sweep = _sweep(tmp_path, data)
    with jax.numpy_dtype_promotion("standard"):  # for the schedules of optax
        cell, result = _run(sweep, tmp_path, f"final/{name}/00")
    kept = sweep.results.predictions(cell)
    assert np.mean(kept["linear"] == sweep.results.labels()) == result["linear_top1"] > least
    assert ("knn" in kept) == (name in ("raw_pixels", "random_backbone"))


def test_a_training_that_diverges_is_a_result(tmp_path, data, monkeypatch):
    def train_and_evaluate(config, workdir, *, initial):
        raise DivergedError("the loss was not finite at step 4")

    monkeypatch.setattr(measure, "train_and_evaluate", train_and_evaluate)
    sweep = _sweep(tmp_path, data)
    _, result = _run(sweep, tmp_path, "final/vicreg/00")
    assert result["diverged"] == "the loss was not finite at step 4"
    assert "linear_top1" not in result


def test_features_that_are_not_finite_are_a_divergence(tmp_path, data, monkeypatch):
    class Run:
        def train(self):
            raise NonFiniteError("some features are not finite")

    monkeypatch.setattr(measure, "train_and_evaluate", lambda *_, **__: None)
    monkeypatch.setattr(measure, "_first_grad_norm", lambda _: 1.0)
    monkeypatch.setattr(measure, "load_run", lambda *_, **__: Run())
    _, result = _run(_sweep(tmp_path, data), tmp_path, "search/vicreg/00")
    assert result["diverged"] == "some features are not finite"
    assert "validation_top1" not in result


def test_the_first_gradient_is_that_of_the_first_step(tmp_path):
    lines = [{"step": 0, "online_knn": 0.1}, {"step": 1, "grad_norm": 2.5}, {"step": 9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert measure._first_grad_norm(str(tmp_path)) == 2.5


def test_a_registered_objective_starts_from_the_same_collapse(tmp_path, data, monkeypatch):
    mine = registry.RegisteredObjective(lambda weight: None, {"weight": (0.5, 1.0)})
    monkeypatch.setitem(registry.OBJECTIVES, "mine", mine)

    class ValidError(Exception):
        pass

    def train_and_evaluate(config, workdir):
        config_lib.validate(config)
        raise ValidError

    monkeypatch.setattr(measure, "train_and_evaluate", train_and_evaluate)
    sweep = _sweep(tmp_path, data, methods=("mine",), claims=(5,))
    cells = [cell for cell in make_plan(sweep, assume=True).cells if cell.start]
    assert {cell.start for cell in cells} == {"constant", "saturated"}
    for cell in cells:
        with pytest.raises(ValidError):
            measure._collapsed(cell, sweep.cell_config(cell), str(tmp_path), {})


def test_the_output_of_a_worker_in_a_bucket_is_that_of_the_command():
    log = epath.Path("gs://bucket/runs/worker-0-0.log")
    with run_cells.start_worker(log, None) as worker:
        assert worker.submit(os.getpid).result() != os.getpid()


def test_a_cell_that_fails_names_the_error(tmp_path, data, monkeypatch):
    monkeypatch.setattr(measure, "train_and_evaluate", lambda *_, **__: 1 / 0)
    sweep = _sweep(tmp_path, data)
    cell = make_plan(sweep).cells[0]
    error = run_cells._try_job(run_cells._job(sweep, cell, epath.Path(tmp_path / "runs")))
    assert error == "ZeroDivisionError: division by zero"
    assert Results(sweep.results.directory).read(cell) is None


def test_the_information_of_segments_is_compared_with_permutations():
    rng = np.random.default_rng(0)
    codes = rng.integers(4, size=(300, 3))
    codes[:, 1] = (codes[:, 0] + (rng.random(300) < 0.3)) % 4  # depends on segment 0
    found = measure.measure_codes(np.eye(4)[codes], seed=1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([mutual_info_score(codes[:, a], codes[:, b]) for a, b in pairs])
    assert found["segment_information"] * np.log(4) == pytest.approx(expected, rel=1e-4)
    # The expectation under independence is about (K - 1)² / 2N.
    assert found["null_information"] * np.log(4) == pytest.approx(9 / 600, rel=0.15)
    assert found["null_p"] == 0.01  # the smallest of 99 permutations
    assert found["dependent_pairs"] == pytest.approx(1 / 3)
    codes = np.random.default_rng(2).integers(4, size=(300, 3))
    assert measure.measure_codes(np.eye(4)[codes], seed=1)["null_p"] > 0.1


def test_a_pair_of_segments_is_compared_with_its_own_permutations():
    rng = np.random.default_rng(0)
    codes = np.zeros((300, 4), int)  # of the first three, one image in 100 has another unit
    codes[:3] = rng.integers(1, 8, size=(3, 4))
    codes[:, 2:] = rng.integers(8, size=(300, 2))  # by chance these share much more
    codes[:3, 1] = codes[:3, 0]
    found = measure.measure_codes(np.eye(8)[codes], seed=1)
    assert found["dependent_pairs"] == pytest.approx(1 / 6)


def test_the_spread_of_embeddings_is_1_without_a_mean_and_0_without_a_difference():
    x = np.random.default_rng(0).normal(size=(500, 8))
    assert measure._normalized_std(x) == pytest.approx(1.0, abs=0.01)
    assert measure._normalized_std(np.ones((5, 3))) == 0.0
    assert measure._normalized_std(np.zeros((5, 3))) == 0.0


def test_all_labels_of_the_chosen_images_are_read_once():
    label, hue = np.random.default_rng(0).integers(4, size=(2, 30))
    records = [
        {"image": b"", "area": 0.5, "hue": int(h), "label": int(x), "shape": int(x)}
        for x, h in zip(label, hue, strict=True)
    ]
    source = list_source("shapes:train", records, num_classes=4)
    columns = measure.label_columns(source, np.array([3, 5, 29]))
    assert list(columns) == ["label", "hue"]  # shape is the label under another name
    np.testing.assert_array_equal(columns["hue"], hue[[3, 5, 29]])
    np.testing.assert_array_equal(columns["label"], label[[3, 5, 29]])


def test_classifiers_are_the_ones_they_are_named_after(tmp_path, data):
    class Run:
        config, num_classes = _sweep(tmp_path, data).config, 4

    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, 6))
    parts = []
    for count in (400, 100, 200):
        labels = rng.integers(4, size=count)
        features = centers[labels] + 0.8 * rng.normal(size=(count, 6))
        parts.append((features.astype(np.float32), labels))
    result, arrays = references.classify(*parts, Run)
    assert set(arrays) == {"linear", "knn", "labels"}
    for name, measured in (("linear", "linear_top1"), ("knn", "knn_top1")):
        assert np.mean(arrays[name] == parts[2][1]) == result[measured]
    assert 0.5 < result["ten_shot_top1"] < result["linear_top1"] < 1


def test_the_reference_with_labels_predicts_the_class_of_the_largest_logit(monkeypatch):
    logits = np.array([[1.0, 3.0, 2.0], [9.0, 4.0, 0.0], [0.0, 0.0, 7.0], [5.0, 6.0, 1.0]])
    labels = {"validation": np.array([1, 0, 2, 0]), "test": np.array([1, 0, 0, 0])}
    trained = {}

    class Run:
        config = types.SimpleNamespace(batch_size=10, num_epochs=3)
        evaluation_sources = staticmethod(lambda: EvaluationSources([{}] * 25, "validation"))
        random_crop_batches = staticmethod(lambda *_, **options: trained.update(options))
        extract = staticmethod(
            lambda _, source, __: types.SimpleNamespace(
                arrays={"logits": logits}, labels=labels[source]
            )
        )

    class Tested:
        evaluation_sources = staticmethod(lambda: EvaluationSources([], "test"))

    monkeypatch.setattr(
        references, "train_classifier", lambda *_, **options: trained.update(options) or (0, 0)
    )
    monkeypatch.setattr(references, "logit_extractor", lambda *_: None)
    result, arrays = references._supervised(Run, Tested)
    assert arrays["linear"].tolist() == [1, 0, 2, 1]
    assert result == {"validation_top1": 0.75, "linear_top1": 0.5}
    assert (trained["batch_size"], trained["num_epochs"], trained["num_steps"]) == (10, 3, 6)


def test_a_worker_uses_only_its_core_from_the_start(tmp_path):
    before = os.sched_getaffinity(0)
    core = max(before)
    with run_cells.start_worker(epath.Path(tmp_path) / "worker-0.log", core) as worker:
        assert worker.submit(os.sched_getaffinity, 0).result() == {core}
        libraries = worker.submit(threadpoolctl.threadpool_info).result()
    assert {library["num_threads"] for library in libraries} == {1}
    assert os.sched_getaffinity(0) == before
    assert (tmp_path / "worker-0.log").exists()


def test_a_worker_process_that_was_killed_while_idle_is_replaced(tmp_path, monkeypatch):
    broken = run_cells.start_worker(epath.Path(tmp_path / "log"), None)
    process, endless = broken.submit(os.getpid).result(), broken.submit(time.sleep, 600)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        endless.result()
    workers = iter([broken, concurrent.futures.ThreadPoolExecutor(1)])
    monkeypatch.setattr(run_cells, "start_worker", lambda log, core: next(workers))
    sweep = faked.make_sweep(tmp_path / "out", methods=("vicreg",))
    monkeypatch.setattr(run_cells, "_try_job", lambda job: faked.finish(sweep, job.cell))
    run_cells.run_missing(sweep, runs=epath.Path(tmp_path / "runs"), cores=[None])
    assert not missing_cells(sweep)


def test_a_reference_needs_no_training_to_be_planned(tmp_path, data):
    cells = {cell.name: cell for cell in make_plan(_sweep(tmp_path, data)).cells}
    found: list[Cell] = [cell for cell in cells.values() if cell.reference]
    assert [cell.reference for cell in found if cell.index == 0] == [
        "raw_pixels", "hog_svm", "random_backbone", "supervised",
    ]  # fmt: skip
    assert as_json(_sweep(tmp_path, data).cell_config(found[0]))["dataset"]["test_split"] == ""
