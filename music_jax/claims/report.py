"""Writes the tables and plots of a comparison, with what they show, as Markdown, JSON and CSV."""

import csv
import io
import itertools
import shlex
import sys
from typing import Any

import matplotlib
import numpy as np
from etils import epath

from music_jax.claims.code import changed_objectives, package_codes
from music_jax.claims.planning import REFERENCES, make_plan
from music_jax.claims.sweep import Sweep
from music_jax.claims.tables import MARGIN, MEASURES, PROBES, SHARES, Row, Table, progress_of
from music_jax.distributed import progress
from music_jax.workdir.files import new_file, write_json, write_new

matplotlib.use("agg")

from matplotlib import pyplot as plt

# Measures in the table of each claim.
_SHOWN = {
    1: "linear_top1 knn_top1 ten_shot_top1 rankme embedding_rankme embedding_std",
    5: "linear_top1 knn_top1 embedding_rankme embedding_std start_embedding_std first_grad_norm",
    6: "usage_entropy dead_units segment_information null_information null_p dependent_pairs",
}
_SHOWN_ELSE = "linear_top1 knn_top1 ten_shot_top1"

_ONE_SEED = (
    "Where a rate was searched again, the validation accuracy is the best of single seeds; at the "
    "values that the search of all options chose, it is the mean of fresh seeds."
)
_NOTES = {
    2: f"Each depth has its own learning rate. {_ONE_SEED}",
    3: f"Each dimension has its own learning rate. {_ONE_SEED}",
    4: "The learning rate in this table is the peak at the config's batch size; at another size it "
    "is multiplied by the square root of the sizes' ratio, which would be constant in this column "
    f"if that were exact. At equal epochs a larger batch takes fewer steps. {_ONE_SEED}",
    5: "`constant` was trained for equal embeddings alone and `saturated` for MUSIC's invariance "
    "alone; all methods start from the same states, with one hidden layer and 512 dimensions.",
    6: "The mutual information of two segments, of 32 random ones if there are more, is compared "
    "with that of segments whose codes are permuted among the images. A pair counts as dependent "
    "if it shares more than in 95 % of the permutations.",
}


def write_report(sweep: Sweep, tables: list[Table], directory: epath.Path) -> None:
    """Writes claims.json, claims.csv, claims.md and claim-N.png into a directory."""
    write_json(directory / "claims.json", {"claims": tables})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    key = ("series", "group", "x", "seeds", "diverged")
    writer.writerow(("claim", *key, "measure", "mean", "half_width_95"))
    for table in tables:
        for row in table["rows"]:
            first = [table["claim"], *(row[name] for name in key)]
            for name, measure in row["measures"].items():
                writer.writerow([*first, name, measure["mean"], measure["half_width"]])
    write_new(directory / "claims.csv", text.getvalue().encode())
    write_new(directory / "claims.md", _markdown(sweep, tables).encode())
    for table in tables:
        if any(row["measures"] for row in table["rows"]):
            figure = _plot(table)
            with new_file(directory / f"claim-{table['claim']}.png") as file:
                figure.savefig(file, dpi=120)
            plt.close(figure)


def as_text(tables: list[Table]) -> str:
    """Formats all tables for a terminal."""
    parts = []
    for table in tables:
        header, rows = _cells(table)
        parts.append(f"\n{table['claim']}. {table['title']}\n{progress.table(header, rows)}")
        parts += [f"- {line}" for line in findings(table)]
    return "\n".join(parts)


def _shared_arguments(arguments: list[str]) -> list[str]:
    """Returns the arguments of a command without those that only matter on this machine."""
    shared, is_value = [], False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        if is_value:  # of the flag before it
            is_value = False
        elif name in ("output", "runs", "worker"):
            is_value = not equals
        elif name != "tables_only":
            shared.append(argument)
    return shared


def _markdown(sweep: Sweep, tables: list[Table]) -> str:
    plan = make_plan(sweep)
    done, total, hours = progress_of(sweep, plan)
    command = shlex.join(["python", "-m", "music_jax.claims", *_shared_arguments(sys.argv[1:])])
    lines = [f"# {sweep.config.dataset.name}", ""]
    lines += [f"`{command}`: {done} of {total} cells done, in {hours:.1f} hours of a CPU core.", ""]
    made_by = package_codes(sweep, plan.cells)
    if len(made_by) > 1:
        counts = ", ".join(f"{code or 'unknown'} {count}" for code, count in made_by.most_common())
        lines += [
            f"**Results of different code**: {counts}. A difference between methods may be one "
            "between versions of the code.",
            "",
        ]
    if changed := changed_objectives(sweep, plan.cells):
        lines += [
            f"**Changed between results**: the files that define {', '.join(changed)}. Some of "
            "these results are those of an earlier version.",
            "",
        ]
    if done < total:
        lines += ["**Not complete**: the last column gives the number of seeds.", ""]
    lines += [
        f"Trained on `{sweep.images.train}` for {sweep.final_epochs} epochs in batches of "
        f"{sweep.config.batch_size}; options were chosen on `{sweep.images.validation}`, and the "
        f"accuracies are those on `{sweep.config.dataset.test_split}`, which each final run was "
        "measured on once. Accuracies, usage and information are in percent. ± is the half-width "
        "of a 95 % Student-t interval over seeds. An option with * has the smallest or the largest "
        "value that was tried. Intervals in brackets are 95 %: over seeds (paired t), and, with "
        "eight seeds or more, over seeds and test images (crossed bootstrap). p-values are "
        "adjusted by Holm's method within each family of tests, which in claims 2 to 5 are those "
        "of one method."
    ]
    for table in tables:
        lines += ["", f"## {table['claim']}. {table['title']}", "", f"*{table['question']}*", ""]
        header, rows = _cells(table)
        rule = ["---" if i < 2 else "---:" for i in range(len(header))]
        lines += ["| " + " | ".join(line) + " |" for line in (header, rule, *rows)]
        if note := _NOTES.get(table["claim"]):
            lines += ["", note]
        lines += ["", *(f"- {line}" for line in findings(table))]
        if any(row["measures"] for row in table["rows"]):
            lines += ["", f"![{table['title']}](claim-{table['claim']}.png)"]
    return "\n".join(lines) + "\n"


def _cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a claim's table, with the measures that any row has."""
    rows = table["rows"]
    shown = _SHOWN.get(table["claim"], _SHOWN_ELSE).split()
    names = [name for name in shown if any(name in row["measures"] for row in rows)]
    if table["claim"] == 1:
        missing = {"mean": -1.0}
        rows = sorted(rows, key=lambda row: -row["measures"].get("linear_top1", missing)["mean"])
    header = ["", *([table["quantity"]] * bool(table["quantity"]))]
    header += [*(MEASURES[name] for name in names), "validation", "chosen", "seeds"]
    lines = []
    for row in rows:
        seeds = f"{row['seeds']}/{row['seeds_wanted'] or '?'}"
        seeds += f", {row['diverged']} diverged" if row["diverged"] else ""
        x = [f"{row['x']}, {row['group']}" if row["group"] else str(row["x"])]
        top1 = row["validation_top1"]
        lines.append([
            _name(row["series"]),
            *(x * bool(table["quantity"])),
            *(_format(name, row["measures"].get(name)) for name in names),
            "" if top1 is None else f"{100 * top1:.1f}",
            _chosen(row),
            seeds,
        ])  # fmt: skip
    return header, lines


def _chosen(row: Row) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value}{'*' * (name in row['at_edge'])}"
        for name, value in (row["choice"] or {}).items()
    )


def _name(series: str) -> str:
    return series.replace("_", " ")


def _format(name: str, measure: dict[str, Any] | None) -> str:
    """Formats a measure with its interval, in percent if it is a share."""
    if measure is None:
        return ""
    if name in ("null_p", "first_grad_norm", "embedding_std", "start_embedding_std"):
        return f"{measure['mean']:.2g}"
    factor, digits = (100, 1) if name in SHARES else (1, 0)
    text = f"{factor * measure['mean']:.{digits}f}"
    if measure["half_width"] is not None:
        text += f" ± {factor * measure['half_width']:.{digits}f}"
    return text


def findings(table: Table) -> list[str]:
    """Returns a sentence for each test of a table, and for what is missing."""
    lines = [_sentence(table, test) for test in table["tests"]]
    rows = table["rows"]
    if table["claim"] == 6:
        lines += [line for row in rows if "factor_nmi" in row for line in _factor_lines(row)]
    if edge := sum(bool(row["at_edge"]) for row in rows):
        lines.append(f"Rows with an option at the end of the values that were tried: {edge}.")
    if missing := sum(
        not row["seeds_wanted"] or row["seeds"] < row["seeds_wanted"] for row in rows
    ):
        lines.append(f"Not complete: {missing} of {len(rows)} rows lack seeds.")
    return lines


def _sentence(table: Table, test: Row) -> str:
    a, b = (_place(table, test[side]) for side in "ab")
    mean, low, high = (100 * test[name] for name in ("mean", "low", "high"))
    text = f"{a} minus {b}, {SHARES[test['measure']]}: {mean:+.2f} points "
    if test["kind"] == "equivalence":
        text += f"[{low:+.2f}, {high:+.2f}] (90 %), margin ± {100 * MARGIN:g}"
    else:
        text += f"[{low:+.2f}, {high:+.2f}]"
    if "bootstrap" in test:
        text += " and [{:+.2f}, {:+.2f}]".format(*(100 * value for value in test["bootstrap"]))
    text += f", {test['seeds']} seeds"
    family = f" ({test['family']})" if table["claim"] == 1 else ""
    return f"{text}, p = {test['p_holm']:.2g}{family}: {test['verdict']}."


def _place(table: Table, side: Row) -> str:
    text = _name(side["series"])
    if table["quantity"]:
        text += f" at {table['quantity']} {side['x']}"
    return text + (f", {side['group']}" if side["group"] else "")


def _factor_lines(row: Row) -> list[str]:
    """Describes which factors the segments of a row share most information with."""
    nmi = np.asarray(row["factor_nmi"])  # [seeds, segments, factors]
    most = nmi.argmax(axis=2)[..., None] == np.arange(nmi.shape[2])
    used = most.any(axis=1).sum(axis=1).mean()
    shares = most.mean(axis=(0, 1))
    names = [
        f"{_name(name)} {100 * share:.0f} %"
        for share, name in sorted(zip(shares, row["factors"], strict=True), reverse=True)
        if share > 0
    ]
    return [
        f"{_name(row['series'])}: the factor with which a segment shares the most information is "
        f"{', '.join(names)} of the segments; {used:.1f} of {nmi.shape[2]} factors in a run."
    ]


def _plot(table: Table) -> Any:
    numbers = all(isinstance(row["x"], int) for row in table["rows"])
    return _lines(table) if numbers and table["quantity"] else _dots(table)


def _lines(table: Table) -> Any:
    groups = list(dict.fromkeys(row["group"] for row in table["rows"]))
    size = (5 * len(groups) + 1, 4)
    figure, axes = plt.subplots(1, len(groups), figsize=size, layout="constrained", squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        rows = [r for r in table["rows"] if r["group"] == group and "linear_top1" in r["measures"]]
        for series, members in itertools.groupby(rows, lambda row: row["series"]):
            line = list(members)
            means, halves = _percent(line, "linear_top1")
            x = [row["x"] for row in line]
            axis.errorbar(x, means, halves, marker="o", capsize=3, label=_name(series))
        if max((row["x"] for row in rows), default=0) > 8:
            axis.set_xscale("log", base=2)
        axis.set(xlabel=table["quantity"], ylabel="linear top-1, %", title=group)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(f"{table['claim']}. {table['title']}")
    return figure


def _dots(table: Table) -> Any:
    names = [name for name in PROBES if any(name in row["measures"] for row in table["rows"])]
    names = ["segment_information", "null_information"] if table["claim"] == 6 else names
    rows = sorted(table["rows"], key=lambda row: row["series"] in REFERENCES)
    size = (4.5 * len(names) + 1.5, 1.4 + 0.32 * len(rows))
    figure, axes = plt.subplots(
        1, len(names), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        means, halves = _percent(rows, name)
        axis.errorbar(means, range(len(rows)), xerr=halves, fmt="o", capsize=3)
        axis.set_xlabel(f"{SHARES[name]}, %")
        axis.grid(alpha=0.3)
    axes[0, 0].set_yticks(range(len(rows)), [f"{_name(r['series'])} {r['x']}" for r in rows])
    axes[0, 0].invert_yaxis()
    figure.suptitle(f"{table['claim']}. {table['title']}")
    return figure


def _percent(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    """Returns the mean of a measure and its half-width for each row, in percent."""
    missing = {"mean": np.nan, "half_width": 0.0}
    measures = [row["measures"].get(name, missing) for row in rows]
    means = [100 * measure["mean"] for measure in measures]
    return means, [100 * (measure["half_width"] or 0.0) for measure in measures]
