"""Compares several runs: a table of their main figures, with intervals of the differences."""

import math
from typing import NamedTuple

import numpy as np

from music_jax.report.learned import Verdict, main_score, num_test
from music_jax.report.reading import RecordedRun
from music_jax.report.tables import Cost, cost

_Z = 1.959964  # quantile of the normal distribution for an interval of 95 %


class Difference(NamedTuple):
    """Difference between two accuracies, with a 95 % interval."""

    value: float
    low: float
    high: float
    paired: bool


class Compared(NamedTuple):
    """A row of the table of runs."""

    name: str
    scores: list[float | None]  # main scores of the linear probe and kNN, in [0, 1]
    difference: Difference | None  # of the linear probe to the first run
    verdicts: tuple[Verdict, Verdict]
    cost: Cost | None


def difference(run: RecordedRun, reference: RecordedRun) -> Difference | None:
    """Compares the linear probes of two runs.

    The interval is paired if both have predictions for the same test images: the adjusted Wald
    interval of Agresti & Min (2005), with half an image added to each cell of the table of right
    and wrong predictions. Otherwise it is that of Agresti & Caffo (2000), with a right and a wrong
    image added to each run. It covers other test images, not other seeds.

    Returns:
      The difference in accuracy; None if an accuracy or its number of images is unknown.
    """
    a, b = run.predictions, reference.predictions
    if (
        a is not None
        and b is not None
        and np.array_equal(a.indices, b.indices)
        and np.array_equal(a.labels, b.labels)
    ):
        right, others = a.predictions == a.labels, b.predictions == b.labels
        count = len(right) + 2
        won, lost = np.sum(right & ~others) + 0.5, np.sum(others & ~right) + 0.5
        middle = (won - lost) / count
        error = math.sqrt((won + lost - (won - lost) ** 2 / count) / count**2)
        return _difference(a.top1 - b.top1, middle, error, paired=True)
    n, m = num_test(run), num_test(reference)
    x, y = main_score(run, "linear"), main_score(reference, "linear")
    if n is None or m is None or x is None or y is None:
        return None
    p, q = (x * n + 1) / (n + 2), (y * m + 1) / (m + 2)
    error = math.sqrt(p * (1 - p) / (n + 2) + q * (1 - q) / (m + 2))
    return _difference(x - y, p - q, error, paired=False)


def _difference(value: float, middle: float, error: float, *, paired: bool) -> Difference:
    low, high = max(middle - _Z * error, -1.0), min(middle + _Z * error, 1.0)
    return Difference(float(value), float(low), float(high), paired)


def compare(runs: list[RecordedRun], judged: list[tuple[Verdict, Verdict]]) -> list[Compared]:
    """Returns the table of several runs, with differences to the first."""
    return [
        Compared(
            run.name,
            [main_score(run, protocol) for protocol in ("linear", "knn")],
            difference(run, runs[0]) if run is not runs[0] else None,
            found,
            cost(run),
        )
        for run, found in zip(runs, judged, strict=True)
    ]
