"""What a workdir says of its run, without opening its checkpoints or its images.

Everything in it may be damaged, cut off or written by somebody else: what cannot be read is left
out, and a note says so.
"""

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import Any

from etils import epath

from music_jax.errors import UserError
from music_jax.evaluation.predictions import Predictions, read_predictions
from music_jax.evaluation.runner import read_all
from music_jax.workdir.directory import find_workdir
from music_jax.workdir.files import parse_json, read_json, read_text
from music_jax.workdir.run_config import read_config

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a workdir's files say.

    Attributes:
      path: of the workdir.
      name: what the report calls it.
      config: the run's config, as JSON holds it.
      versions: of packages, by name.
      devices: what it ran on.
      written: when config.json was written.
      metrics: the lines of metrics.jsonl, ascending in `step`.
      events: the lines of events.jsonl.
      skipped: the lines of skipped.jsonl.
      rewinds: those that rewinds.json lists.
      results: figures by protocol.
      predictions: the linear probe's, if they belong to its figures.
      notes: what could not be read, for people.
    """

    path: epath.Path
    name: str
    config: Record
    versions: Record
    devices: Record
    written: str
    metrics: list[Record]
    events: list[Record]
    skipped: list[Record]
    rewinds: list[Record]
    results: dict[str, Record]
    predictions: Predictions | None
    notes: tuple[str, ...]

    def field(self, name: str, default: Any = None) -> Any:
        """A field of the config by its dotted name, whatever somebody made of it."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def size(self, name: str) -> int | None:
        """A field that is a positive whole number; None if it is none."""
        value = self.field(name)
        return value if type(value) is int and value > 0 else None

    @property
    def segments(self) -> tuple[int, int] | None:
        """Segments and units of the embedding; None where the objective knows none."""
        found = self.size("objective.num_segments"), self.size("objective.units_per_segment")
        if self.field("objective.name") != "music" or found[0] is None or found[1] is None:
            return None
        return found[0], found[1]

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole training, if what was logged tells."""
        epochs = self.size("num_epochs")
        for record in reversed(self.metrics):
            epoch = record.get("epoch")
            if epochs and isinstance(epoch, float) and epoch > 0 and record["step"]:
                return max(round(record["step"] / epoch * epochs), record["step"])
        return None


def read_workdirs(paths: list[str]) -> list[Recorded]:
    """Reads workdirs, and gives each a name that no other has.

    Raises:
      UserError: one is not there, holds no run, or is named twice.
    """
    where = check_workdirs(paths)
    names = _short_names([os.fspath(directory) for directory in where])
    return [_read(directory, name) for directory, name in zip(where, names, strict=True)]


def check_workdirs(paths: list[str]) -> list[epath.Path]:
    """Finds workdirs; errors as `read_workdirs`."""
    where: list[epath.Path] = []
    for path in paths:
        directory = find_workdir(path)
        if directory in where:
            raise UserError(f"the workdir {path} is named twice in --workdir")
        where.append(directory)
    return where


def _short_names(paths: list[str]) -> list[str]:
    """The last parts of paths, as many as make them differ."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def _read(directory: epath.Path, name: str) -> Recorded:
    config = read_config(directory)
    if config is None:  # it was there a moment ago
        raise UserError(f"{directory} holds no run: it has no config.json")
    about = read_json(directory / "config.json")
    notes: list[str] = []
    results = read_all(directory)
    return Recorded(
        path=directory,
        name=name,
        config=config,
        versions=_object(about.get("versions")),
        devices=_object(about.get("devices")),
        written=str(about.get("written", "")),
        metrics=_ascending(_lines(directory / "metrics.jsonl", ("step",), notes)),
        events=_lines(directory / "events.jsonl", ("event",), notes),
        skipped=_lines(directory / "skipped.jsonl", ("source", "image", "reason"), notes),
        rewinds=_rewinds(directory / "rewinds.json", notes),
        results=results,
        predictions=_predictions(directory, results, notes),
        notes=tuple(notes),
    )


def _object(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def _lines(path: epath.Path, needed: tuple[str, ...], notes: list[str]) -> list[Record]:
    """The whole lines of a file that have what is needed."""
    if not path.exists():
        return []
    try:
        text = read_text(path)
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return []
    found, damaged = [], 0
    lines = text.splitlines()
    for i, line in enumerate(lines):
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or any(key not in record for key in needed):
                raise ValueError("it lacks something")
            found.append(record)
        except (ValueError, RecursionError):
            # The last line of a run that goes on, or was cut off, may be half a line.
            damaged += i < len(lines) - 1 or text.endswith("\n")
    if damaged:
        notes.append(f"{damaged} damaged lines of {path.name} are left out")
    return found


def _ascending(metrics: list[Record]) -> list[Record]:
    kept: list[Record] = []
    for record in metrics:
        step = record["step"]
        if type(step) is int and step > (kept[-1]["step"] if kept else 0):
            kept.append(record)
    return kept


def _rewinds(path: epath.Path, notes: list[str]) -> list[Record]:
    if not path.exists():
        return []
    try:
        return [r for r in read_json(path)["rewinds"] if isinstance(r, dict)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"rewinds.json cannot be read: {error}")
        return []


def _predictions(
    directory: epath.Path, results: dict[str, Record], notes: list[str]
) -> Predictions | None:
    try:
        found = read_predictions(directory)
    except ValueError as error:
        notes.append(f"linear_eval.npz cannot be read: {error}")
        return None
    figures = results.get("linear")
    if found is None or figures is None:
        return None
    same = figures.get("step") == found.step and math.isclose(
        figures["top1"], found.top1, abs_tol=1e-6
    )
    if not same:
        notes.append("linear_eval.npz belongs to another probe than linear_eval.json")
    return found if same else None


def number(value: Any) -> float | None:
    """A value as a finite number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def said(value: Any, limit: int = 200) -> str:
    """A value of a file as text of bounded length."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value)) or "none"
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def counted(values: Iterable[Any]) -> dict[str, int]:
    """How often each value comes, as text, the most frequent first."""
    counts: dict[str, int] = {}
    for value in values:
        counts[said(value, 80)] = counts.get(said(value, 80), 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
