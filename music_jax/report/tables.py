"""Tables and curves of the report: setup, cost, results, metrics and events of each run."""

import itertools
import json
import math
import os
import shlex
from typing import Any, NamedTuple

import numpy as np

from music_jax.config import is_free
from music_jax.evaluation.results import summary_rows
from music_jax.report.reading import RecordedRun, as_number, as_text

_MAX_FIELDS = 400
MAX_POINTS = 1000  # per curve, and as many more of online measures
_MAX_UNKNOWN_CURVES = 24


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
    ],
    "backbone": [
        ("online_knn", "kNN, top-1", "%", "Of training images, by others of them."),
        ("online_top1", "Linear probe, top-1", "%", "On images it has not been trained on yet."),
        ("online_rankme", "RankMe", "dimensions", "Effective rank of the features."),
        ("online_lidar", "LiDAR", "dimensions", "Effective rank between images, of their views."),
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
_NOT_CURVES = {"step", "epoch", "gap_to_bound", "online_seconds"}


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
    online = [i for i, record in enumerate(run.metrics) if "online_seconds" in record]
    thinned = np.union1d(_thin(np.arange(len(run.metrics))), _thin(np.asarray(online, int)))

    def logged(name: str) -> list[float | None]:
        return [as_number(run.metrics[i].get(name)) for i in thinned]

    # In the order of the charts: names from a file could be special keys.
    values = [
        [
            None
            if v is None or not math.isfinite(curve.scale * v)
            else float(f"{curve.scale * v:.6g}")
            for v in logged(curve.name)
        ]
        for curve in curves
    ]
    return {"step": logged("step"), "epoch": logged("epoch"), "values": values}


def _thin(rows: np.ndarray) -> np.ndarray:
    """Returns at most `MAX_POINTS` of some rows, evenly spaced."""
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), MAX_POINTS)).round()
    return rows[chosen.astype(int)]


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


class Cost(NamedTuple):
    """What the logged steps of a training took."""

    seconds: float
    steps: int  # that were timed
    images: int  # in these steps
    devices: int

    @property
    def images_per_second(self) -> float:
        """Mean throughput."""
        return self.images / self.seconds


def cost(run: RecordedRun) -> Cost | None:
    """Adds up the time between logged steps; None if there is none.

    It contains the saving of checkpoints, and not the compilation, the steps up to the first logged
    one of each start, nor the evaluation.
    """
    batch, seconds, steps = run.size("batch_size"), 0.0, 0
    for before, record in itertools.pairwise(run.metrics):
        rate = as_number(record.get("images_per_second"))
        if batch and rate and rate > 0:
            done = record["step"] - before["step"]
            steps += done
            seconds += done * batch / rate + max(as_number(record.get("online_seconds")) or 0, 0)
    if not batch or not 0 < seconds < 1e12:  # a damaged log may hold anything
        return None
    count = run.devices.get("count")
    return Cost(seconds, steps, steps * batch, count if type(count) is int and count > 0 else 1)


def duration(seconds: float) -> str:
    """Formats a duration, such as `3 min 12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def summarized_cost(run: RecordedRun) -> str:
    """Describes in a few words what a training took; empty if unknown."""
    found = cost(run)
    return f"; {duration(found.seconds)} on {_devices(run)}" if found else ""


def _devices(run: RecordedRun) -> str:
    processes = run.devices.get("processes")
    return " × ".join(as_text(run.devices.get(name, "?")) for name in ("count", "kind")) + (
        f" in {as_text(processes)} processes" if processes not in (None, 1) else ""
    )


def _cost_facts(run: RecordedRun) -> dict[str, str]:
    found = cost(run)
    if found is None:
        return {}
    per_device = f", {found.images_per_second / found.devices:,.4g} on each of {found.devices}"
    return {
        "wall time": f"{duration(found.seconds)} for {found.steps:,} of {run.last_step:,} steps",
        "throughput": f"{found.images_per_second:,.4g} images / s"
        + (per_device if found.devices > 1 else ""),
        "cost": f"{duration(found.seconds * found.devices)} of device time, "
        f"{found.images:,} images",
    }


def _last_loss(run: RecordedRun) -> str:
    loss = as_number(run.metrics[-1].get("loss")) if run.metrics else None
    if loss is None:
        return "–"
    bound = bounds(run).get("loss")
    gap = "" if bound is None else f", {loss - bound:.2f} above its bound of {bound:.2f}"
    return f"{loss:.3f}{gap}".replace("-", "−")


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
    count, pixel_type = run.size("dataset.num_channels"), text("dataset.pixel_type", "uint8")
    channels = {None: "", 1: "gray", 3: "RGB"}.get(count, f"{count} channels")
    channels += f" {pixel_type}" if pixel_type != "uint8" else ""
    source = (
        run.field("dataset.path") or f"{text('dataset.name')}:{text('dataset.train_split', '')}"
    )
    rate, batch = as_number(run.field("optimizer.base_learning_rate")), run.size("batch_size")
    peak = f", peak {rate * batch / 256:.4g}" if rate and batch else ""
    return {
        "workdir": str(run.path),
        "state": state(run),
        "last loss": _last_loss(run),
        **_cost_facts(run),
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
        "devices": _devices(run),
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


def missing_results(run: RecordedRun) -> tuple[str, str]:
    """Returns why a run has no results, and the command that evaluates it."""
    command = f"python -m music_jax.linear_eval --workdir={shlex.quote(os.fspath(run.path))}"
    if not (run.field("dataset.name") or run.field("evaluation.test")):
        labeled = "--config.evaluation.train=FOLDER --config.evaluation.test=FOLDER"
        return (
            "The backbone was not evaluated: no labeled test images were given. To do so, run",
            f"{command} {labeled}",
        )
    return (
        "There are no results yet: training ends with the linear probe and kNN. To evaluate a "
        "checkpoint now, run",
        command,
    )


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


def event_details(event: dict[str, Any]) -> str:
    """Returns an event's fields as text, apart from those with a column of their own."""
    return "; ".join(
        f"{as_text(key, 40)} {_detail(value)}"
        for key, value in event.items()
        if key not in ("time", "event", "step")
        and value is not False
        and value not in (None, [], {})
    )


def _detail(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{as_text(key, 40)} {_detail(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)
