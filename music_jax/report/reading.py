"""Reads the records of a run from the files of its workdir.

The files may be damaged, incomplete or written by somebody else: unreadable parts are excluded, and
a note lists them.
"""

import collections
import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

from etils import epath

from music_jax.errors import UserError
from music_jax.evaluation.results import (
    Classifier,
    Predictions,
    read_all_results,
    read_classifier,
    read_predictions,
)
from music_jax.workdir.directory import find_workdir
from music_jax.workdir.files import parse_json, read_json, read_text
from music_jax.workdir.run_config import read_config

Record = dict[str, Any]
_Read = TypeVar("_Read")


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """Records of a run in the files of its workdir."""

    path: epath.Path
    name: str  # in the report
    config: Record
    versions: Record  # of packages
    devices: Record
    written: str  # time of config.json
    metrics: list[Record]  # metrics.jsonl, with ascending `step`
    events: list[Record]  # events.jsonl
    skipped: list[Record]  # skipped.jsonl
    rewinds: list[Record]  # rewinds.json
    results: dict[str, Record]  # by protocol
    predictions: Predictions | None  # of the linear probe, if they belong to its results
    classifier: Classifier | None  # the linear probe
    notes: tuple[str, ...]  # what could not be read

    def field(self, name: str, default: Any = None) -> Any:
        """Returns a config field by dotted name; its value may be anything."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def size(self, name: str) -> int | None:
        """Returns a config field that is a positive integer, or None."""
        value = self.field(name)
        return value if type(value) is int and value > 0 else None

    @property
    def segments(self) -> tuple[int, int] | None:
        """Number of segments and of units per segment; None if the objective has none."""
        segments = self.size("objective.num_segments")
        units = self.size("objective.units_per_segment")
        if self.field("objective.name") != "music" or segments is None or units is None:
            return None
        return segments, units

    @property
    def last_step(self) -> int:
        """Last logged step."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def num_steps(self) -> int | None:
        """Number of steps of the whole training, estimated from the log; None if unknown."""
        epochs = self.size("num_epochs")
        for record in reversed(self.metrics):
            epoch = record.get("epoch")
            if epochs and isinstance(epoch, float) and epoch > 0:
                steps = record["step"] / epoch * epochs
                return max(round(steps), record["step"]) if math.isfinite(steps) else None
        return None


def read_workdirs(paths: list[str]) -> list[RecordedRun]:
    """Reads workdirs and gives each run a unique name.

    Raises:
      UserError: A workdir does not exist, holds no run, or is given twice.
    """
    workdirs: list[epath.Path] = []
    for path in paths:
        workdir = find_workdir(path)
        if workdir in workdirs:
            raise UserError(f"the workdir {path} is named twice in --workdir")
        workdirs.append(workdir)
    names = _short_names([os.fspath(workdir) for workdir in workdirs])
    return [_read(workdir, name) for workdir, name in zip(workdirs, names, strict=True)]


def _short_names(paths: list[str]) -> list[str]:
    """Returns the last parts of each path, as many as make the names unique."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def _read(workdir: epath.Path, name: str) -> RecordedRun:
    config = read_config(workdir)
    if config is None:  # removed since it was found
        raise UserError(f"{workdir} holds no run: it has no config.json")
    about = read_json(workdir / "config.json")
    versions, devices = about.get("versions"), about.get("devices")
    notes: list[str] = []
    metrics: list[Record] = []
    for record in _read_lines(workdir / "metrics.jsonl", ("step",), notes):
        step = record["step"]
        if type(step) is int and step > (metrics[-1]["step"] if metrics else -1):
            metrics.append(record)
    results = read_all_results(workdir)
    return RecordedRun(
        path=workdir,
        name=name,
        config=config,
        versions=versions if isinstance(versions, dict) else {},
        devices=devices if isinstance(devices, dict) else {},
        written=str(about.get("written", "")),
        metrics=metrics,
        events=_read_lines(workdir / "events.jsonl", ("event",), notes),
        skipped=_read_lines(workdir / "skipped.jsonl", ("source", "image", "reason"), notes),
        rewinds=_try(_read_rewinds, workdir / "rewinds.json", notes) or [],
        results=results,
        predictions=_read_predictions(workdir, results.get("linear"), notes),
        classifier=_try(
            lambda path: read_classifier(path.parent), workdir / "linear_classifier.npz", notes
        ),
        notes=tuple(notes),
    )


def _try(read: Callable[[epath.Path], _Read], path: epath.Path, notes: list[str]) -> _Read | None:
    """Reads a file; returns None if there is none, or, with a note, if it cannot be read."""
    try:
        return read(path) if path.exists() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return None


def _read_rewinds(path: epath.Path) -> list[Record]:
    return [entry for entry in read_json(path)["rewinds"] if isinstance(entry, dict)]


def _read_lines(path: epath.Path, required: tuple[str, ...], notes: list[str]) -> list[Record]:
    """Returns the valid lines of a file that have the required keys."""
    text = _try(read_text, path, notes) or ""
    valid, damaged = [], 0
    lines = text.splitlines()
    for i, line in enumerate(lines):
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or any(key not in record for key in required):
                raise ValueError("a key is missing")
            valid.append(record)
        except (ValueError, RecursionError):
            # The last line may be incomplete: the run may be writing it, or was killed.
            damaged += i < len(lines) - 1 or text.endswith("\n")
    if damaged:
        notes.append(f"{damaged} damaged lines of {path.name} are excluded")
    return valid


def _read_predictions(
    workdir: epath.Path, linear: Record | None, notes: list[str]
) -> Predictions | None:
    path = workdir / "linear_eval.npz"
    predictions = _try(lambda path: read_predictions(path.parent), path, notes)
    if predictions is None or linear is None:
        return None
    top1, same_step = as_number(linear.get("top1")), linear.get("step") == predictions.step
    if same_step and top1 is not None and math.isclose(top1, predictions.top1, abs_tol=1e-6):
        return predictions
    notes.append(f"{path.name} does not belong to the probe of linear_eval.json")
    return None


def as_number(value: Any) -> float | None:
    """Returns a value as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def as_text(value: Any, max_length: int = 200) -> str:
    """Returns a value from a file as one line of limited length."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value)) or "none"
    text = " ".join(str(value).split())
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def count_texts(records: list[Record], key: str) -> dict[str, int]:
    """Counts the values of a key by their text, the most frequent first."""
    return dict(collections.Counter(as_text(record[key], 80) for record in records).most_common())
