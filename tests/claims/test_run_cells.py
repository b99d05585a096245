"""One cell: its training, its measures and its labels; and the workers that run the cells."""

import json
import os
import runpy

import numpy as np
import pytest
import threadpoolctl
from etils import epath
from processes import ROOT
from sklearn.metrics import normalized_mutual_info_score

from music_jax.claims import run_cells
from music_jax.claims.grid import Setting
from music_jax.claims.sweep import Cell
from music_jax.data.datasets import EvaluationSources
from music_jax.data.sources import Source
from music_jax.errors import DivergedError
from music_jax.evaluation.features import SplitFeatures
from music_jax.workdir.run_config import as_json

_ALWAYS = {"learning_rate", "start", "seconds", "core_seconds"}
_GENERAL = {"linear_top1", "knn_top1", "ten_shot_top1", "rankme", "embedding_rankme"}
_SEGMENTS = {
    "segment_information", "usage_entropy", "confidence", "dead_units", "segment_accuracy",
    "segment_purity", "joint_code_accuracy", "joint_code_nmi", "segments_label_nmi",
    "segments_label_nmi_mean",
}  # fmt: skip


def _config(data, **fields):
    config = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]()
    config.update_from_flattened_dict(
        {
            "dataset.data_dir": str(data),
            "num_epochs": 1,
            "optimizer.warmup_epochs": 0,
            "backbone.name": "tiny_resnet",
            "optimizer.name": "lars",  # optax.adamw needs implicit promotion, which tests forbid
            "objective.num_segments": 4,
            "objective.units_per_segment": 4,
            "linear_eval.num_epochs": 2,
            "linear_eval.raw_pixels": False,
            "linear_eval.random_init": False,
            "few_shot.shots": (10,),
            "few_shot.draws": 2,
            "evaluation.view_images": 8,
            "evaluation.num_views": 2,
            **fields,
        }
    )
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def _run(directory, config, *, searching=False, collapsed_start=False):
    setting = Setting("music", "music", collapsed_start=collapsed_start)
    cell = Cell(setting, config.optimizer.base_learning_rate, config.seed, searching)
    run_cells.run_cell(cell, as_json(config), str(directory))
    return json.loads((directory / "result.json").read_text())


@pytest.mark.slow
def test_a_cell_starts_from_a_collapse_and_is_measured(tmp_path, data):
    result = _run(tmp_path / "cell", _config(data), collapsed_start=True)
    assert (
        set(result) == {"learning_rate", "start", "seconds", "core_seconds"} | _GENERAL | _SEGMENTS
    )
    assert set(result["start"]) == _GENERAL | _SEGMENTS
    assert result["start"]["linear_top1"] != result["linear_top1"]
    assert len(result["segments_label_nmi"]) == 4
    shares = _GENERAL - {"rankme", "embedding_rankme"} | _SEGMENTS - {"segments_label_nmi"}
    assert all(0 <= result[name] <= 1 for name in shares)
    assert not list((tmp_path / "cell").glob("**/features"))
    assert (tmp_path / "cell" / "checkpoints").exists()


@pytest.mark.slow
def test_a_cell_of_a_search_has_only_the_linear_probe(tmp_path, data):
    config = _config(data, **{"objective.name": "vicreg", "knn.enabled": False})
    result = _run(tmp_path / "cell", config, searching=True)
    assert set(result) == _ALWAYS | {"linear_top1"}
    probe = json.loads((tmp_path / "cell" / "linear_eval.json").read_text())
    assert result["linear_top1"] == probe["top1"]
    assert not (tmp_path / "cell" / "checkpoints").exists()


def test_a_training_that_diverges_is_a_result(tmp_path, data, monkeypatch):
    def train_and_evaluate(config, workdir, *, initial):
        raise DivergedError("the loss was not finite at step 4")

    monkeypatch.setattr(run_cells, "train_and_evaluate", train_and_evaluate)
    result = _run(tmp_path / "cell", _config(data))
    assert result["diverged"] == "the loss was not finite at step 4"
    assert "linear_top1" not in result


def _source(labels):
    records = [
        {"image": b"", "area": 0.5, **{name: int(column[i]) for name, column in labels.items()}}
        for i in range(len(labels["label"]))
    ]
    return Source("shapes:train", records, "image", "label", num_classes=4)


def test_all_labels_of_the_chosen_images_are_read_once():
    rng = np.random.default_rng(0)
    label, hue = rng.integers(4, size=(2, 30))
    source = _source({"hue": hue, "label": label, "shape": label})
    columns = run_cells.label_columns(source, np.array([3, 5, 29]))
    assert list(columns) == ["label", "hue"]  # shape is the label under another name
    np.testing.assert_array_equal(columns["hue"], hue[[3, 5, 29]])
    np.testing.assert_array_equal(columns["label"], label[[3, 5, 29]])


class _Run:
    """Features that hold the label, and segments of which two are the labels and two are noise."""

    def __init__(self, config):
        self.config = config
        self._splits, sources = [], []
        for seed, samples in enumerate((800, 400)):
            rng = np.random.default_rng(seed)
            labels = {name: rng.integers(4, size=samples) for name in ("label", "hue")}
            self.codes = [*labels.values(), *rng.integers(4, size=(2, samples))]
            features = np.eye(4)[labels["label"]] + rng.normal(scale=0.1, size=(samples, 4))
            arrays = {"features": features.astype(np.float32)}
            self._splits.append(SplitFeatures(arrays, labels["label"], np.arange(samples)))
            sources.append(_source(labels))
        self.sources = EvaluationSources(*sources)

    def evaluation_sources(self):
        return self.sources

    def train(self):
        return self._splits[0]

    def test(self):
        return self._splits[1]

    unlabeled = test

    def probabilities(self):
        return np.stack([np.eye(4)[code] for code in self.codes], axis=1)


def test_each_label_has_a_probe_and_shares_information_with_each_segment(tmp_path):
    run = _Run(_config(tmp_path, **{"linear_eval.num_epochs": 20}))
    found = run_cells._measure_factors(run, 0.99)
    assert found["factors"] == ["label", "hue"]
    assert found["factor_linear_top1"][0] == 0.99
    assert found["factor_linear_top1"][1] < 0.4  # the features do not hold it
    expected = [
        [normalized_mutual_info_score(labels, code) for labels in run.codes[:2]]
        for code in run.codes
    ]
    np.testing.assert_allclose(found["factor_nmi"], expected, atol=1e-9)
    np.testing.assert_allclose(np.diag(expected[:2]), 1)
    run.config.objective.name = "vicreg"
    assert set(run_cells._measure_factors(run, 0.99)) == {"factors", "factor_linear_top1"}


def test_each_measure_of_a_cell_is_the_one_it_is_named_after(monkeypatch):
    found = {
        "linear": {"top1": 0.11},
        "knn": {"top1": 0.12},
        "fewshot": {"top1_by_shots": {"1": {"top1": 0.13}, "10": {"top1": 0.14}}},
        "label_free": {"features": {"rankme": 15.0}, "embeddings": {"rankme": 16.0}},
        "segments": {
            "mutual_information": {"mean": 0.5},
            "log_units": 2.0,
            "usage_entropy_share": 0.17,
            "confidence": {"mean": 0.18},
            "dead_units": 3,
            "num_units": 12,
        },
        "clustering": {
            "segments": [{"nmi": 0.2}, {"nmi": 0.4}],
            "chosen_segment": {"accuracy": 0.21, "purity": 0.22},
            "joint_code": {"accuracy": 0.23, "nmi": 0.24},
        },
    }
    monkeypatch.setattr(run_cells, "run_protocols", lambda run, names: found)
    monkeypatch.setattr(run_cells, "_measure_factors", lambda run, linear_top1: {})
    measured = run_cells.measure(None)
    assert measured.pop("segments_label_nmi") == [0.2, 0.4]
    assert measured == pytest.approx(
        {
            "linear_top1": 0.11,
            "knn_top1": 0.12,
            "ten_shot_top1": 0.14,
            "rankme": 15.0,
            "embedding_rankme": 16.0,
            "segment_information": 0.25,
            "usage_entropy": 0.17,
            "confidence": 0.18,
            "dead_units": 0.25,
            "segment_accuracy": 0.21,
            "segment_purity": 0.22,
            "joint_code_accuracy": 0.23,
            "joint_code_nmi": 0.24,
            "segments_label_nmi_mean": 0.3,
        }
    )


def test_a_worker_uses_only_its_core_from_the_start(tmp_path):
    before = os.sched_getaffinity(0)
    core = max(before)
    with run_cells.start_worker(epath.Path(tmp_path) / "worker-0.log", core) as worker:
        assert worker.submit(os.sched_getaffinity, 0).result() == {core}
        libraries = worker.submit(threadpoolctl.threadpool_info).result()
    assert {library["num_threads"] for library in libraries} == {1}
    assert os.sched_getaffinity(0) == before
    assert (tmp_path / "worker-0.log").exists()
