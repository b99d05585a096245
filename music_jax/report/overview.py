"""What was run, what came of it and what happened on the way, as tables of text."""

import json
from typing import Any, NamedTuple

from music_jax.config import is_free
from music_jax.evaluation.results import summary_rows
from music_jax.report.curves import bounds
from music_jax.report.reading import Recorded, counted, number, said

_MAX_EVENTS = 100
_MAX_SKIPPED = 50
_MAX_FIELDS = 400


class Row(NamedTuple):
    """A row of a table with a column for each run.

    Attributes:
      name: of the row.
      values: one for each run.
      differs: whether the runs differ in it.
    """

    name: str
    values: tuple[str, ...]
    differs: bool


class Score(NamedTuple):
    """Accuracies of a run, or of what it is compared with, each in [0, 1] or None."""

    run: int
    name: str
    linear_top1: float | None
    linear_top5: float | None
    knn_top1: float | None


def facts(runs: list[Recorded], image_counts: list[int | None]) -> list[Row]:
    """What was run and on what.

    Args:
      runs: the runs.
      image_counts: how many images each was trained on, where it is known.
    """
    columns = [_facts(run, count) for run, count in zip(runs, image_counts, strict=True)]
    return [_row(name, [column[name] for column in columns]) for name in columns[0]]


def _facts(run: Recorded, num_images: int | None) -> dict[str, str]:
    field, devices = run.field, run.devices
    embedding = said(field("projector.output_size", "–"))
    if run.segments:
        segments, units = run.segments
        embedding = f"{segments * units:,} = {segments} segments × {units} units"
    hidden = field("projector.hidden_sizes")
    stem = field("backbone.stem")
    channels = {1: "gray", 3: "RGB"}.get(field("dataset.num_channels"), "")
    source = field("dataset.path") or (
        f"{said(field('dataset.name', '?'))}:{said(field('dataset.train_split', ''))}"
    )
    images = f", {num_images:,} images" if num_images else ""
    rate, batch = number(field("optimizer.base_learning_rate")), run.size("batch_size")
    peak = f", peak {rate * batch / 256:.4g}" if rate and batch else ""
    steps = f" = {run.num_steps:,} steps" if run.num_steps else ""
    processes = devices.get("processes")
    return {
        "workdir": str(run.path),
        "state": state(run),
        "objective": said(field("objective.name", "?")),
        "embedding": embedding,
        "projection head": f"hidden {said(hidden)}" if hidden else "linear, no hidden layer",
        "backbone": said(field("backbone.name", "?")) + (f", stem {said(stem)}" if stem else ""),
        "trained on": said(source) + images,
        "images": f"{said(field('crop.size', '?'))} px, {channels}".rstrip(", "),
        "crops": f"scale {said(field('crop.scale', '?'))}",
        "batch": said(field("batch_size", "?")),
        "epochs": said(field("num_epochs", "?")) + steps,
        "optimizer": said(field("optimizer.name", "?")),
        "learning rate": f"base {said(rate)}{peak}, warm-up "
        f"{said(field('optimizer.warmup_epochs', '?'))} epochs",
        "weight decay": said(field("optimizer.weight_decay", "?")),
        "computed in": said(field("compute_dtype", "?")),
        "seed": said(field("seed", "?")),
        "devices": f"{said(devices.get('count', '?'))} × {said(devices.get('kind', '?'))}"
        + (f" in {said(processes)} processes" if processes not in (None, 1) else ""),
        "software": ", ".join(f"{said(k, 40)} {said(v, 40)}" for k, v in run.versions.items()),
        "begun or resumed": said(run.written),
    }


def state(run: Recorded) -> str:
    """How far a run is, in words."""
    step, total = run.last_step, run.num_steps
    if not step:
        return "no step is logged yet"
    if total is None:
        return f"{step:,} steps logged"
    if step >= total:
        return f"finished, {total:,} steps"
    return f"not finished: {step:,} of {total:,} steps ({100 * step / total:.0f} %)"


def fields(runs: list[Recorded]) -> list[Row]:
    """Every field of the configs, by its dotted name."""
    columns = [_flat(run.config) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))[:_MAX_FIELDS]
    return [_row(name, [column.get(name, "–") for column in columns]) for name in names]


def differing(runs: list[Recorded]) -> list[str]:
    """The fields that decide what is trained and in which the runs differ."""
    return [row.name for row in fields(runs) if row.differs and not is_free(row.name)]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{said(key, 60)}.")
        else:
            found[f"{prefix}{said(key, 60)}"] = said(json.dumps(value))
    return found


def _row(name: str, values: list[str]) -> Row:
    return Row(name, tuple(values), len(set(values)) > 1)


def scores(runs: list[Recorded]) -> list[Score]:
    """Accuracies of each run beside a random backbone and raw pixels."""
    found = []
    for i, run in enumerate(runs):
        linear, knn = run.results.get("linear", {}), run.results.get("knn", {})
        for prefix, name in (
            ("", "trained backbone"),
            ("random_init_", "random initialization"),
            ("raw_pixels_", "raw pixels"),
        ):
            score = Score(
                i,
                name,
                number(linear.get(f"{prefix}top1")),
                number(linear.get(f"{prefix}top5")),
                number(knn.get(f"{prefix}top1")),
            )
            if any(value is not None for value in score[2:]):
                found.append(score)
    return found


def stale(run: Recorded) -> str | None:
    """Says so where the figures are those of another step than the last."""
    steps = {figures.get("step") for figures in run.results.values()} - {None}
    if not steps or steps == {run.last_step} or not run.last_step:
        return None
    return (
        f"measured at step {', '.join(said(s) for s in sorted(steps, key=str))}; the last one "
        f"logged is {run.last_step:,}"
    )


def figures(runs: list[Recorded]) -> list[tuple[str, Row]]:
    """All figures that were measured, by protocol, with a column for each run."""
    columns = [
        {(protocol, what): value for protocol, what, value in summary_rows(run.results)}
        for run in runs
    ]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [
        (protocol, _row(what, [column.get((protocol, what), "–") for column in columns]))
        for protocol, what in names
    ]


def headline(run: Recorded) -> list[tuple[str, str, str]]:
    """The few figures to look at first: name, value, and what it is to be compared with."""
    linear, knn = run.results.get("linear", {}), run.results.get("knn", {})
    found = []
    for title, of in (("linear probe, top-1", linear), ("kNN, top-1", knn)):
        top1 = number(of.get("top1"))
        if top1 is None:
            continue
        others = [
            f"{name} {100 * value:.1f} %"
            for key, name in (("random_init", "random"), ("raw_pixels", "raw pixels"))
            if (value := number(of.get(f"{key}_top1"))) is not None
        ]
        found.append((title, f"{100 * top1:.1f} %", ", ".join(others)))
    loss = number(run.metrics[-1].get("loss")) if run.metrics else None
    if loss is not None:
        bound = bounds(run).get("loss")
        beside = f"bound {bound:.2f}, {loss - bound:.2f} above it" if bound is not None else ""
        found.append(("last loss", f"{loss:.3f}", beside))
    return [
        (title, value.replace("-", "−"), beside.replace("-", "−")) for title, value, beside in found
    ]


def history(run: Recorded) -> dict[str, Any]:
    """What was resumed, rewound and skipped, with bounded lists."""
    events = [
        {
            "time": said(event.get("time", "")),
            "event": said(event["event"], 40),
            "step": said(event.get("step", "")),
            "detail": "; ".join(
                f"{said(key, 40)} {_detail(value)}"
                for key, value in event.items()
                if key not in ("time", "event", "step") and value not in (None, [], {}, False)
            ),
        }
        for event in run.events[-_MAX_EVENTS:]
    ]
    counts = counted(event["event"] for event in run.events)
    return {
        "counts": counts,
        "events": events,
        "events_left_out": max(len(run.events) - _MAX_EVENTS, 0),
        "rewinds": [
            {
                "step": said(rewind.get("step", "")),
                "what": said(rewind.get("what", "")),
                "skipped": said(rewind.get("skipped", "")),
            }
            for rewind in run.rewinds[:_MAX_EVENTS]
        ],
        "skipped_by_source": counted(line["source"] for line in run.skipped),
        "skipped": [
            {key: said(line[key]) for key in ("source", "image", "reason")}
            for line in run.skipped[:_MAX_SKIPPED]
        ],
        "skipped_left_out": max(len(run.skipped) - _MAX_SKIPPED, 0),
    }


def _detail(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{said(key, 40)} {_detail(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return said(value)
