"""What came out: the table of each claim, with means and intervals over the seeds."""

import csv
import io
from typing import Any

import numpy as np
from etils import epath

from music_jax.claims.cells import Cell, Sweep
from music_jax.claims.grid import Point
from music_jax.distributed import progress
from music_jax.metrics.few_shot import mean_interval
from music_jax.workdir.files import write_json, write_new

# What a claim's table shows, and how it is called; of shares, in percent.
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
    """The table of each claim of a sweep, from the cells that are done.

    Returns:
      Of each claim its number, title, question, axis and rows. A row has its series, its x, the
      setting, the learning rate (None while unknown) and whether it was the least or the largest
      that was tried, how many seeds are done of how many, how many of them diverged, and each
      measure's mean, half-width of the 95 % interval (None for a single seed) and values. Those of
      claim 7 also have the factors, and each seed's figures of each factor.
    """
    return [
        {
            "claim": claim.number,
            "title": claim.title,
            "question": claim.question,
            "axis": claim.axis,
            "rows": [_row(sweep, point, of_factors=claim.number == 7) for point in claim.points],
        }
        for claim in sweep.claims
    ]


def _row(sweep: Sweep, point: Point, *, of_factors: bool) -> dict[str, Any]:
    setting = point.setting
    rates, best = sweep.rates(setting), sweep.best_rate(setting)
    found: list[dict[str, Any]] = []
    if best is not None:
        done = (sweep.result(cell) for cell in sweep.final_cells(setting, best))
        found = [result for result in done if result is not None]
    row: dict[str, Any] = {
        "series": point.series,
        "x": point.x,
        "setting": setting.name,
        "learning_rate": best,
        "search": {} if rates is None or len(rates) == 1 else _search(sweep, point, rates),
        "rate_at_edge": rates is not None and len(rates) > 1 and best in (rates[0], rates[-1]),
        "seeds": len(found),
        "seeds_wanted": sweep.num_seeds,
        "diverged": sum("diverged" in result for result in found),
        "core_seconds": [result["core_seconds"] for result in found],
    }
    whole = [result for result in found if "diverged" not in result]
    row["measures"] = _measures(whole)
    starts = [result["start"] for result in whole if result.get("start")]
    if starts:
        row["start"] = _measures(starts)
    if of_factors and whole and "factors" in whole[0]:
        row["factors"] = whole[0]["factors"]
        row["factor_linear_top1"] = [r["factor_linear_top1"] for r in whole]
        row["factor_nmi"] = [r["factor_nmi"] for r in whole if "factor_nmi" in r]
    return row


def _search(sweep: Sweep, point: Point, rates: tuple[float, ...]) -> dict[str, float | None]:
    """Validation accuracy of each learning rate; None where it is missing or diverged."""
    found = {}
    for rate in rates:
        result = sweep.result(Cell(point.setting, rate, sweep.config.seed, True)) or {}
        found[f"{rate:g}"] = result.get("linear_top1")
    return found


def _measures(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    results = [
        result | {"all_factors_top1": float(np.mean(result["factor_linear_top1"]))}
        if "factor_linear_top1" in result
        else result
        for result in results
    ]
    measures = {}
    for name in (*SHARES, *NUMBERS):
        values = [result[name] for result in results if name in result]
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
    """The file of a claim's plot, in the sweep's directory."""
    return f"claim-{table['claim']}.png"


def columns(table: Table) -> list[str]:
    """The measures that a claim's table shows: those that any row has."""
    shown = _SHOWN.get(table["claim"], _SHOWN_ELSE)
    return [name for name in shown if any(name in row["measures"] for row in table["rows"])]


def cells_of(table: Table) -> tuple[list[str], list[list[str]]]:
    """A claim's table as text: the header, and the rows."""
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
    """A measure with its interval, in percent if it is a share."""
    if measure is None:
        return ""
    factor, digits = (100, 1) if name in SHARES else (1, 0)
    text = f"{factor * measure['mean']:.{digits}f}"
    if measure["half_width"] is not None:
        text += f" ± {factor * measure['half_width']:.{digits}f}"
    return text


def markdown(table: Table) -> str:
    """A claim's table in Markdown."""
    header, rows = cells_of(table)
    rule = ["---" if i < 2 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def as_text(tables: list[Table]) -> str:
    """All tables for a terminal."""
    parts = []
    for table in tables:
        header, rows = cells_of(table)
        parts.append(f"\n{table['claim']}. {table['title']}\n{progress.table(header, rows)}")
    return "\n".join(parts)
