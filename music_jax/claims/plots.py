"""A plot of each claim."""

from typing import Any

import matplotlib
import numpy as np
from etils import epath

from music_jax.claims.results import SHARES, Table, plot_name
from music_jax.workdir.files import new_file

matplotlib.use("agg")

from matplotlib import pyplot as plt


def write(tables: list[Table], directory: epath.Path) -> None:
    """Writes claim-N.png for each claim that has a result."""
    for table in tables:
        if not any(row["measures"] for row in table["rows"]):
            continue
        if any(row.get("factor_nmi") for row in table["rows"]):
            figure = _heat_maps(table)
        elif all(isinstance(row["x"], int) for row in table["rows"]):
            figure = _lines(table)
        else:
            figure = _bars(table)
        figure.suptitle(f"{table['claim']}. {table['title']}")
        with new_file(directory / plot_name(table)) as file:
            figure.savefig(file, dpi=120)
        plt.close(figure)


def _point(row: dict[str, Any], name: str) -> tuple[float, float]:
    measure = row["measures"].get(name)
    if measure is None:
        return np.nan, 0.0
    return 100 * measure["mean"], 100 * (measure["half_width"] or 0.0)


def _lines(table: Table) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, name in zip(axes, ("linear_top1", "knn_top1", "ten_shot_top1"), strict=True):
        for series in dict.fromkeys(row["series"] for row in table["rows"]):
            rows = [row for row in table["rows"] if row["series"] == series]
            means, halves = zip(*(_point(row, name) for row in rows), strict=True)
            label = series.replace("_", " ")
            axis.errorbar(
                [row["x"] for row in rows], means, halves, marker="o", capsize=3, label=label
            )
        if max(row["x"] for row in table["rows"]) > 8:
            axis.set_xscale("log", base=2)
        axis.set_xlabel(table["axis"])
        axis.set_ylabel(f"{SHARES[name]} top-1, %")
    axes[0].legend()
    return figure


def _bars(table: Table) -> Any:
    names = [n for n in ("linear_top1", "knn_top1", "ten_shot_top1", "joint_code_accuracy")]
    height = 1.2 + 0.35 * len(table["rows"])
    figure, axes = plt.subplots(
        1, len(names), figsize=(14, height), layout="constrained", sharey=True
    )
    labels = [f"{row['series'].replace('_', ' ')} {row['x']}".strip() for row in table["rows"]]
    places = np.arange(len(labels))
    for axis, name in zip(axes, names, strict=True):
        means, halves = zip(*(_point(row, name) for row in table["rows"]), strict=True)
        axis.errorbar(means, places, xerr=halves, fmt="o", capsize=3)
        axis.set_xlabel(f"{SHARES[name]}, %")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(places, labels)
    axes[0].invert_yaxis()
    return figure


def _heat_maps(table: Table) -> Any:
    """Segments by factors: normalized mutual information, of each setting's first seed."""
    rows = [row for row in table["rows"] if row.get("factor_nmi")]
    columns = min(len(rows), 4)
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.2 * columns, 4.2 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        nmi = np.asarray(row["factor_nmi"][0])  # [segments, factors]
        order = np.lexsort((-nmi.max(axis=1), nmi.argmax(axis=1)))
        image = axis.imshow(nmi[order], vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_xticks(range(len(row["factors"])), row["factors"], rotation=90)
        axis.set_ylabel("segments")
        axis.set_yticks([])
        axis.set_title(row["x"], fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.5, label="NMI")
    return figure
