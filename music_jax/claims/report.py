"""Plots of the claims, and the section of RESULTS.md with tables and findings."""

import re
import shlex
import sys
import urllib.parse
import warnings
from typing import Any

import matplotlib
import numpy as np
import scipy.stats
from etils import epath

from music_jax.claims.results import SHARES, Table, markdown, plot_name
from music_jax.claims.sweep import Sweep
from music_jax.workdir.files import new_file, write_new

matplotlib.use("agg")

from matplotlib import pyplot as plt

_PREAMBLE = """# Results: the paper's claims, put to the test

Every table is written by `python -m music_jax.claims ... --results=RESULTS.md` from the runs' own
files. Entries are means ± half-widths of 95 % Student-t intervals over seeds; accuracies are in
percent on the whole test split. The intervals show how seeds vary, not how test sets do. A learning
rate with * was the smallest or largest that was tried, so another one may be better. Differences
have 95 % intervals of Welch's t-test, without a correction for their number. These are small
images, small backbones and short runs: nothing here says how the methods compare on ImageNet.
"""

_INCOMPLETE = "**The tables are not complete**: the last column gives the number of seeds."


def write_section(path: epath.Path, sweep: Sweep, tables: list[Table]) -> None:
    """Writes or replaces the sweep's section in a Markdown file.

    The section is named after the sweep's directory. The plots and the tables as JSON and CSV are
    copied from there to `results/NAME` beside the file.
    """
    name = _name(sweep)
    beside = path.parent / "results" / name
    beside.mkdir(parents=True, exist_ok=True)
    files = ["claims.json", "claims.csv", *(plot_name(table) for table in tables)]
    for file in files:
        if (sweep.directory / file).exists():
            (sweep.directory / file).copy(beside / file, overwrite=True)
    begin, end = f"<!-- claims: {name} -->", f"<!-- end of claims: {name} -->"
    section = f"{begin}\n{_section(sweep, tables)}\n{end}"
    text = path.read_text() if path.exists() else _PREAMBLE
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(text):
        text = pattern.sub(lambda _: section, text)
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    write_new(path, text.encode())


def _name(sweep: Sweep) -> str:
    return urllib.parse.quote(sweep.directory.resolve().name, safe="")


def _section(sweep: Sweep, tables: list[Table]) -> str:
    config, settings = sweep.config, sweep.settings
    rest, held_out = settings.search_splits
    results, total = sweep.results(), sweep.num_cells()
    hours = sum(result.get("core_seconds", 0.0) for result in results) / 3600
    changes = [f"`{name}` {value!r}" for name, value in settings.overrides.items()]
    state = f"{len(results)} of {total} cells done, in {hours:.1f} hours of a CPU core."
    lines = [
        f"## {config.dataset.name}",
        "",
        f"{_commands(sweep)}: {state}",
        "",
        "Every run has the config's augmentations, optimizer and objective, except for "
        f"{', '.join(changes) or 'nothing'}; embedding {config.objective.num_segments} x "
        f"{config.objective.units_per_segment}, batch {config.batch_size}. Learning rates are "
        f"chosen by the linear probe's accuracy on `{held_out}` after training on `{rest}`, once, "
        "with the first seed: for each method among "
        f"{', '.join(f'{rate:g}' for rate in settings.learning_rates)}, and for its other depths, "
        f"dimensions and batch sizes among that rate and {settings.rate_step:g} times less and "
        "more. One training on few images decides, so neighboring rates may be told apart by "
        "chance. Where the objective's weights or the augmentations change, the rate stays.",
    ]
    if len(results) < total:
        lines[3:3] = ["", _INCOMPLETE]
    for table in tables:
        lines += ["", f"### {table['claim']}. {table['title']}", "", f"*{table['question']}*", ""]
        lines += [markdown(table), ""]
        lines += [f"- {text}" for text in _findings(table)]
        if (sweep.directory / plot_name(table)).exists():
            place = f"results/{urllib.parse.quote(_name(sweep))}/{plot_name(table)}"
            lines += ["", f"![{table['title']}]({place})"]
    return "\n".join(lines)


def _commands(sweep: Sweep) -> str:
    """Returns the commands that make the tables, one for each number of seeds."""
    config = []
    for argument, after in zip(sys.argv[1:], [*sys.argv[2:], "--"], strict=False):
        if argument.startswith("--config"):
            config.append(argument)
            if "=" not in argument and not after.startswith("--"):
                config.append(after)
    commands = []
    for seeds in sorted(set(sweep.num_seeds.values()), reverse=True):
        only = ",".join(str(c.number) for c in sweep.claims if sweep.num_seeds[c.number] == seeds)
        arguments = shlex.join([*config, f"--seeds={seeds}", f"--only={only}"])
        commands.append(f"`python -m music_jax.claims {arguments}`")
    return " and ".join(commands)


def _findings(table: Table) -> list[str]:
    by_claim = {1: _objectives, 2: _dependence, 3: _dependence, 4: _dependence, 7: _factors}
    found = by_claim.get(table["claim"], _differences_from_first)(table)
    if table["claim"] == 4:
        found.append(
            "All have the same epochs, so a batch twice as large takes half the steps: a loss at a "
            "large batch may come from the number of steps."
        )
    missing = [r for r in table["rows"] if r["seeds"] < r["seeds_wanted"]]
    if missing:
        found.append(f"Not complete: {len(missing)} of {len(table['rows'])} rows lack seeds.")
    edge = [r for r in table["rows"] if r["rate_at_edge"]]
    if edge:
        found.append(
            f"{len(edge)} rows took the smallest or the largest learning rate that was tried."
        )
    return found


def _values(row: dict[str, Any], name: str) -> list[float]:
    return row["measures"].get(name, {}).get("values", [])


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


def _format_difference(found: tuple[float, float] | None) -> str:
    if found is None:
        return "too few seeds to tell"
    mean, half = (100 * value for value in found)
    verdict = "more" if mean > half else "less" if -mean > half else "no difference shown"
    return f"{mean:+.1f} ± {half:.1f} points ({verdict})"


def _objectives(table: Table) -> list[str]:
    rows = {row["setting"]: row for row in table["rows"]}
    music, found = rows["music"], []
    names = (("linear_top1", "linear"), ("knn_top1", "kNN"), ("ten_shot_top1", "10-shot"))
    for setting, row in rows.items():
        if row["series"] == "music":
            continue
        each = [
            f"{label} {_format_difference(difference(_values(music, name), _values(row, name)))}"
            for name, label in names
        ]
        found.append(f"MUSIC minus {setting.replace('_', ' ')}: {'; '.join(each)}.")
    recipe = rows.get("music,full_recipe")
    if recipe and recipe["measures"]:
        found.append(
            "The config's own recipe is longer and has a larger backbone: do not compare it with "
            "the other rows."
        )
    return found


def _dependence(table: Table) -> list[str]:
    found = []
    for series in dict.fromkeys(row["series"] for row in table["rows"]):
        rows = [r for r in table["rows"] if r["series"] == series and r["measures"]]
        if len(rows) < 2:
            continue
        best = max(rows, key=lambda row: row["measures"]["linear_top1"]["mean"])
        least = min(rows, key=lambda row: row["x"])
        largest = max(rows, key=lambda row: row["x"])
        text = f"{series.replace('_', ' ')}: best at {table['axis']} {best['x']}"
        for end in (least, largest):
            if end is not best:
                change = difference(_values(end, "linear_top1"), _values(best, "linear_top1"))
                text += f"; at {end['x']}, linear {_format_difference(change)}"
        found.append(text + ".")
    return found


def _differences_from_first(table: Table) -> list[str]:
    first, *others = table["rows"]
    found = []
    for row in others:
        change = difference(_values(row, "linear_top1"), _values(first, "linear_top1"))
        if row["measures"]:
            found.append(f"{row['x']} against {first['x']}: linear {_format_difference(change)}.")
    return found


def _factors(table: Table) -> list[str]:
    rows = [row for row in table["rows"] if row.get("factor_nmi")]
    if not rows:
        return []
    names = rows[0]["factors"]
    head = "| | " + " | ".join(name.replace("_", " ") for name in names) + " |"
    lines = [
        "For each factor: the largest NMI that a segment has with it / the share of segments that "
        "have more with it than with any other / a linear probe's accuracy, %, means over seeds."
    ]
    lines += ["", "  " + head, "  |---|" + "---:|" * len(names)]
    for row in rows:
        nmi = [np.asarray(one) for one in row["factor_nmi"]]
        largest = np.mean([one.max(axis=0) for one in nmi], axis=0)
        share = np.mean(
            [np.bincount(one.argmax(axis=1), minlength=len(names)) / len(one) for one in nmi],
            axis=0,
        )
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
    names = ("linear_top1", "knn_top1", "ten_shot_top1", "joint_code_accuracy")
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
    """Plots the normalized mutual information of segments and factors, of each first seed."""
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
