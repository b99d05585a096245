"""The curves of a training: which there are, with their units, bounds and a text for each."""

import math
from typing import Any, NamedTuple

import numpy as np

from music_jax.report.reading import Recorded, number, said

_MAX_POINTS = 1000  # of a curve
_MAX_OTHERS = 24  # curves of names that are not known here

_X = ("step", "epoch")


class Kind(NamedTuple):
    """What a logged number is.

    Attributes:
      name: in metrics.jsonl.
      title: of its chart.
      unit: of its axis.
      note: what it says, and what is good.
      group: of the charts that it stands among.
    """

    name: str
    title: str
    unit: str
    note: str
    group: str = "training"


_KINDS = (
    Kind("loss", "Loss", "nats", "The objective; lower is better.", "loss"),
    Kind(
        "diagonal",
        "Diagonal term",
        "nats",
        "Least where every segment uses all its units alike and both views agree.",
        "terms",
    ),
    Kind(
        "cross_segment",
        "Cross-segment term",
        "nats",
        "Least where the segments are independent of each other.",
        "terms",
    ),
    Kind(
        "invariance",
        "Invariance term",
        "nats",
        "0 where both views of every image take the same units with certainty.",
        "terms",
    ),
    Kind("learning_rate", "Learning rate", "", "After warm-up a cosine."),
    Kind("images_per_second", "Throughput", "images / s", "Since the step logged before."),
    Kind(
        "online_top1",
        "Online probe, top-1",
        "%",
        "A linear classifier that is trained beside the backbone, on images before it learns from "
        "them.",
    ),
    Kind("grad_norm", "Gradient norm", "", "Of all parameters together.", "health"),
    Kind(
        "usage_entropy",
        "Usage entropy",
        "share of log K",
        "1 where the units of every segment are used alike; toward 0 they collapse.",
        "health",
    ),
    Kind("dead_units", "Dead units", "share", "Units that hardly any image uses.", "health"),
    Kind(
        "embedding_std",
        "Spread of the embeddings",
        "share",
        "Of unit vectors; 1 points all around, 0 is a collapse.",
        "health",
    ),
    Kind(
        "effective_rank",
        "Effective rank",
        "dimensions",
        "Dimensions along which the embeddings vary, estimated from random projections.",
        "health",
    ),
)
# What is shown in another way, or is no curve.
_NOT_CURVES = {"step", "epoch", "gap_to_bound"}


def bounds(run: Recorded) -> dict[str, float]:
    """The least values that the objective's terms, and its sum at weights 1, can take, in nats."""
    if run.segments is None:
        return {}
    log_units = math.log(run.segments[1])
    found = {"diagonal": -log_units, "cross_segment": -2 * log_units, "invariance": 0.0}
    weights = [run.field(f"objective.{term}_weight") for term in found]
    return found | ({"loss": -3 * log_units} if weights == [1.0] * 3 else {})


def kinds(runs: list[Recorded]) -> list[Kind]:
    """The curves that any of the runs has, known ones first."""
    names = {
        name
        for run in runs
        for record in run.metrics
        for name, value in record.items()
        if number(value) is not None
    } - _NOT_CURVES
    known = [kind for kind in _KINDS if kind.name in names]
    objectives = {said(run.field("objective.name")) for run in runs}
    if known and known[0].name == "loss" and objectives - {"music", "simclr"}:  # no entropies
        known[0] = known[0]._replace(unit="")
    if known and known[0].name == "loss" and len(objectives) > 1:
        note = "Each run's own objective: their values are not comparable."
        known[0] = known[0]._replace(note=note)
    others = sorted(names - {kind.name for kind in _KINDS})[:_MAX_OTHERS]
    return known + [Kind(name, said(name, 80), "", "", "health") for name in others]


def points(run: Recorded) -> dict[str, Any]:
    """`step`, `epoch` and each curve of a run as lists of one length, with null for what lacks."""
    chosen = _some(len(run.metrics))
    found: dict[str, Any] = {
        name: [number(run.metrics[i].get(name)) for i in chosen] for name in _X
    }
    for kind in kinds([run]):
        scale = 100 if kind.unit == "%" else 1
        values = [number(run.metrics[i].get(kind.name)) for i in chosen]
        found[kind.name] = [None if v is None else float(f"{scale * v:.6g}") for v in values]
    return found


def is_thinned(run: Recorded) -> bool:
    """Whether `points` gives only some of the logged steps."""
    return len(run.metrics) > _MAX_POINTS


def _some(count: int) -> list[int]:
    if count <= _MAX_POINTS:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, _MAX_POINTS).round().astype(int)).tolist()


def described(kind: Kind, runs: list[Recorded]) -> str:
    """The chart of a curve in words, for those who do not see it."""
    parts = []
    for run in runs:
        known = [
            (record["step"], value)
            for record in run.metrics
            if (value := number(record.get(kind.name))) is not None
        ]
        if not known:
            continue
        scale = 100 if kind.unit == "%" else 1
        (first, a), (last, b) = known[0], known[-1]
        text = f"{run.name}: {scale * a:.4g} at step {first:,}, {scale * b:.4g} at step {last:,}"
        bound = bounds(run).get(kind.name)
        parts.append(text if bound is None else f"{text}, bound {bound:.4g}")
    unit = f", in {kind.unit}" if kind.unit else ""
    return f"Line chart. {kind.title}{unit}, over the training. {'; '.join(parts)}."
