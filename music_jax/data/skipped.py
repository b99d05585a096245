"""skipped.jsonl: the images that a run could not read, one line each, by what they are called."""

import collections
import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import config_dict

from music_jax.data.sources import Source
from music_jax.errors import UnusableDataError, UserError
from music_jax.workdir.files import parse_json, read_text, write_new
from music_jax.workdir.logs import Appender, open_to_append

_logger = logging.getLogger(__name__)

_FILE = "skipped.jsonl"
_SECONDS_BETWEEN_LOOKS = 5.0  # at the lists of the other processes
_LARGEST_SHARE = 0.05  # of the time, that may be spent on looking


class _Image(NamedTuple):
    source: str
    name: str


class _Note(NamedTuple):
    reason: str
    source_images: int | None  # of the whole split; None where a list does not say


class SkippedImages:
    """Takes note of images that were skipped, from any thread, and says when they are too many.

    Each process of a run notes what it met in a file of its own; `merge` makes one of them. What
    may be skipped is a share of what all processes read. Where more of it is skipped, at least one
    of N processes has noted more than an Nth of that share: only then it looks at the lists of the
    others, and now and then.
    """

    def __init__(
        self,
        directory: epath.Path,
        *,
        max_share: float,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        """Opens the list, with what earlier runs noted in the same directory.

        Args:
          directory: where the list is.
          max_share: the largest share of a source's images that may be skipped, by all processes.
          process_index: of this process.
          num_processes: that note what they skip in this directory.

        Raises:
          UserError: the list cannot be read.
        """
        self.path = directory / _FILE
        self._max_share = max_share
        self._num_processes = num_processes
        self._own = self.path if process_index == 0 else _part(directory, process_index)
        self._lock = threading.Lock()
        self._file: Appender | None = None  # open from the first image on
        self._next_look = 0.0
        self._noted: set[_Image] = set()
        self._counts: collections.Counter[str] = collections.Counter()
        # How many images those sources have of which something was noted since this was opened.
        self._sizes: dict[str, int] = {}
        self._lists: set[epath.Path] = set()  # that are not empty
        for path in (self._own, *self._others()):
            self._take(path, _read(path))
        self._sizes.clear()

    def __len__(self) -> int:
        return len(self._noted)

    def add(self, source: Source, index: int, reason: str) -> None:
        """Notes one image.

        Raises:
          UnusableDataError: more than the largest share of the source's images are skipped.
        """
        image, size = _Image(source.name, source.record_name(index)), source.split_size
        with self._lock:
            self._sizes[source.name] = size
            if image not in self._noted:
                note = _Note(reason, size)
                self._write(image, note)
                self._take(self._own, {image: note})
            if self._file is not None:
                with contextlib.suppress(OSError):  # a full disk; the next image tries again
                    self._file.flush()
            self._check()
            own_part = self._max_share * size / self._num_processes
            if self._counts[source.name] <= own_part or time.monotonic() < self._next_look:
                return
            self._next_look = math.inf  # until this thread has looked; others go on
        self._look()

    def _look(self) -> None:
        """Takes in what the other processes have noted."""
        started = time.monotonic()
        found = {}
        # Whatever a bucket's client raises: the next look, or `merge`, reads it.
        with contextlib.suppress(Exception):
            for path in self._others():
                found[path] = _read(path)
        with self._lock:
            now = time.monotonic()
            took = now - started
            self._next_look = now + max(_SECONDS_BETWEEN_LOOKS, took / _LARGEST_SHARE)
            for path, notes in found.items():
                self._take(path, notes)
            self._check()

    def merge(self) -> None:
        """Joins what all processes noted; for process 0, once the others add nothing any more.

        Raises:
          UnusableDataError: of a source of which something was noted since this was opened, more
            than the largest share of the images are skipped.
        """
        with self._lock:
            listed = set(_read(self.path))
            for part in self._parts():
                notes = _read(part)
                for image, note in notes.items():
                    if image not in listed:
                        listed.add(image)
                        self._write(image, note)
                if self._file is not None:
                    self._file.flush(now=True)
                self._take(self.path, notes)
                part.unlink()
            self._lists = {self.path}
            self._check()

    def check(self, source: Source) -> None:
        """Judges by what is known: the lists that were there, and what this process has noted.

        Raises:
          UnusableDataError: more than the largest share of the source's images are skipped.
        """
        with self._lock:
            self._sizes[source.name] = source.split_size
            self._check()

    def close(self) -> None:
        """Makes all that was noted visible to others; more may be noted later.

        Raises:
          OSError: the list cannot be written, such as on a full disk.
        """
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def summary(self) -> str:
        """What to say at the end of a run: how many of each source, and where they are listed."""
        said = ", ".join(f"{count} of {source}" for source, count in sorted(self._counts.items()))
        return f"skipped images that cannot be read: {said}; they are listed in {self.path}"

    def _check(self) -> None:
        for source, size in self._sizes.items():
            count = self._counts[source]
            if count > self._max_share * size:
                raise UnusableDataError(
                    f"{count} of the {size} images of {source} cannot be read, more than the share "
                    f"config.dataset.max_skipped_share = {self._max_share:g}; they are listed in "
                    f"{self._where()}. Once the images are repaired, delete skipped*.jsonl (and "
                    "images.json) there."
                )

    def _where(self) -> str:
        """Which lists hold what was noted, this process's own first."""
        lists = sorted(self._lists, key=lambda path: (path != self._own, path))
        if len(lists) > 2:
            return f"{lists[0]} and {len(lists) - 1} more lists beside it, skipped*.jsonl"
        return " and ".join(map(str, lists))

    def _take(self, path: epath.Path, notes: Mapping[_Image, _Note]) -> None:
        """Counts what a list says and was not known."""
        if notes:
            self._lists.add(path)
        for image, note in notes.items():
            if image not in self._noted:
                self._noted.add(image)
                self._counts[image.source] += 1
                if note.source_images is not None:
                    self._sizes.setdefault(image.source, note.source_images)

    def _write(self, image: _Image, note: _Note) -> None:
        if self._file is None:
            if not os.path.islink(self._own):  # which is refused below
                _drop_cut_off_line(self._own)
            self._file = open_to_append(self._own)
        line: dict[str, str | int]
        line = {"source": image.source, "image": image.name, "reason": note.reason}
        if note.source_images is not None:
            line["source_images"] = note.source_images
        self._file.write(json.dumps(line) + "\n")

    def _others(self) -> list[epath.Path]:
        """The lists of the other processes that are there."""
        return [path for path in (self.path, *self._parts()) if path != self._own]

    def _parts(self) -> list[epath.Path]:
        return sorted(self.path.parent.glob(_part(self.path.parent, "*").name))


class UnlistedImages(SkippedImages):
    """Takes note of skipped images in memory alone."""

    def _write(self, image: _Image, note: _Note) -> None:
        pass


def _part(directory: epath.Path, process: int | str) -> epath.Path:
    return directory / f"skipped.process_{process}.jsonl"


def _read(path: epath.Path) -> dict[_Image, _Note]:
    """The lines of a list; one that was cut off is left out, and noted again when it is met."""
    found = {}
    for line in _text(path).splitlines():
        try:
            record = parse_json(line)
            said = record["source"], record["image"], record["reason"]
            size = record.get("source_images")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if all(isinstance(each, str) for each in said):
            known = type(size) is int and size > 0
            found[_Image(*said[:2])] = _Note(said[2], size if known else None)
    return found


def _text(path: epath.Path) -> str:
    try:
        return read_text(path)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; remove it to go on") from error


def _drop_cut_off_line(path: epath.Path) -> None:
    text = _text(path)
    if text and not text.endswith("\n"):
        write_new(path, text[: text.rfind("\n") + 1].encode())


def open_skipped(workdir: epath.Path, config: config_dict.ConfigDict) -> SkippedImages:
    """Opens skipped.jsonl, in which this process notes the images that it cannot decode."""
    return SkippedImages(
        workdir,
        max_share=config.dataset.max_skipped_share,
        process_index=jax.process_index(),
        num_processes=jax.process_count(),
    )


def join_skipped(skipped: SkippedImages, source: Source | None = None) -> None:
    """Joins the notes of all processes in skipped.jsonl; all processes call this together.

    Args:
      skipped: Notes of this process.
      source: Images of which those that earlier runs skipped count as well.

    Raises:
      UnusableDataError: On process 0, if all processes together skip more of a source's images than
        allowed; the other processes then wait until its failure reaches them.
    """
    skipped.close()
    _wait_for_all("skipped images noted")
    if jax.process_index() == 0:
        try:
            skipped.merge()
        finally:
            skipped.close()
        if source is not None:
            skipped.check(source)
    _wait_for_all("skipped images joined")


def report_skipped(skipped: SkippedImages) -> None:
    """Joins the notes of all processes and logs how many images were skipped.

    Raises:
      UnusableDataError: See `join_skipped`.
    """
    join_skipped(skipped)
    if jax.process_index() == 0 and len(skipped):
        _logger.warning(skipped.summary())


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
