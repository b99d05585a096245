"""Tables and curves of the report: setup, results, metrics and events of each run."""

import json
import math
from typing import Any, NamedTuple

import numpy as np

from music_jax.config import is_free
from music_jax.evaluation.results import summary_rows
from music_jax.report.reading import RecordedRun, as_number, as_text, count_texts

_MAX_EVENTS = 100
_MAX_SKIPPED = 50
_MAX_FIELDS = 400
_MAX_POINTS = 1000  # per curve
_MAX_UNKNOWN_CURVES = 24


class Row(NamedTuple):
    """A row of a table with a column for each run."""

    name: str
    values: tuple[str, ...]
    differs: bool  # between the runs


class Score(NamedTuple):
    """Accuracies of a run or of one of its baselines, each in [0, 1] or None."""

    run: int
    name: str
    linear_top1: float | None
    linear_top5: float | None
    knn_top1: float | None


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
        (
            "invariance",
            "Invariance term",
            "nats",
            "0 if both views certainly select the same units.",
        ),
    ],
    "training": [
        ("learning_rate", "Learning rate", "", "Warm-up, then cosine decay."),
        ("images_per_second", "Throughput", "images / s", "Since the previous logged step."),
        (
            "online_top1",
            "Online probe, top-1",
            "%",
            "On images that it has not been trained on yet.",
        ),
    ],
    "health": [
        ("grad_norm", "Gradient norm", "", "Over all parameters."),
        (
            "usage_entropy",
            "Usage entropy",
            "share of log K",
            "1 for equal use, 0 for collapsed units.",
        ),
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


def points(run: RecordedRun) -> dict[str, list[float | None]]:
    """Returns `step`, `epoch` and each curve of a run, thinned; None for missing values."""
    count = len(run.metrics)
    thinned = np.unique(np.linspace(0, count - 1, min(count, _MAX_POINTS)).round().astype(int))
    shown = [run.metrics[i] for i in thinned]

    def values(name: str) -> list[float | None]:
        return [as_number(record.get(name)) for record in shown]

    found = {name: values(name) for name in ("step", "epoch")}
    for curve in curves([run]):
        found[curve.name] = [
            None if v is None else float(f"{curve.scale * v:.6g}") for v in values(curve.name)
        ]
    return found


def is_thinned(run: RecordedRun) -> bool:
    """Returns whether `points` excludes some of the logged steps."""
    return len(run.metrics) > _MAX_POINTS


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


def facts(runs: list[RecordedRun], image_counts: list[int | None]) -> list[Row]:
    """Returns the table of the settings and the data of the runs.

    Args:
      runs: Runs.
      image_counts: Number of training images of each run, or None.
    """
    columns = [_facts(run, count) for run, count in zip(runs, image_counts, strict=True)]
    return [_row(name, [column[name] for column in columns]) for name in columns[0]]


def _facts(run: RecordedRun, num_images: int | None) -> dict[str, str]:
    devices = run.devices

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
    processes = devices.get("processes")
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
        "devices": f"{as_text(devices.get('count', '?'))} × {as_text(devices.get('kind', '?'))}"
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
    columns = [_flatten(run.config) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))[:_MAX_FIELDS]
    return [_row(name, [column.get(name, "–") for column in columns]) for name in names]


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


def _row(name: str, values: list[str]) -> Row:
    return Row(name, tuple(values), len(set(values)) > 1)


def scores(runs: list[RecordedRun]) -> list[Score]:
    """Returns the accuracies of each run, of its random backbone and of raw pixels."""
    found = []
    for i, run in enumerate(runs):
        linear, knn = run.results.get("linear", {}), run.results.get("knn", {})
        for prefix, name in (
            ("", "trained backbone"),
            ("random_init_", "random initialization"),
            ("raw_pixels_", "raw pixels"),
        ):
            values = (linear.get(f"{prefix}top1"), linear.get(f"{prefix}top5"))
            score = Score(i, name, *map(as_number, (*values, knn.get(f"{prefix}top1"))))
            if any(value is not None for value in score[2:]):
                found.append(score)
    return found


def stale_results(run: RecordedRun) -> str | None:
    """Returns a message if the results were measured before the last logged step, else None."""
    steps = {result.get("step") for result in run.results.values()} - {None}
    if not steps or steps == {run.last_step} or not run.last_step:
        return None
    measured = ", ".join(as_text(step) for step in sorted(steps, key=str))
    return f"measured at step {measured}; the last logged step is {run.last_step:,}"


def results(runs: list[RecordedRun]) -> list[tuple[str, Row]]:
    """Returns all results by protocol, with a column for each run."""
    columns = [
        {(protocol, name): value for protocol, name, value in summary_rows(run.results)}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    return [
        (protocol, _row(name, [column.get((protocol, name), "–") for column in columns]))
        for protocol, name in keys
    ]


def headline(run: RecordedRun) -> list[tuple[str, str, str]]:
    """Returns the main results: name, value, and the values to compare it with."""
    found = []
    for title, protocol in (("linear probe, top-1", "linear"), ("kNN, top-1", "knn")):
        result = run.results.get(protocol, {})
        top1 = as_number(result.get("top1"))
        if top1 is not None:
            baselines = [
                f"{name} {100 * value:.1f} %"
                for key, name in (("random_init", "random"), ("raw_pixels", "raw pixels"))
                if (value := as_number(result.get(f"{key}_top1"))) is not None
            ]
            found.append((title, f"{100 * top1:.1f} %", ", ".join(baselines)))
    loss = as_number(run.metrics[-1].get("loss")) if run.metrics else None
    if loss is not None:
        bound = bounds(run).get("loss")
        gap = "" if bound is None else f"bound {bound:.2f}, {loss - bound:.2f} above it"
        found.append(("last loss", f"{loss:.3f}".replace("-", "−"), gap.replace("-", "−")))
    return found


def history(run: RecordedRun) -> dict[str, Any]:
    """Returns resumptions, rewinds and skipped images, in lists of limited length."""
    events = [
        {
            "time": as_text(event.get("time", "")),
            "event": as_text(event["event"], 40),
            "step": as_text(event.get("step", "")),
            "detail": "; ".join(
                f"{as_text(key, 40)} {_detail(value)}"
                for key, value in event.items()
                if key not in ("time", "event", "step") and value not in (None, [], {}, False)
            ),
        }
        for event in run.events[-_MAX_EVENTS:]
    ]
    return {
        "counts": count_texts(event["event"] for event in run.events),
        "events": events,
        "num_events": len(run.events),
        "rewinds": [
            {key: as_text(rewind.get(key, "")) for key in ("step", "what", "skipped")}
            for rewind in run.rewinds[:_MAX_EVENTS]
        ],
        "skipped_by_source": count_texts(line["source"] for line in run.skipped),
        "skipped": [
            {key: as_text(line[key]) for key in ("source", "image", "reason")}
            for line in run.skipped[:_MAX_SKIPPED]
        ],
        "num_skipped": len(run.skipped),
    }


def _detail(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{as_text(key, 40)} {_detail(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)
