"""Writes the tables and plots of the claims, and the section of RESULTS.md with findings."""

import csv
import io
import shlex
import sys
import urllib.parse
import warnings
from typing import Any

import matplotlib
import numpy as np
import scipy.stats
from etils import epath

from music_jax.claims.sweep import MEASURES, SHARES, Sweep, Table
from music_jax.distributed import progress
from music_jax.workdir.files import new_file, write_json, write_new

matplotlib.use("agg")

from matplotlib import pyplot as plt

# Measures in the table of each claim.
_SHOWN = {
    1: "linear_top1 knn_top1 ten_shot_top1 all_factors_top1 segment_accuracy joint_code_accuracy",
    5: "linear_top1 knn_top1 embedding_rankme usage_entropy dead_units segment_information"
    " segments_label_nmi_mean joint_code_accuracy",
    6: "linear_top1 knn_top1 ten_shot_top1 usage_entropy joint_code_accuracy",
    7: "linear_top1 knn_top1 joint_code_accuracy usage_entropy",
}
_SHOWN_ELSE = "linear_top1 knn_top1 ten_shot_top1 all_factors_top1"
_PROBES = ("linear_top1", "knn_top1", "ten_shot_top1")

_PREAMBLE = """# Results: the paper's claims, put to the test

Every table is written by `python -m music_jax.claims ... --results=RESULTS.md` from the runs' own
files. Entries are means ± half-widths of 95 % Student-t intervals over seeds; accuracies are in
percent on the whole test split. The intervals show how seeds vary, not how test sets do. A learning
rate with * was the smallest or largest that was tried, so another one may be better. Differences
have 95 % intervals of Welch's t-test, without a correction for their number. These are small
images, small backbones and short runs: nothing here says how the methods compare on ImageNet.
"""


def write_tables(tables: list[Table], directory: epath.Path) -> None:
    """Writes claims.json, claims.csv and claims.md."""
    write_json(directory / "claims.json", {"claims": tables})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    key = ("series", "x", "setting", "learning_rate", "seeds", "diverged")
    writer.writerow(("claim", *key, "measure", "mean", "half_width_95"))
    for table in tables:
        for row in table["rows"]:
            first = [table["claim"], *(row[name] for name in key)]
            for name, measure in row["measures"].items():
                writer.writerow([*first, name, measure["mean"], measure["half_width"]])
    write_new(directory / "claims.csv", text.getvalue().encode())
    sections = (f"## {t['claim']}. {t['title']}\n\n{markdown(t)}" for t in tables)
    write_new(directory / "claims.md", ("\n\n".join(sections) + "\n").encode())


def markdown(table: Table) -> str:
    """Formats a claim's table in Markdown."""
    header, rows = _cells(table)
    rule = ["---" if i < 2 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def as_text(tables: list[Table]) -> str:
    """Formats all tables for a terminal."""
    return "\n".join(
        f"\n{table['claim']}. {table['title']}\n{progress.table(*_cells(table))}"
        for table in tables
    )


def _cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a claim's table, with the measures that any row has."""
    shown = _SHOWN.get(table["claim"], _SHOWN_ELSE).split()
    names = [name for name in shown if any(name in row["measures"] for row in table["rows"])]
    header = ["", table["axis"], *(MEASURES[name] for name in names), "rate", "seeds"]
    rows = []
    for row in table["rows"]:
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        seeds = f"{row['seeds']}/{row['seeds_wanted']}"
        if row["diverged"]:
            seeds += f", {row['diverged']} diverged"
        values = [_format(name, row["measures"].get(name)) for name in names]
        line = [str(row["x"]), *values, rate + "*" * row["rate_at_edge"], seeds]
        rows.append([_series(row), *line])
        if row.get("start"):
            values = [_format(name, row["start"].get(name)) for name in names]
            rows.append([_series(row), "that start", *values, "", ""])
    return header, rows


def _series(row: dict[str, Any]) -> str:
    return row["series"].replace("_", " ")


def _format(name: str, measure: dict[str, Any] | None) -> str:
    """Formats a measure with its interval, in percent if it is a share."""
    if measure is None:
        return ""
    factor, digits = (100, 1) if name in SHARES else (1, 0)
    text = f"{factor * measure['mean']:.{digits}f}"
    if measure["half_width"] is not None:
        text += f" ± {factor * measure['half_width']:.{digits}f}"
    return text


def write_section(path: epath.Path, sweep: Sweep, tables: list[Table]) -> None:
    """Writes or replaces the sweep's section in a Markdown file.

    The section is named after the sweep's directory. The plots and the tables as JSON and CSV are
    copied from there to `results/NAME` beside the file.
    """
    name = urllib.parse.quote(sweep.directory.resolve().name, safe="")
    beside = path.parent / "results" / name
    beside.mkdir(parents=True, exist_ok=True)
    for file in ("claims.json", "claims.csv", *map(_plot, tables)):
        if (sweep.directory / file).exists():
            (sweep.directory / file).copy(beside / file, overwrite=True)
    begin, end = f"<!-- claims: {name} -->", f"<!-- end of claims: {name} -->"
    section = f"{begin}\n{_section(sweep, tables, name)}\n{end}"
    text = path.read_text() if path.exists() else _PREAMBLE
    before, found, rest = text.partition(begin)
    if found and end in rest:
        text = before + section + rest.partition(end)[2]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    write_new(path, text.encode())


def _plot(table: Table) -> str:
    return f"claim-{table['claim']}.png"


def _section(sweep: Sweep, tables: list[Table], name: str) -> str:
    config, settings = sweep.config, sweep.settings
    rest, held_out = settings.search_splits
    results, total = sweep.results(), sweep.num_cells()
    hours = sum(result.get("core_seconds", 0.0) for result in results) / 3600
    changes = [f"`{field}` {value!r}" for field, value in settings.overrides.items()]
    state = f"{len(results)} of {total} cells done, in {hours:.1f} hours of a CPU core."
    lines = [f"## {config.dataset.name}", "", f"{_commands(sweep)}: {state}", ""]
    if len(results) < total:
        lines += ["**The tables are not complete**: the last column gives the number of seeds.", ""]
    lines += [
        "Every run has the config's augmentations, optimizer and objective, except for "
        f"{', '.join(changes) or 'nothing'}; embedding {config.objective.num_segments} x "
        f"{config.objective.units_per_segment}, batch {config.batch_size}. Learning rates are "
        f"chosen by the linear probe's accuracy on `{held_out}` after training on `{rest}`, once, "
        "with the first seed: for each method among "
        f"{', '.join(f'{rate:g}' for rate in settings.learning_rates)}, and for its other depths, "
        f"dimensions and batch sizes among that rate and {settings.rate_step:g} times less and "
        "more. One training on few images decides, so neighboring rates may be told apart by "
        "chance. Where the objective's weights or the augmentations change, the rate stays."
    ]
    for table in tables:
        lines += ["", f"### {table['claim']}. {table['title']}", "", f"*{table['question']}*", ""]
        lines += [markdown(table), "", *(f"- {text}" for text in _findings(table))]
        if (sweep.directory / _plot(table)).exists():
            place = f"results/{urllib.parse.quote(name)}/{_plot(table)}"
            lines += ["", f"![{table['title']}]({place})"]
    return "\n".join(lines)


def _commands(sweep: Sweep) -> str:
    """Returns the commands that make the tables, one for each number of seeds."""
    config = []
    for argument, after in zip(sys.argv[1:], [*sys.argv[2:], "--"], strict=False):
        if argument.startswith(("--config", "--import")):
            config.append(argument)
            if "=" not in argument and not after.startswith("--"):
                config.append(after)
    claims: dict[int, list[str]] = {}
    for claim in sweep.tested():
        claims.setdefault(sweep.num_seeds[claim.number], []).append(str(claim.number))
    commands = [
        shlex.join([*config, f"--seeds={seeds}", f"--only={','.join(claims[seeds])}"])
        for seeds in sorted(claims, reverse=True)
    ]
    return " and ".join(f"`python -m music_jax.claims {arguments}`" for arguments in commands)


def _findings(table: Table) -> list[str]:
    rows = table["rows"]
    by_claim = {1: _objectives, 2: _dependence, 3: _dependence, 4: _dependence, 7: _factors}
    found = by_claim.get(table["claim"], _differences_from_first)(table)
    if table["claim"] == 4:
        found.append(
            "All have the same epochs, so a batch twice as large takes half the steps: a loss at a "
            "large batch may come from the number of steps."
        )
    if missing := sum(row["seeds"] < row["seeds_wanted"] for row in rows):
        found.append(f"Not complete: {missing} of {len(rows)} rows lack seeds.")
    if edge := sum(row["rate_at_edge"] for row in rows):
        found.append(f"{edge} rows took the smallest or the largest learning rate that was tried.")
    return found


def difference(a: list[float], b: list[float]) -> tuple[float, float] | None:
    """Returns the mean of a minus that of b and its 95 % half-width by Welch's t-test."""
    if min(len(a), len(b)) < 2:
        return None
    mean = float(np.mean(a) - np.mean(b))
    if np.var(a) + np.var(b) == 0:
        return mean, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # identical seeds
        interval = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return mean, float(interval.high - interval.low) / 2


def _compare(a: dict[str, Any], b: dict[str, Any], name: str = "linear_top1") -> str:
    """Formats a measure's difference between two rows."""
    found = difference(*(row["measures"].get(name, {}).get("values", []) for row in (a, b)))
    if found is None:
        return f"{SHARES[name]} too few seeds to tell"
    mean, half = (100 * value for value in found)
    verdict = "more" if mean > half else "less" if -mean > half else "no difference shown"
    return f"{SHARES[name]} {mean:+.1f} ± {half:.1f} points ({verdict})"


def _objectives(table: Table) -> list[str]:
    rows = {row["setting"]: row for row in table["rows"]}
    found = []
    for setting, row in rows.items():
        if row["series"] != "music":
            each = "; ".join(_compare(rows["music"], row, name) for name in _PROBES)
            found.append(f"MUSIC minus {setting.replace('_', ' ')}: {each}.")
    recipe = rows.get("music,full_recipe")
    if recipe and recipe["measures"]:
        found.append(
            "The config's own recipe is longer and has a larger backbone: do not compare it with "
            "the other rows."
        )
    return found


def _dependence(table: Table) -> list[str]:
    found = []
    for series, rows in _by_series(table).items():
        rows = [row for row in rows if row["measures"]]
        if len(rows) < 2:
            continue
        best = max(rows, key=lambda row: row["measures"]["linear_top1"]["mean"])
        text = f"{series}: best at {table['axis']} {best['x']}"
        for end in (min(rows, key=lambda row: row["x"]), max(rows, key=lambda row: row["x"])):
            if end is not best:
                text += f"; at {end['x']}, {_compare(end, best)}"
        found.append(text + ".")
    return found


def _by_series(table: Table) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table["rows"]:
        found.setdefault(_series(row), []).append(row)
    return found


def _differences_from_first(table: Table) -> list[str]:
    first, *others = table["rows"]
    measured = [row for row in others if row["measures"]]
    return [f"{row['x']} against {first['x']}: {_compare(row, first)}." for row in measured]


def _factors(table: Table) -> list[str]:
    rows = [row for row in table["rows"] if row.get("factor_nmi")]
    if not rows:
        return []
    names = rows[0]["factors"]
    lines = [
        "For each factor: the largest NMI that a segment has with it / the share of segments that "
        "have more with it than with any other / a linear probe's accuracy, %, means over seeds.",
        "",
        "  | | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "  |---|" + "---:|" * len(names),
    ]
    for row in rows:
        nmi = np.asarray(row["factor_nmi"])  # [seeds, segments, factors]
        largest = nmi.max(axis=1).mean(axis=0)
        most = nmi.argmax(axis=2)[..., None] == np.arange(len(names))
        share = most.mean(axis=(0, 1))
        probe = np.mean(row["factor_linear_top1"], axis=0)
        cells = [
            f"{a:.2f} / {b:.2f} / {100 * c:.0f}"
            for a, b, c in zip(largest, share, probe, strict=True)
        ]
        lines.append(f"  | {row['x']} | " + " | ".join(cells) + " |")
    return ["\n".join(lines), *_differences_from_first(table)]


def write_plots(tables: list[Table], directory: epath.Path) -> None:
    """Writes claim-N.png into a directory for each claim that has a result."""
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
        with new_file(directory / _plot(table)) as file:
            figure.savefig(file, dpi=120)
        plt.close(figure)


def _percent(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Returns the mean of a measure and its half-width for each row, in percent."""
    missing = {"mean": np.nan, "half_width": 0.0}
    measures = [row["measures"].get(name, missing) for row in rows]
    means = [100 * measure["mean"] for measure in measures]
    return means, [100 * (measure["half_width"] or 0.0) for measure in measures]


def _lines(table: Table) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, name in zip(axes, _PROBES, strict=True):
        for label, rows in _by_series(table).items():
            x, (means, halves) = [row["x"] for row in rows], _percent(rows, name)
            axis.errorbar(x, means, halves, marker="o", capsize=3, label=label)
        if max(row["x"] for row in table["rows"]) > 8:
            axis.set_xscale("log", base=2)
        axis.set_xlabel(table["axis"])
        axis.set_ylabel(f"{SHARES[name]} top-1, %")
    axes[0].legend()
    return figure


def _bars(table: Table) -> Any:
    labels = [f"{_series(row)} {row['x']}".strip() for row in table["rows"]]
    size = (14, 1.2 + 0.35 * len(labels))
    figure, axes = plt.subplots(1, 4, figsize=size, layout="constrained", sharey=True)
    for axis, name in zip(axes, (*_PROBES, "joint_code_accuracy"), strict=True):
        means, halves = _percent(table["rows"], name)
        axis.errorbar(means, range(len(labels)), xerr=halves, fmt="o", capsize=3)
        axis.set_xlabel(f"{SHARES[name]}, %")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    return figure


def _heat_maps(table: Table) -> Any:
    """Plots the normalized mutual information of segments and factors, of each first seed."""
    rows = [row for row in table["rows"] if row.get("factor_nmi")]
    columns = min(len(rows), 4)
    lines = -(-len(rows) // columns)
    size = (3.2 * columns, 4.2 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
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
