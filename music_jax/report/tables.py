"""Tables and curves of the report: setup, results, metrics and events of each run."""

import json
import math
from typing import Any, NamedTuple

import numpy as np

from music_jax.config import is_free
from music_jax.evaluation.results import MEAN_AVERAGE_PRECISION, TITLES, summary_rows
from music_jax.report.reading import RecordedRun, as_number, as_text

_MAX_FIELDS = 400
MAX_POINTS = 1000  # per curve
_MAX_UNKNOWN_CURVES = 24
_FEATURES = {  # by the prefix of their scores
    "": "trained backbone",
    "random_init_": "random initialization",
    "raw_pixels_": "raw pixels",
}


class Row(NamedTuple):
    """A row of a table with a column for each run."""

    name: Any
    values: list[str]

    @property
    def differs(self) -> bool:
        """Whether the values of the runs differ."""
        return len(set(self.values)) > 1


def rows(columns: list[dict[Any, str]]) -> list[Row]:
    """Returns the rows of a table from the columns of the runs, by name."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [Row(name, [column.get(name, "–") for column in columns]) for name in names]


class Curve(NamedTuple):
    """A logged metric as a chart."""

    name: str  # in metrics.jsonl
    title: str
    unit: str
    note: str
    group: str  # of charts on the page

    @property
    def scale(self) -> int:
        """Factor from the logged value to the unit."""
        return 100 if self.unit == "%" else 1


_CURVES_BY_GROUP = {
    "loss": [("loss", "Loss", "nats", "The objective; lower is better.")],
    "terms": [
        ("diagonal", "Diagonal term", "nats", "Low if units are used equally and views agree."),
        ("cross_segment", "Cross-segment term", "nats", "Low if the segments are independent."),
        ("invariance", "Invariance term", "nats", "0 if both views surely select the same units."),
    ],
    "training": [
        ("learning_rate", "Learning rate", "", "Warm-up, then cosine decay."),
        ("images_per_second", "Throughput", "images / s", "Since the previous logged step."),
        ("online_top1", "Online probe, top-1", "%", "On images it has not been trained on yet."),
    ],
    "health": [
        ("grad_norm", "Gradient norm", "", "Over all parameters."),
        ("usage_entropy", "Usage entropy", "share of log K", "1 for equal use, 0 for a collapse."),
        ("dead_units", "Dead units", "share", "Units that almost no image uses."),
        ("embedding_std", "Spread of the embeddings", "share", "1 for all directions, 0 for one."),
        ("effective_rank", "Effective rank", "dimensions", "Dimensions in which embeddings vary."),
    ],
}
_CURVES = [Curve(*row, group) for group, rows in _CURVES_BY_GROUP.items() for row in rows]
_NOT_CURVES = {"step", "epoch", "gap_to_bound"}


def bounds(run: RecordedRun) -> dict[str, float]:
    """Returns the lower bounds of the objective's terms and, with weights of 1, of their sum."""
    if run.segments is None:
        return {}
    log_units = math.log(run.segments[1])
    terms = {"diagonal": -log_units, "cross_segment": -2 * log_units, "invariance": 0.0}
    has_unit_weights = all(run.field(f"objective.{term}_weight") == 1.0 for term in terms)
    return terms | ({"loss": -3 * log_units} if has_unit_weights else {})


def curves(runs: list[RecordedRun]) -> list[Curve]:
    """Returns the curves that any of the runs has, those of known metrics first."""
    names = {
        name
        for run in runs
        for record in run.metrics
        for name, value in record.items()
        if as_number(value) is not None
    } - _NOT_CURVES
    known = [curve for curve in _CURVES if curve.name in names]
    objectives = {as_text(run.field("objective.name")) for run in runs}
    if known and known[0].name == "loss":
        if objectives - {"music", "simclr", "discrete"}:  # other losses are not entropies
            known[0] = known[0]._replace(unit="")
        if len(objectives) > 1:
            note = "The runs have different objectives, whose values are not comparable."
            known[0] = known[0]._replace(note=note)
    unknown = sorted(names - {curve.name for curve in _CURVES})[:_MAX_UNKNOWN_CURVES]
    return known + [Curve(name, as_text(name, 80), "", "", "health") for name in unknown]


def points(run: RecordedRun, curves: list[Curve]) -> dict[str, list[Any]]:
    """Returns `step`, `epoch` and the `values` of each curve, thinned; None for missing values."""
    count = len(run.metrics)
    thinned = np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int))

    def logged(name: str) -> list[float | None]:
        return [as_number(run.metrics[i].get(name)) for i in thinned]

    # In the order of the charts: names from a file could be special keys.
    values = [
        [None if v is None else float(f"{curve.scale * v:.6g}") for v in logged(curve.name)]
        for curve in curves
    ]
    return {"step": logged("step"), "epoch": logged("epoch"), "values": values}


def describe(curve: Curve, runs: list[RecordedRun]) -> str:
    """Describes the chart of a curve for readers who cannot see it."""
    parts = []
    for run in runs:
        known = [
            (record["step"], curve.scale * value)
            for record in run.metrics
            if (value := as_number(record.get(curve.name))) is not None
        ]
        if known:
            (first, a), (last, b) = known[0], known[-1]
            text = f"{run.name}: {a:.4g} at step {first:,}, {b:.4g} at step {last:,}"
            bound = bounds(run).get(curve.name)
            parts.append(text if bound is None else f"{text}, bound {bound:.4g}")
    unit = f", in {curve.unit}" if curve.unit else ""
    return f"Line chart. {curve.title}{unit}, over the training. {'; '.join(parts)}."


def facts(run: RecordedRun, num_images: int | None) -> dict[str, str]:
    """Returns the settings and the data of a run, with the number of training images if known."""

    def text(name: str, default: str = "?") -> str:
        return as_text(run.field(name, default))

    embedding = text("projector.output_size", "–")
    if run.segments:
        segments, units = run.segments
        embedding = f"{segments * units:,} = {segments} segments × {units} units"
    hidden = run.field("projector.hidden_sizes")
    stem = run.field("backbone.stem")
    channels = {1: "gray", 3: "RGB"}.get(run.field("dataset.num_channels"), "")
    source = (
        run.field("dataset.path") or f"{text('dataset.name')}:{text('dataset.train_split', '')}"
    )
    rate, batch = as_number(run.field("optimizer.base_learning_rate")), run.size("batch_size")
    peak = f", peak {rate * batch / 256:.4g}" if rate and batch else ""
    processes = run.devices.get("processes")
    return {
        "workdir": str(run.path),
        "state": state(run),
        "objective": text("objective.name"),
        "embedding": embedding,
        "projection head": f"hidden {as_text(hidden)}" if hidden else "linear, no hidden layer",
        "backbone": text("backbone.name") + (f", stem {as_text(stem)}" if stem else ""),
        "trained on": as_text(source) + (f", {num_images:,} images" if num_images else ""),
        "images": f"{text('crop.size')} px, {channels}".rstrip(", "),
        "crops": f"scale {text('crop.scale')}",
        "batch": text("batch_size"),
        "epochs": text("num_epochs") + (f" = {run.num_steps:,} steps" if run.num_steps else ""),
        "optimizer": text("optimizer.name"),
        "learning rate": f"base {as_text(rate)}{peak}, warm-up {text('optimizer.warmup_epochs')} "
        "epochs",
        "weight decay": text("optimizer.weight_decay"),
        "computed in": text("compute_dtype"),
        "seed": text("seed"),
        "devices": " × ".join(as_text(run.devices.get(name, "?")) for name in ("count", "kind"))
        + (f" in {as_text(processes)} processes" if processes not in (None, 1) else ""),
        "software": ", ".join(
            f"{as_text(k, 40)} {as_text(v, 40)}" for k, v in run.versions.items()
        ),
        "started or resumed": as_text(run.written),
    }


def state(run: RecordedRun) -> str:
    """Describes the progress of a run."""
    step, total = run.last_step, run.num_steps
    if not step:
        return "no step is logged yet"
    if total is None:
        return f"{step:,} steps logged"
    if step >= total:
        return f"finished, {total:,} steps"
    return f"not finished: {step:,} of {total:,} steps ({100 * step / total:.0f} %)"


def fields(runs: list[RecordedRun]) -> list[Row]:
    """Returns the table of all config fields by dotted name."""
    return rows([_flatten(run.config) for run in runs])[:_MAX_FIELDS]


def differing_fields(runs: list[RecordedRun]) -> list[str]:
    """Returns the config fields that affect the training and differ between the runs."""
    return [row.name for row in fields(runs) if row.differs and not is_free(row.name)]


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{as_text(key, 60)}"
        is_tree = isinstance(value, dict)
        flat |= _flatten(value, f"{name}.") if is_tree else {name: as_text(json.dumps(value))}
    return flat


def score_columns(runs: list[RecordedRun]) -> list[tuple[str, str, str]]:
    """Returns the columns of the table of scores: title, protocol, and key of its result."""
    top1 = [("linear", "linear", "top1"), ("linear", "linear", "top5"), ("kNN", "knn", "top1")]
    several = [(title, protocol, MEAN_AVERAGE_PRECISION) for title, protocol, _ in top1[::2]]
    found = [MEAN_AVERAGE_PRECISION in result for run in runs for result in run.results.values()]
    columns = top1 * (not all(found) or not found) + several * any(found)
    return [(f"{title} {TITLES[key]}, %", protocol, key) for title, protocol, key in columns]


def scores(runs: list[RecordedRun]) -> list[tuple[int, str, list[float | None]]]:
    """Returns the scores of each run, of its random backbone and of raw pixels.

    Returns:
      Run, name, and the scores in `score_columns`, in [0, 1] or None.
    """
    columns = score_columns(runs)
    found = []
    for i, run in enumerate(runs):
        for prefix, name in _FEATURES.items():
            results = [(run.results.get(protocol, {}), key) for _, protocol, key in columns]
            values = [as_number(result.get(f"{prefix}{key}")) for result, key in results]
            if any(value is not None for value in values):
                found.append((i, name, values))
    return found


def stale_results(run: RecordedRun) -> str | None:
    """Returns a message if the results were measured before the last logged step, else None."""
    found = (result.get("step") for result in run.results.values())
    steps = {step for step in found if isinstance(step, int)}
    if not steps or steps == {run.last_step} or not run.last_step:
        return None
    measured = ", ".join(as_text(step) for step in sorted(steps, key=str))
    return f"measured at step {measured}; the last logged step is {run.last_step:,}"


def results(runs: list[RecordedRun]) -> list[Row]:
    """Returns all results, by protocol and metric, with a column for each run."""
    return rows([{row[:2]: row[2] for row in summary_rows(run.results)} for run in runs])


def headline(run: RecordedRun) -> list[tuple[str, str, str]]:
    """Returns the main results: name, value, and the values to compare it with."""
    found = []
    for title, protocol in (("linear probe", "linear"), ("kNN", "knn")):
        result = run.results.get(protocol, {})
        key = MEAN_AVERAGE_PRECISION if MEAN_AVERAGE_PRECISION in result else "top1"
        values = {name: as_number(result.get(f"{x}{key}")) for x, name in _FEATURES.items()}
        shown = {name: f"{100 * x:.1f} %" for name, x in values.items() if x is not None}
        if value := shown.pop("trained backbone", ""):
            baselines = ", ".join(f"{name} {baseline}" for name, baseline in shown.items())
            found.append((f"{title}, {TITLES[key]}", value, baselines))
    loss = as_number(run.metrics[-1].get("loss")) if run.metrics else None
    if loss is not None:
        bound = bounds(run).get("loss")
        gap = "" if bound is None else f"bound {bound:.2f}, {loss - bound:.2f} above it"
        found.append(("last loss", f"{loss:.3f}".replace("-", "−"), gap.replace("-", "−")))
    return found


def event_details(event: dict[str, Any]) -> str:
    """Returns an event's fields as text, apart from those with a column of their own."""
    return "; ".join(
        f"{as_text(key, 40)} {_detail(value)}"
        for key, value in event.items()
        if key not in ("time", "event", "step") and value not in (None, [], {}, False)
    )


def _detail(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{as_text(key, 40)} {_detail(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)
