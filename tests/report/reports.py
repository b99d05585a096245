"""Synthetic runs for the report: workdirs without training and images without a network."""

import base64
import gzip
import json
import re
from unittest import mock

import numpy as np

from music_jax.config import default_config
from music_jax.report import measures
from music_jax.report.page import measure_sample
from music_jax.report.reading import read_workdirs
from music_jax.workdir.run_config import as_json

HOSTILE = "</script><script>window.hacked=1;alert(1)</script>"
# Names of metrics with a special meaning in the page's scripts, Plotly or JavaScript, and some that
# HTML changes.
HOSTILE_NAMES = (
    *("base64", "shape", "type", "dtype", "bdata", "values", "step ", "__proto__", "constructor"),
    *("toString", "hasOwnProperty", "", "\0", "a\r\nb", "\x1b[31m", "\udcff", '"]', "%{x}"),
)
HOSTILE_TAG = '<img src=x onerror="window.hacked=1"><b>bold</b>'


def write_workdir(path, *, objective="music", segments=6, units=5, steps=30, logged=30, seed=0):
    """Writes config.json and metrics.jsonl like a run of 3 epochs."""
    path.mkdir(parents=True)
    config = default_config()
    config.num_epochs, config.batch_size, config.seed = 3, 32, seed
    config.optimizer.warmup_epochs = 1
    config.objective.update(
        {"name": objective, "num_segments": segments, "units_per_segment": units}
    )
    config.dataset.name = HOSTILE
    about = {
        "config": as_json(config),
        "versions": {"music_jax": "0.1.0", HOSTILE_TAG: "1"},
        "devices": {"platform": "cpu", "kind": HOSTILE_TAG, "count": 2, "processes": 1},
        "written": "2026-01-02T03:04:05+00:00",
    }
    (path / "config.json").write_text(json.dumps(about))
    lines = []
    for step in range(1, logged + 1):
        record = {
            "step": step,
            "epoch": 3 * step / steps,
            "loss": -4.8 + 3 / step,
            "learning_rate": 0.1 * step / steps,
            "images_per_second": None if step == 1 else 640.0,
            "online_top1": step / (steps + 5),
            "online_rankme": 3.0 * step,
            HOSTILE_TAG: float(step),
        } | dict.fromkeys(HOSTILE_NAMES, float(step))
        if objective == "music":
            terms = {"diagonal": -1.0, "cross_segment": -3.0, "invariance": 1 / step}
            record |= terms | {"usage_entropy": 0.9, "dead_units": 0.0, "gap_to_bound": 3 / step}
        lines.append(json.dumps(record))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def write_results(path, *, images=40, classes=3, step=30):
    """Writes results of the linear probe and kNN; returns labels and predictions."""
    rng = np.random.default_rng(1)
    labels = rng.integers(classes, size=images)
    predictions = np.where(rng.random(images) < 0.2, (labels + 1) % classes, labels)
    top1 = float(np.mean(labels == predictions))
    figures = {"protocol": "linear", "step": step, "seed": 0, "num_train": 100, "num_test": images}
    figures |= {"top1": top1, "top5": 1.0, "learning_rate": 0.1}
    figures |= {"raw_pixels_top1": 0.5, "random_init_top1": 0.25, "num_classes": classes}
    (path / "linear_eval.json").write_text(json.dumps(figures))
    figures = {"protocol": "knn", "step": step, "top1": 0.75, "top1_by_k": {"20": 0.75}, "k": 20}
    figures |= {"raw_pixels_top1": 0.5, "random_init_top1": None}
    (path / "knn.json").write_text(json.dumps(figures))
    np.savez(
        path / "linear_eval.npz",
        indices=np.arange(images),
        labels=labels.astype(np.int32),
        predictions=predictions.astype(np.int32),
        step=np.asarray(step),
        confidences=rng.random(images, np.float32),
    )
    return labels, predictions


def make_sample(
    *, images=40, classes=3, segments=6, units=5, side=24, channels=3, labeled=True, seed=0
):
    """Returns images whose embeddings and features depend on their class, with noise."""
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(1).integers(classes, size=images)
    dim = segments * units
    centers = rng.normal(size=(classes, dim))
    embeddings = 3 * centers[labels] + rng.normal(size=(images, dim))
    view_pairs = embeddings[:, None] + 0.3 * rng.normal(size=(images, 2, dim))
    names = [HOSTILE, HOSTILE_TAG] + [f"class {i}" for i in range(2, classes)]
    return measures.Sample(
        source="digits:test",
        source_size=10 * images,
        indices=np.arange(images),
        names=[f"{i}{HOSTILE_TAG}.png" for i in range(images)],
        labels=labels.astype(np.int32) if labeled else np.full(images, -1, np.int32),
        class_names=tuple(names[:classes]) if labeled else (),
        num_classes=classes if labeled else 0,
        pixels=rng.integers(256, size=(images, side, side, channels), dtype=np.uint8),
        features=(centers[labels] + 0.5 * rng.normal(size=(images, dim))).astype(np.float32),
        embeddings=embeddings.astype(np.float32),
        view_pairs=view_pairs.astype(np.float32),
        views=rng.integers(256, size=(4, 5, side, side, channels), dtype=np.uint8),
    )


def make_reported(path, sample=None):
    """Returns the run of a workdir like `page.measure_run`, with synthetic images and maps."""
    (recorded,) = read_workdirs([str(path)])
    missing = "" if sample else f"no checkpoint {HOSTILE}"
    rng = np.random.default_rng(0)
    mistakes = None
    if sample and (found := recorded.predictions) is not None:
        wrong = np.flatnonzero(found.labels != found.predictions)[:12]
        sure, pixels = found.confidences[wrong], sample.pixels[wrong % len(sample.pixels)]
        names = [f"{i}{HOSTILE_TAG}.png" for i in wrong]
        columns = names, found.labels[wrong], found.predictions[wrong], sure, pixels
        mistakes = measures.Mistakes(*columns) if len(wrong) else None
    with mock.patch.object(
        measures,
        "tsne_map",
        lambda vectors: rng.random((len(vectors), 2)) if len(vectors) > 4 else None,
    ):
        return measure_sample(
            recorded, sample, mistakes=mistakes, missing=missing, num_training_images=1000
        )


def data_of(html):
    """Returns the data of the page's scripts, with arrays unpacked."""
    encoded = re.search(r'<script type="text/plain" id="data">([^<]*)</script>', html)[1]
    return _unpacked(json.loads(gzip.decompress(base64.b64decode(encoded))))


def _unpacked(value):
    if isinstance(value, dict) and "base64" in value and "shape" in value:
        array = np.frombuffer(base64.b64decode(value["base64"]), f"<{value['type']}")
        return array.reshape(value["shape"])
    if isinstance(value, dict):
        return {key: _unpacked(inner) for key, inner in value.items()}
    return [_unpacked(inner) for inner in value] if isinstance(value, list) else value
