"""Measures the time that an evaluation takes, and compares metrics with other implementations.

    python tests/benchmarks/protocols.py --workdir=runs/mnist5k --json=protocols.json

Features are computed into a temporary folder and timed, as are the protocols that need nothing
else. Then each metric is compared with scikit-learn, scipy or plain numpy on the same features.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    adjusted_rand_score,
    average_precision_score,
    confusion_matrix,
    mutual_info_score,
    normalized_mutual_info_score,
)
from sklearn.neighbors import KNeighborsClassifier

from music_jax.evaluation import feature_protocols
from music_jax.evaluation.run import Run, load_run
from music_jax.metrics import label_free
from music_jax.metrics.scaling import fit_scaling
from music_jax.metrics.segments import cluster_scores, mutual_information

QUERIES = 200  # for retrieval, which scikit-learn ranks one by one


def cost(run: Run) -> list[dict[str, Any]]:
    """Returns the seconds that each part takes; the first extracts the features of all images."""
    parts: dict[str, Callable[[], Any]] = {
        "features, train and test": lambda: (run.train(), run.test()),
        "features, views for LiDAR and alignment": run.views,
        "kNN, without raw pixels and random weights": lambda: feature_protocols.knn(run),
        "label-free measures": lambda: feature_protocols.label_free(run),
    }
    if run.config.objective.name == "music":
        parts["segments"] = lambda: feature_protocols.segments(run)
    rows = []
    for name, part in parts.items():
        start = time.perf_counter()
        part()
        rows.append({"part": name, "seconds": round(time.perf_counter() - start, 2)})
    whole = round(sum(row["seconds"] for row in rows), 2)
    return [
        *rows,
        {"part": f"all, of {len(run.train()) + len(run.test()):,} images", "seconds": whole},
    ]


def unit(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)


def linear(run: Run) -> tuple[float, float]:
    train, test = run.train(), run.test()
    scale = fit_scaling(run.config.linear_eval.feature_scaling, lambda: train.features)
    a, b = scale(train.features), scale(test.features)
    decay = run.config.linear_eval.weight_decay
    theirs = LogisticRegression(C=1 / (decay * len(a)), max_iter=5000).fit(a, train.labels)
    return feature_protocols.linear(run)["top1"], theirs.score(b, test.labels)


def knn(run: Run, k: int) -> float:
    """Returns scikit-learn's accuracy."""
    train, test = run.train(), run.test()
    temperature = run.config.knn.temperature
    theirs = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.features.astype(np.float64), train.labels)
    return theirs.score(test.features.astype(np.float64), test.labels)


def retrieval(run: Run) -> tuple[float, float]:
    train, test = run.train(), run.test()
    similarity = unit(test.features[:QUERIES]) @ unit(train.features).T
    theirs = [
        average_precision_score(train.labels == label, row)
        for label, row in zip(test.labels, similarity, strict=False)
    ]
    ours = feature_protocols.average_precisions(
        train.features, train.labels, test.features[:QUERIES], test.labels[:QUERIES]
    )
    return float(np.mean(ours)), float(np.mean(theirs))


def entropy_rank(values: np.ndarray) -> float:
    p = values / values.sum() + 1e-7
    return float(np.exp(-np.sum(p * np.log(p))))


def rankme(run: Run) -> tuple[float, float]:
    z = run.test().features.astype(np.float64)
    return label_free.rankme(z), entropy_rank(np.linalg.svd(z, compute_uv=False))


def lidar(run: Run) -> tuple[float, float]:
    z = run.views()["embeddings"].astype(np.float64)
    images, views, size = z.shape
    mean = z.mean(axis=1)
    around = (z - mean[:, None]).reshape(-1, size)
    within = around.T @ around / (images * views) + 1e-4 * np.eye(size)
    between = np.cov(mean.T, bias=True)
    values, vectors = np.linalg.eigh(within)
    root = (vectors / np.sqrt(values)) @ vectors.T
    eigenvalues = np.maximum(np.linalg.eigvalsh(root @ between @ root), 0)
    return label_free.lidar(z), entropy_rank(eigenvalues)


def alpha_req(run: Run) -> tuple[float, float]:
    z = run.test().features.astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(z.T, bias=True))[::-1]
    ranks = np.arange(6, min(50, len(values)) + 1)
    x, y, w = np.log(ranks), np.log(values[ranks - 1]), 1 / ranks
    x, y = x - np.average(x, weights=w), y - np.average(y, weights=w)
    return label_free.alpha_req(z), float(-np.sum(w * x * y) / np.sum(w * x * x))


def uniformity(run: Run) -> tuple[float, float]:
    z = run.test().features
    theirs = np.log(np.mean(np.exp(-2 * pdist(unit(z), "sqeuclidean"))))
    return label_free.uniformity(z), float(theirs)


def alignment(run: Run) -> tuple[float, float]:
    a, b = run.views()["features"][:, 0], run.views()["features"][:, 1]
    return label_free.alignment(a, b), float(np.mean(np.sum((unit(a) - unit(b)) ** 2, axis=1)))


def clusters(run: Run, measure: str) -> tuple[float, float]:
    """Compares the first segment with the labels."""
    labels, code = run.unlabeled().labels, run.probabilities().argmax(axis=2)[:, 0]
    ours = getattr(cluster_scores(code, labels), measure)
    if measure == "nmi":
        return ours, normalized_mutual_info_score(labels, code)
    if measure == "adjusted_rand":
        return ours, adjusted_rand_score(labels, code)
    table = confusion_matrix(labels, code)
    return ours, table[linear_sum_assignment(-table)].sum() / len(labels)


def information(run: Run) -> tuple[float, float]:
    """Returns the mutual information of the codes of the first two segments, in nats."""
    units = run.config.objective.units_per_segment
    codes = run.probabilities().argmax(axis=2)[:, :2]
    ours = mutual_information(np.eye(units, dtype=np.float32)[codes])[0, 1]
    return float(ours), mutual_info_score(codes[:, 0], codes[:, 1])


def agreement(run: Run) -> list[dict[str, Any]]:
    """Returns each metric, ours and theirs."""
    protocols: dict[str, Callable[[], tuple[float, float]]] = {
        "linear probe, top-1: scikit-learn, logistic regression": lambda: linear(run),
        **{
            f"kNN, k {k}, top-1: scikit-learn": lambda k=k, top1=top1: (top1, knn(run, int(k)))
            for k, top1 in feature_protocols.knn(run)["top1_by_k"].items()
        },
        f"mAP of {QUERIES} queries: scikit-learn": lambda: retrieval(run),
        "RankMe: numpy": lambda: rankme(run),
        "LiDAR: numpy": lambda: lidar(run),
        "alpha-ReQ: numpy": lambda: alpha_req(run),
        "uniformity: scipy": lambda: uniformity(run),
        "alignment: numpy": lambda: alignment(run),
    }
    if run.config.objective.name == "music":
        protocols |= {
            "clusters, NMI: scikit-learn": lambda: clusters(run, "nmi"),
            "clusters, adjusted Rand: scikit-learn": lambda: clusters(run, "adjusted_rand"),
            "clusters, accuracy: scikit-learn and scipy": lambda: clusters(run, "accuracy"),
            "mutual information of two segments: scikit-learn": lambda: information(run),
        }
    rows = []
    for name, protocol in protocols.items():
        ours, theirs = protocol()
        rows.append(
            {"metric": name, "ours": ours, "theirs": theirs, "difference": abs(ours - theirs)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="workdir of a run on labeled images")
    parser.add_argument("--json", help="file to write the results to")
    options = parser.parse_args()
    overrides = {f"linear_eval.{name}": False for name in ("raw_pixels", "random_init")}
    run = load_run(options.workdir, overrides=overrides)
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(run, workdir=epath.Path(folder))
        found = {"cost": cost(run), "agreement": agreement(run)}
    for row in found["cost"]:
        print(f"{row['part']:45} {row['seconds']:8.2f} s")
    for row in found["agreement"]:
        numbers = f"{row['ours']:10.6f} {row['theirs']:10.6f} {row['difference']:9.1e}"
        print(f"{row['metric']:58} {numbers}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
