"""Figures as tables for people."""

import logging
from collections.abc import Callable
from typing import Any

from music_jax.distributed import progress

_logger = logging.getLogger(__name__)

Figures = dict[str, Any]
Rows = list[tuple[str, str]]


def results_table(results: dict[str, Figures]) -> str:
    """The figures of the linear probe and kNN as a table, in percent, beside what chance gives."""
    linear, knn = results.get("linear", {}), results.get("knn", {})
    trained = linear.get("top1"), linear.get("top5"), knn.get("top1")
    rows = [("trained backbone", *map(_percent, trained))]
    for key, label in (("random_init", "random backbone"), ("raw_pixels", "raw pixels")):
        values = [linear.get(f"{key}_top1"), knn.get(f"{key}_top1")]
        if values != [None, None]:
            rows.append((label, _percent(values[0]), "", _percent(values[1])))
    classes = linear.get("num_classes")  # which earlier versions did not write
    if isinstance(classes, int) and classes > 0:
        chance = _percent(1 / classes)
        rows.append(("chance", chance, _percent(min(1.0, 5 / classes)), chance))
    return progress.table(("", "linear top-1", "linear top-5", "kNN top-1"), rows)


def say_without_label(protocol: str, figures: Figures) -> None:
    """Says how many images a protocol left out for want of a label, if there were any."""
    counts = figures.get("without_label")
    if counts:
        said = " and ".join(f"{count:,} {split} images" for split, count in counts.items() if count)
        _logger.info(f"{protocol}: {said} without a label were left out")


def summary_table(results: dict[str, Figures]) -> str:
    """The main figures of any protocols as a table, one a row."""
    rows = summary_rows(results)
    wide = max(len(what) for _, what, _ in rows)
    return progress.table(
        ("protocol", "figure".ljust(wide), "value"),
        [(name, what.ljust(wide), value) for name, what, value in rows],
    )


def summary_rows(results: dict[str, Figures]) -> list[tuple[str, str, str]]:
    """The main figures of any protocols: protocol, what it measures, the value with its unit."""
    return [
        (name, what, value)
        for name, figures in results.items()
        for what, value in _SUMMARIES[name](figures)
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _linear(figures: Figures) -> Rows:
    rows = [("top-1", _percent(figures["top1"])), ("top-5", _percent(figures["top5"]))]
    for key, label in (("random_init", "random backbone"), ("raw_pixels", "raw pixels")):
        if figures[f"{key}_top1"] is not None:
            rows.append((f"top-1, {label}", _percent(figures[f"{key}_top1"])))
    return rows


def _knn(figures: Figures) -> Rows:
    return [(f"top-1, k = {k}", _percent(top1)) for k, top1 in figures["top1_by_k"].items()]


def _fewshot(figures: Figures) -> Rows:
    return [
        (
            f"top-1, {shots} a class",
            f"{_percent(found['top1'])} ± "
            + ("-" if found["interval"] is None else f"{100 * found['interval']:.1f}"),
        )
        for shots, found in figures["top1_by_shots"].items()
    ]


def _clustering(figures: Figures) -> Rows:
    rows = []
    for key, label in (
        ("joint_code", "joint code"),
        ("chosen_segment", "segment chosen without labels"),
        ("oracle_segment", "best segment by the labels (oracle)"),
    ):
        found = figures[key]
        rows += [
            (f"{label}: accuracy", _percent(found["accuracy"])),
            (f"{label}: NMI", _number(found["nmi"])),
            (f"{label}: adjusted Rand", _number(found["adjusted_rand"])),
        ]
    return rows


def _label_free(figures: Figures) -> Rows:
    return [
        (f"{measure} of the {of} ({figures[of]['size']})", _number(figures[of][key]))
        for of in ("features", "embeddings")
        for key, measure in (
            ("rankme", "RankMe"),
            ("lidar", "LiDAR"),
            ("alpha_req", "α-ReQ"),
            ("uniformity", "uniformity"),
            ("alignment", "alignment"),
        )
    ]


def _segments(figures: Figures) -> Rows:
    above = figures["gap_to_bound"]
    return [
        (
            f"usage entropy, of log K = {figures['log_units']:.3f}",
            _number(figures["usage_entropy"]["mean"]),
        ),
        (f"dead units of {figures['num_units']}", str(figures["dead_units"])),
        ("confidence", _number(figures["confidence"]["mean"])),
        (
            "mutual information of two segments, in nats",
            _number(figures["mutual_information"]["mean"]),
        ),
        *((f"above the bound: {term}", _number(above[term])) for term in list(above)[:4]),
    ]


def _semi(figures: Figures) -> Rows:
    return [
        (f"top-1, {share} of the labels", _percent(found["top1"]))
        for share, found in figures["by_share"].items()
    ]


def _transfer(figures: Figures) -> Rows:
    rows = []
    for spec, found in figures["by_dataset"].items():
        rows += [
            (f"{spec}: linear top-1", _percent(found["linear"]["top1"])),
            (f"{spec}: kNN top-1", _percent(found["knn"]["top1"])),
        ]
    return rows


_SUMMARIES: dict[str, Callable[[Figures], Rows]] = {
    "linear": _linear,
    "knn": _knn,
    "fewshot": _fewshot,
    "retrieval": lambda figures: [("mAP", _percent(figures["map"]))],
    "clustering": _clustering,
    "label_free": _label_free,
    "segments": _segments,
    "semi": _semi,
    "finetune": lambda figures: [("top-1", _percent(figures["top1"]))],
    "transfer": _transfer,
}
