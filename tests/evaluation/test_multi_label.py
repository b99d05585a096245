"""Runs on images of several classes: their protocols, results, report and packed images."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath
from listed_records import list_source
from pixel_runs import digits_source, pixel_config, pixel_run
from sklearn.metrics import average_precision_score
from tfds_sets import IMAGES, LABELS

from music_jax.data.datasets import _with_classes
from music_jax.data.packed import open_packed
from music_jax.data.packing import Packing, pack
from music_jax.errors import UserError
from music_jax.evaluation import protocols
from music_jax.evaluation.protocols import PROTOCOLS, run_protocols
from music_jax.evaluation.results import read_result, results_table, summary_table

_NAMES = ("even", "above 4", "prime")
_TRAIN, _TEST = range(120), range(120, 180)


@pytest.fixture(autouse=True)
def _promotion():
    """optax's schedules need the standard one."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def _label(i):
    """Every fourth image has no label, and every fifth one an unknown class."""
    digit = int(LABELS[i])
    known = [digit % 2 == 0, digit > 4, digit in (2, 3, 5, 7)]
    label = np.where(i % 4 == 0, -1, known).astype(np.int8)
    label[1] = -1 if i % 5 == 0 else label[1]
    return label


def _source(name, rows):
    source = digits_source(name, rows)
    records = [source.record(index) | {"label": _label(i)} for index, i in enumerate(rows)]
    return dataclasses.replace(
        source, read=records.__getitem__, num_classes=3, class_names=_NAMES, multi_label=True
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = pixel_config()
    config.finetune.update({"num_epochs": 20, "head_learning_rate": 1.0})
    config.linear_eval.update({"num_epochs": 20, "raw_pixels": True, "random_init": False})
    directory = tmp_path_factory.mktemp("run")
    return pixel_run(directory, _source("train", _TRAIN), _source("test", _TEST), config)


def test_the_protocols_that_support_several_classes_run_and_the_others_are_named(run, capsys):
    found = run_protocols(run, [name for name in PROTOCOLS if name != "transfer"])
    assert list(found) == ["linear", "knn", "label_free", "segments", "finetune"]
    said = capsys.readouterr().out
    assert "not measured: fewshot, retrieval, clustering, semi: the images of train may" in said
    linear, knn = found["linear"], found["knn"]
    labels = np.stack([_label(i) for i in _TEST if i % 4])
    shares = [np.mean(column[column >= 0]) for column in labels.T]
    assert linear["chance_mean_average_precision"] == pytest.approx(np.mean(shares))
    by_class = linear["average_precision_by_class"]
    assert tuple(by_class) == _NAMES
    assert linear["mean_average_precision"] == pytest.approx(np.mean([*by_class.values()]))
    for result in (linear, knn):
        assert result["mean_average_precision"] > 0.8
        assert result["raw_pixels_mean_average_precision"] > 0.8
        assert result["random_init_mean_average_precision"] is None
        assert "top1" not in result
        assert (result["num_train"], result["num_test"]) == (90, 45)
        assert result["without_label"] == {"train": 30, "test": 15}
    assert found["finetune"]["mean_average_precision"] > 0.7
    assert (found["finetune"]["num_train"], found["finetune"]["num_test"]) == (90, 45)
    assert not (run.workdir / "linear_eval.npz").exists()
    for name, result in found.items():
        assert read_result(run.workdir, name) == result


def test_knn_is_the_mean_average_precision_of_scikit_learn(run):
    found = protocols.knn(run)
    images = IMAGES.reshape(len(IMAGES), -1)
    pixels = (images / 255 - 0.13) / 0.31
    unit = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    train, test = ([i for i in rows if i % 4] for rows in (_TRAIN, _TEST))
    weights = np.exp(unit[test] @ unit[train].T / run.config.knn.temperature)
    expected = []
    for c in range(3):
        own, truth = (np.asarray([_label(i)[c] for i in rows]) for rows in (train, test))
        votes = weights * (own >= 0)
        scores = votes @ (own == 1) / votes.sum(axis=1)
        expected.append(average_precision_score(truth[truth >= 0], scores[truth >= 0]))
    every = str(max(run.config.knn.k, *run.config.knn.more_k))  # more than there are images
    assert found["mean_average_precision_by_k"][every] == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_probe_on_random_crops_reads_the_same_labels(run):
    run.config.linear_eval.random_crops = True
    try:
        found = protocols.linear(run)
    finally:
        run.config.linear_eval.random_crops = False
    assert found["mean_average_precision"] > 0.8
    assert found["num_train"] == 90


def test_tables_show_the_mean_average_precision():
    linear = {"mean_average_precision": 0.5, "chance_mean_average_precision": 0.25}
    linear |= {"raw_pixels_mean_average_precision": 0.4, "random_init_mean_average_precision": None}
    knn = {"mean_average_precision": 0.6, "mean_average_precision_by_k": {"20": 0.6}}
    found = {"linear": linear, "knn": knn}
    lines = [line.split("  ") for line in results_table(found).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["linear mAP", "kNN mAP"]
    assert cells[2:] == [
        ["trained backbone", "50.0 %", "60.0 %"],
        ["raw pixels", "40.0 %", "-"],
        ["chance", "25.0 %", "25.0 %"],
    ]
    assert "mAP, k = 20" in summary_table(found)


def test_packed_images_keep_their_labels(tmp_path):
    source = _source("train", range(20))
    assert pack(source, epath.Path(tmp_path), Packing(channels=1, shard_size=8)) == 20
    packed = open_packed(str(tmp_path))
    assert (packed.class_names, packed.multi_label) == (_NAMES, True)
    expected = [_label(i) for i in range(20)]
    np.testing.assert_array_equal(packed.labels(), expected)
    np.testing.assert_array_equal(
        packed.subset(np.asarray([3, 1])).labels(), np.asarray(expected)[[3, 1]]
    )
    assert pack(source, epath.Path(tmp_path), Packing(channels=1, shard_size=8)) == 20
    one = digits_source("train", range(20))
    with pytest.raises(UserError, match="different settings"):
        pack(one, epath.Path(tmp_path), Packing(channels=1, shard_size=8))
    assert json.loads((tmp_path / "index.json").read_text())["multi_label"] is True


def test_classes_of_the_test_set_are_matched_by_name():
    train = _source("train", _TRAIN)
    records = [{"image": b"", "label": [1, -1]}, {"image": b"", "label": [0, 1]}]
    test = list_source("test", records, 2, ("prime", "even"), multi_label=True)
    matched = _with_classes(test, train)
    assert matched.labels().tolist() == [[-1, -1, 1], [1, -1, 0]]
    assert matched.class_names == _NAMES
    with pytest.raises(UserError, match="train may have several classes, those of one one"):
        _with_classes(digits_source("one", [1]), train)
