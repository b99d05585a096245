"""Tables of a comparison: the rows of each claim, and the tests of their differences."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from music_jax.claims.methods import BUILT_IN
from music_jax.claims.planning import REFERENCES, Plan, Point, make_plan
from music_jax.claims.statistics import (
    crossed_bootstrap,
    equivalence,
    holm,
    paired_difference,
)
from music_jax.claims.sweep import Sweep
from music_jax.metrics.few_shot import mean_interval

Row = dict[str, Any]
Table = dict[str, Any]

MARGIN = 0.005  # within which two accuracies count as equivalent
_BOOTSTRAP_SEEDS = 8  # below which a percentile interval over seeds is too narrow
_PRIMARY = ("barlow_twins", "vicreg")  # compared with MUSIC as the primary outcome
_MUSIC = ("music", "music_centered")
PROBES = ("linear_top1", "knn_top1", "ten_shot_top1")

# Measures and their headings; shares are shown in percent.
SHARES = {
    "linear_top1": "linear",
    "knn_top1": "kNN",
    "ten_shot_top1": "10-shot",
    "usage_entropy": "usage entropy / log K",
    "dead_units": "dead units",
    "segment_information": "MI of segments / log K",
    "null_information": "MI if independent / log K",
    "dependent_pairs": "dependent pairs",
}
MEASURES = SHARES | {
    "rankme": "RankMe",
    "embedding_rankme": "RankMe of embeddings",
    "embedding_std": "std of embeddings",
    "null_p": "p of independence",
    "first_grad_norm": "first gradient",
    "start_embedding_std": "std at the start",
}
CLAIMS = {  # title, question, quantity
    1: ("Objectives", "Is MUSIC better than Barlow Twins and VICReg?", ""),
    2: ("Projector depth", "Does MUSIC do without a deep projector?", "hidden layers"),
    3: ("Embedding dimension", "Does MUSIC do without a large embedding?", "dimension"),
    4: ("Batch size", "Does MUSIC do without a large batch?", "batch size"),
    5: ("Trivial solutions", "Does the objective itself avoid trivial solutions?", "start"),
    6: ("Segments", "Do the segments partition by different principles?", ""),
}


def make_tables(sweep: Sweep) -> list[Table]:
    """Returns the table of each claim, from the cells that are done.

    Returns:
      For each claim its number, title, question, quantity, rows and tests. A row has its series,
      its group and its x; the chosen options, their validation accuracy and those whose smallest or
      largest value was chosen; the seeds that are wanted, done and diverged; and each measure's
      mean, half-width of the 95 % interval (None for a single seed) and values. A test compares two
      rows, `a` minus `b`, in one measure: see `music_jax.claims.statistics`.
    """
    plan = make_plan(sweep)
    tables = []
    for number in sweep.claims:
        points = [point for point in plan.points if point.claim == number]
        title, question, quantity = CLAIMS[number]
        tables.append(
            {
                "claim": number,
                "title": title,
                "question": question,
                "quantity": quantity,
                "rows": [_row(sweep, point) for point in points],
                "tests": _tests(sweep, number, points),
            }
        )
    return tables


def progress_of(sweep: Sweep, plan: Plan) -> tuple[int, int, float]:
    """Returns the number of cells that are done, the number of all, and the core-hours so far."""
    results = [sweep.results.read(cell) for cell in plan.cells]
    done = [result for result in results if result is not None]
    total = max(len(plan.cells), len(make_plan(sweep, assume=True).cells))
    complete = len(done) == len(plan.cells)
    hours = sum(result["core_seconds"] for result in done) / 3600
    return len(done), len(done) if complete else total, hours


def _row(sweep: Sweep, point: Point) -> Row:
    results = [sweep.results.read(cell) for cell in point.cells]
    done = [result for result in results if result is not None]
    finished = [result for result in done if "diverged" not in result]
    row: Row = {
        "series": point.series,
        "group": point.group,
        "x": point.x,
        "choice": point.choice,
        "validation_top1": point.score,
        "at_edge": list(point.at_edge),
        "seeds": len(done),
        "seeds_wanted": len(point.cells),
        "diverged": len(done) - len(finished),
        "measures": {},
    }
    for name in MEASURES:
        values = [value for r in finished if (value := _value(r, name)) is not None]
        if values:
            mean, half = mean_interval(values)
            half_width = None if np.isnan(half) else half
            row["measures"][name] = {"mean": mean, "half_width": half_width, "values": values}
    if finished and "factors" in finished[0]:
        row["factors"] = finished[0]["factors"]
        row["factor_nmi"] = [result["factor_nmi"] for result in finished]
    return row


def _value(result: dict[str, Any], name: str) -> float | None:
    if name == "start_embedding_std":
        return result.get("start_state", {}).get("embedding_std")
    return result.get(name)


def _tests(sweep: Sweep, claim: int, points: list[Point]) -> list[Row]:
    """Returns the tests of a claim, with p-values adjusted within each family."""
    match claim:
        case 1:
            pairs = _objective_tests(sweep, points)
        case 2 | 3:
            pairs = _option_tests(sweep, points)
        case 4:
            pairs = _base_tests(sweep, points, sweep.config.batch_size)
        case 5:
            pairs = _base_tests(sweep, points, "random")
        case _:
            pairs = []
    tests = [test for test in pairs if test is not None]
    for _, members in itertools.groupby(
        sorted(tests, key=lambda test: test["family"]), lambda test: test["family"]
    ):
        family = list(members)
        for test, p in zip(family, holm([test["p"] for test in family]), strict=True):
            test["p_holm"] = p
    for test in tests:
        test["verdict"] = _verdict(test)
    return tests


def _verdict(test: Row) -> str:
    shown = test["p_holm"] < 0.05
    if test["kind"] == "equivalence":
        return "equivalent" if shown else "equivalence not shown"
    if not shown:
        return "no difference shown"
    return "more" if test["mean"] > 0 else "less"


def better_music(points: Iterable[Point]) -> Point | None:
    """Returns the row of MUSIC, plain or centered, with the better validation accuracy."""
    found = [point for point in points if point.series in _MUSIC and point.score is not None]
    return max(found, key=lambda point: point.score or 0.0, default=None)


def _objective_tests(sweep: Sweep, points: list[Point]) -> list[Row | None]:
    tests = []
    rows = {point.series: point for point in points if point.series not in REFERENCES}
    others = [point for name, point in rows.items() if name not in _MUSIC]
    if (music := better_music(points)) is not None:
        for measure, other in itertools.product(PROBES, others):
            primary = measure == "linear_top1" and other.series in _PRIMARY
            family = "primary" if primary else f"secondary, {SHARES[measure]}"
            tests.append(_compare(sweep, family, music, other, measure))
    if {*_MUSIC} <= rows.keys():
        pair = rows["music_centered"], rows["music"]
        tests += [_compare(sweep, "centering", *pair, measure) for measure in PROBES]
    for own in (point for point in others if point.series not in BUILT_IN):
        rivals = [point for point in rows.values() if point is not own]
        tests += [_compare(sweep, own.series, own, rival, "linear_top1") for rival in rivals]
    return tests


def _option_tests(sweep: Sweep, points: list[Point]) -> list[Row | None]:
    """Compares each value of an option with the one that the method's search chose."""
    tests = []
    for series, members in itertools.groupby(points, lambda point: point.series):
        row = list(members)
        finals = [point for point in row if any("final/" in cell.name for cell in point.cells)]
        for point in row if finals else ():
            if point is not finals[0]:
                tests.append(
                    _compare(sweep, series, point, finals[0], "linear_top1", equivalent=True)
                )
    return tests


def _base_tests(sweep: Sweep, points: list[Point], x: Any) -> list[Row | None]:
    """Compares each row with the one at `x` of the same series and group."""
    tests = []
    for point in points:
        base = next(p for p in points if (p.series, p.group, p.x) == (point.series, point.group, x))
        if point is not base:
            tests.append(_compare(sweep, point.series, point, base, "linear_top1"))
    return tests


def _compare(
    sweep: Sweep, family: str, a: Point, b: Point, measure: str, *, equivalent: bool = False
) -> Row | None:
    """Tests the difference of two rows over the seeds that both have; None if there are too few."""
    read = sweep.results.read
    seeds = [
        i
        for i, pair in enumerate(zip(a.cells, b.cells, strict=False))
        if all(measure in (read(cell) or {}) for cell in pair)
    ]
    cells = [[point.cells[i] for i in seeds] for point in (a, b)]
    values = [[read(cell)[measure] for cell in side] for side in cells]  # type: ignore[index]
    found = equivalence(*values, margin=MARGIN) if equivalent else paired_difference(*values)
    if found is None:
        return None
    test: Row = {
        "family": family,
        "kind": "equivalence" if equivalent else "difference",
        "a": {"series": a.series, "x": a.x, "group": a.group},
        "b": {"series": b.series, "x": b.x, "group": b.group},
        "measure": measure,
        "seeds": len(seeds),
        **found._asdict(),
    }
    protocol = {"linear_top1": "linear", "knn_top1": "knn"}.get(measure)
    if protocol and not equivalent and len(seeds) >= _BOOTSTRAP_SEEDS:
        labels = sweep.results.labels()
        correct = [
            np.stack([sweep.results.predictions(cell)[protocol] == labels for cell in side])
            for side in cells
        ]
        test["bootstrap"] = crossed_bootstrap(*correct, samples=sweep.budget.bootstraps)
    return test
