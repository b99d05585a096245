"""The table of each claim: means and intervals over the seeds."""

import csv
import io
from typing import Any

import numpy as np
from etils import epath

from music_jax.claims.grid import Claim, Point
from music_jax.claims.sweep import Sweep
from music_jax.distributed import progress
from music_jax.metrics.few_shot import mean_interval
from music_jax.workdir.files import write_json, write_new

# Measures and their headings; shares are shown in percent.
SHARES = {
    "linear_top1": "linear",
    "knn_top1": "kNN",
    "ten_shot_top1": "10-shot",
    "all_factors_top1": "all factors",
    "segment_accuracy": "one segment's clusters",
    "joint_code_accuracy": "joint code's clusters",
    "segments_label_nmi_mean": "NMI with labels",
    "segment_information": "MI of segments / log K",
    "usage_entropy": "usage entropy / log K",
    "dead_units": "dead units",
    "confidence": "confidence",
}
NUMBERS = {"rankme": "RankMe", "embedding_rankme": "RankMe of embeddings"}
_SHOWN = {
    1: (
        "linear_top1",
        "knn_top1",
        "ten_shot_top1",
        "all_factors_top1",
        "segment_accuracy",
        "joint_code_accuracy",
    ),
    5: (
        "linear_top1",
        "knn_top1",
        "embedding_rankme",
        "usage_entropy",
        "dead_units",
        "segment_information",
        "segments_label_nmi_mean",
        "joint_code_accuracy",
    ),
    6: ("linear_top1", "knn_top1", "ten_shot_top1", "usage_entropy", "joint_code_accuracy"),
    7: ("linear_top1", "knn_top1", "joint_code_accuracy", "usage_entropy"),
}
_SHOWN_ELSE = ("linear_top1", "knn_top1", "ten_shot_top1", "all_factors_top1")

Table = dict[str, Any]


def collect(sweep: Sweep) -> list[Table]:
    """Returns the table of each claim of a sweep, from the cells that are done.

    Returns:
      Number, title, question, axis and rows of each claim. A row has its series, its x, the
      setting, the learning rate (None while unknown), the validation accuracy of each rate that was
      searched, whether the rate was the smallest or largest of these, the number of seeds that are
      done, that are wanted and that diverged, and each measure's mean, half-width of the 95 %
      interval (None for a single seed) and values. Rows of claim 7 also have the factors and each
      seed's measures of them.
    """
    return [
        {
            "claim": claim.number,
            "title": claim.title,
            "question": claim.question,
            "axis": claim.axis,
            "rows": [_row(sweep, claim, point) for point in claim.points],
        }
        for claim in sweep.claims
    ]


def _row(sweep: Sweep, claim: Claim, point: Point) -> dict[str, Any]:
    setting, num_seeds = point.setting, sweep.num_seeds[claim.number]
    best = sweep.best_rate(setting)
    search = {
        cell.learning_rate: (sweep.result(cell) or {}).get("linear_top1")
        for cell in sweep.search_cells(setting)
    }
    done = [sweep.result(cell) for cell in sweep.final_cells(setting, num_seeds)]
    results = [result for result in done if result is not None]
    row: dict[str, Any] = {
        "series": point.series,
        "x": point.x,
        "setting": setting.name,
        "learning_rate": best,
        "search": {f"{rate:g}": top1 for rate, top1 in search.items()},
        "rate_at_edge": bool(search) and best in (min(search), max(search)),
        "seeds": len(results),
        "seeds_wanted": num_seeds,
        "diverged": sum("diverged" in result for result in results),
        "core_seconds": [result["core_seconds"] for result in results],
    }
    finished = [result for result in results if "diverged" not in result]
    row["measures"] = _measures(finished)
    starts = [result["start"] for result in finished if result.get("start")]
    if starts:
        row["start"] = _measures(starts)
    if claim.number == 7 and finished and "factors" in finished[0]:
        row["factors"] = finished[0]["factors"]
        row["factor_linear_top1"] = [r["factor_linear_top1"] for r in finished]
        row["factor_nmi"] = [r["factor_nmi"] for r in finished if "factor_nmi" in r]
    return row


def _measures(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    results = [
        result | {"all_factors_top1": float(np.mean(result["factor_linear_top1"]))}
        if "factor_linear_top1" in result
        else result
        for result in results
    ]
    measures = {}
    for name in (*SHARES, *NUMBERS):
        values = [result[name] for result in results if result.get(name) is not None]
        if values:
            mean, half_width = mean_interval(values)
            half = None if np.isnan(half_width) else half_width
            measures[name] = {"mean": mean, "half_width": half, "values": values}
    return measures


def write(tables: list[Table], directory: epath.Path) -> None:
    """Writes claims.json, claims.csv and claims.md."""
    write_json(directory / "claims.json", {"claims": tables})
    write_new(directory / "claims.csv", _as_csv(tables).encode())
    text = "\n\n".join(f"## {t['claim']}. {t['title']}\n\n{markdown(t)}" for t in tables)
    write_new(directory / "claims.md", f"{text}\n".encode())


def _as_csv(tables: list[Table]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ("claim", "series", "x", "setting", "learning_rate", "seeds", "diverged", "measure")
    writer.writerow((*head, "mean", "half_width_95"))
    for table in tables:
        for row in table["rows"]:
            key = [table["claim"], *(row[name] for name in head[1:7])]
            for name, measure in row["measures"].items():
                writer.writerow([*key, name, measure["mean"], measure["half_width"]])
    return text.getvalue()


def plot_name(table: Table) -> str:
    """Returns the file name of a claim's plot."""
    return f"claim-{table['claim']}.png"


def columns(table: Table) -> list[str]:
    """Returns the measures that a claim's table shows: those that any row has."""
    shown = _SHOWN.get(table["claim"], _SHOWN_ELSE)
    return [name for name in shown if any(name in row["measures"] for row in table["rows"])]


def cells_of(table: Table) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a claim's table as text."""
    names = columns(table)
    header = ["", table["axis"], *({**SHARES, **NUMBERS}[name] for name in names)]
    header += ["rate", "seeds"]
    rows = []
    for row in table["rows"]:
        values = [show(name, row["measures"].get(name)) for name in names]
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        seeds = f"{row['seeds']}/{row['seeds_wanted']}"
        if row["diverged"]:
            seeds += f", {row['diverged']} diverged"
        series = row["series"].replace("_", " ")
        rows.append([series, str(row["x"]), *values, rate + "*" * row["rate_at_edge"], seeds])
        if row.get("start"):
            values = [show(name, row["start"].get(name)) for name in names]
            rows.append([series, "that start", *values, "", ""])
    return header, rows


def show(name: str, measure: dict[str, Any] | None) -> str:
    """Formats a measure with its interval, in percent if it is a share."""
    if measure is None:
        return ""
    factor, digits = (100, 1) if name in SHARES else (1, 0)
    text = f"{factor * measure['mean']:.{digits}f}"
    if measure["half_width"] is not None:
        text += f" ± {factor * measure['half_width']:.{digits}f}"
    return text


def markdown(table: Table) -> str:
    """Formats a claim's table in Markdown."""
    header, rows = cells_of(table)
    rule = ["---" if i < 2 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def as_text(tables: list[Table]) -> str:
    """Formats all tables for a terminal."""
    parts = []
    for table in tables:
        header, rows = cells_of(table)
        parts.append(f"\n{table['claim']}. {table['title']}\n{progress.table(header, rows)}")
    return "\n".join(parts)
