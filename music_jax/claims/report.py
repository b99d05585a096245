"""The section of RESULTS.md that a sweep makes: tables, and what they show and do not show."""

import re
import shlex
import sys
import urllib.parse
import warnings
from typing import Any

import numpy as np
import scipy.stats
from etils import epath

from music_jax.claims.cells import Sweep
from music_jax.claims.results import Table, markdown, plot_name
from music_jax.workdir.files import write_new

_PREAMBLE = """# Results: the paper's claims, put to the test

Every table is written by `python -m music_jax.claims ... --results=RESULTS.md` from the runs' own
files. Means ± half-widths of 95 % Student-t intervals over seeds; accuracies in percent on the
whole test split. The intervals tell how seeds vary, not how another test set would. A learning rate
with * was the least or the largest that was tried, so that another one may be better. Differences
are Welch's, with 95 % intervals, without a correction for how many there are. These are small
images, small backbones and short runs: nothing here says how the methods compare on ImageNet.
"""

_INCOMPLETE = "**The tables are not complete**: the last column says how many seeds there are."


def write_section(path: epath.Path, sweep: Sweep, tables: list[Table]) -> None:
    """Puts the sweep's section into a Markdown file, in the place of an earlier one.

    The section has the name of the sweep's directory, so that sweeps of two configs keep theirs.

    The plots and the tables as JSON and CSV, which are in the sweep's directory already, are copied
    to `results/NAME` beside it.
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
    done = sum(
        sweep.result(cell) is not None
        for setting in sweep.settings_in_order()
        for cell in sweep.cells(setting)
    )
    total, hours = sweep.num_cells(), _core_seconds(sweep) / 3600
    changes = [f"`{name}` {value!r}" for name, value in settings.overrides.items()]
    state = f"{done} of {total} cells done, in {hours:.1f} hours of a CPU core."
    lines = [
        f"## {config.dataset.name}",
        "",
        f"`python -m music_jax.claims {_arguments(sweep)}`: {state}",
        "",
        "Every run has the config's augmentations, optimizer and objective, but for "
        f"{', '.join(changes) or 'nothing'}; embedding {config.objective.num_segments} x "
        f"{config.objective.units_per_segment}, batch {config.batch_size}. Learning rates are "
        f"chosen by the linear probe's accuracy on `{held_out}` after training on `{rest}`, once, "
        "with the first seed: for each method alone among "
        f"{', '.join(f'{rate:g}' for rate in settings.learning_rates)}, and for its other depths, "
        f"dimensions and batch sizes among that one and what is {settings.rate_step:g} times less "
        "and more. One training judges a rate, on few images: neighboring rates may be told apart "
        "by chance. Where the objective's weights or the augmentations change, the rate stays.",
    ]
    if done < total:
        lines[3:3] = ["", _INCOMPLETE]
    for table in tables:
        lines += ["", f"### {table['claim']}. {table['title']}", "", f"*{table['question']}*", ""]
        lines += [markdown(table), ""]
        lines += [f"- {text}" for text in _findings(table)]
        if (sweep.directory / plot_name(table)).exists():
            place = f"results/{urllib.parse.quote(_name(sweep))}/{plot_name(table)}"
            lines += ["", f"![{table['title']}]({place})"]
    return "\n".join(lines)


def _arguments(sweep: Sweep) -> str:
    """What makes the tables that are shown, and not the last call's share of them alone."""
    kept = [a for a in sys.argv[1:] if a.startswith("--config")]
    kept.append(f"--seeds={sweep.num_seeds}")
    kept.append(f"--only={','.join(str(claim.number) for claim in sweep.claims)}")
    return " ".join(shlex.quote(argument) for argument in kept)


def _core_seconds(sweep: Sweep) -> float:
    return sum(
        (sweep.result(cell) or {}).get("core_seconds", 0.0)
        for setting in sweep.settings_in_order()
        for cell in sweep.cells(setting)
    )


def _findings(table: Table) -> list[str]:
    by_claim = {1: _objectives, 2: _dependence, 3: _dependence, 4: _dependence, 7: _factors}
    found = by_claim.get(table["claim"], _against_the_first)(table)
    if table["claim"] == 4:
        found.append(
            "The epochs are the same for all, so a batch twice as large takes half the steps: a "
            "loss at a large batch may be one of steps."
        )
    missing = [r for r in table["rows"] if r["seeds"] < r["seeds_wanted"]]
    if missing:
        found.append(f"Not complete: {len(missing)} of {len(table['rows'])} rows lack seeds.")
    edge = [r for r in table["rows"] if r["rate_at_edge"]]
    if edge:
        found.append(
            f"{len(edge)} rows took the least or the largest learning rate that was tried."
        )
    return found


def _values(row: dict[str, Any], name: str) -> list[float]:
    return row["measures"].get(name, {}).get("values", [])


def difference(a: list[float], b: list[float]) -> tuple[float, float] | None:
    """Mean of a minus that of b, and the half-width of its 95 % interval by Welch's t-test."""
    if min(len(a), len(b)) < 2:
        return None
    mean = float(np.mean(a) - np.mean(b))
    if np.var(a) + np.var(b) == 0:
        return mean, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of seeds that all came out alike
        interval = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return mean, float(interval.high - interval.low) / 2


def _says(found: tuple[float, float] | None) -> str:
    if found is None:
        return "too few seeds to say"
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
            f"{label} {_says(difference(_values(music, name), _values(row, name)))}"
            for name, label in names
        ]
        found.append(f"MUSIC minus {setting.replace('_', ' ')}: {'; '.join(each)}.")
    recipe = rows.get("music,full_recipe")
    if recipe and recipe["measures"]:
        found.append(
            "The config's own recipe is longer and has a larger backbone: it is not to be compared "
            "with the other rows."
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
                text += f"; at {end['x']}, linear {_says(change)}"
        found.append(text + ".")
    return found


def _against_the_first(table: Table) -> list[str]:
    first, *others = table["rows"]
    found = []
    for row in others:
        change = difference(_values(row, "linear_top1"), _values(first, "linear_top1"))
        if row["measures"]:
            found.append(f"{row['x']} against {first['x']}: linear {_says(change)}.")
    return found


def _factors(table: Table) -> list[str]:
    rows = [row for row in table["rows"] if row.get("factor_nmi")]
    if not rows:
        return []
    names = rows[0]["factors"]
    head = "| | " + " | ".join(name.replace("_", " ") for name in names) + " |"
    lines = [
        "Of each factor: the largest NMI that a segment has with it / the share of segments that "
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
    return ["\n".join(lines), *_against_the_first(table)]
