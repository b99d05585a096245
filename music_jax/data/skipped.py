"""Lists the images that a run could not read, one per line of skipped.jsonl."""

import collections
import contextlib
import json
import logging
import os
import threading
import time
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import config_dict

from music_jax.data.sources import Source
from music_jax.distributed.shares import ALL, Share
from music_jax.errors import UnusableDataError, UserError
from music_jax.workdir.files import parse_json, read_text, write_new
from music_jax.workdir.logs import Appender

_logger = logging.getLogger(__name__)

_FILE = "skipped.jsonl"
_SECONDS_BETWEEN_READS = 5.0  # of the lists of the other processes
_LARGEST_SHARE = 0.05  # of the time, that may be spent on reading them

# Older versions did not write `source_images`, the number of images in the whole split.
_REMEDY = "Once the images are repaired, delete skipped*.jsonl (and images.json) there."
_KEYS = ("source", "image", "reason", "source_images")
_Lines = dict[tuple[str, str], dict[str, Any]]  # by source and image


class SkippedImages:
    """Lists skipped images, from any thread, and raises when they are too many.

    Each process of a run writes a list of its own, which `merge` joins. The limit is a share of the
    images that all processes skip together. If it is exceeded, at least one of N processes has
    listed more than an Nth of it; only such a process reads the lists of the others.
    """

    def __init__(
        self,
        directory: epath.Path,
        *,
        max_share: float,
        share: Share = ALL,
        remedy: str = _REMEDY,
    ):
        """Opens the list, with the images that earlier runs listed in the same directory.

        Args:
          directory: Directory of the list.
          max_share: Largest share of a source's images that all processes may skip.
          share: Index of this process, and number of those that list images in this directory.
          remedy: What to do if more images are skipped, the end of the message that says so.

        Raises:
          UserError: The list cannot be read.
        """
        self.path = directory / _FILE
        self._max_share, self._remedy = max_share, remedy
        self._num_processes = share.count
        self._own = self.path if share.index == 0 else _part(directory, share.index)
        self._lock = threading.Lock()
        self._file: Appender | None = None  # open from the first image on
        self._next_read = 0.0
        self._listed: set[tuple[str, str]] = set()
        self._counts: collections.Counter[str] = collections.Counter()
        self._sizes: dict[str, int] = {}  # of the sources that are checked
        self._examples: dict[str, str] = {}  # an image of each source, with the reason
        for path in (self._own, *self._others()):
            self._count(_read(path))
        self._sizes.clear()  # images that earlier runs listed may have been repaired

    def __len__(self) -> int:
        return len(self._listed)

    def add(self, source: Source, index: int, reason: str) -> None:
        """Lists one image.

        Raises:
          UnusableDataError: More than the largest share of the source's images are skipped.
        """
        image, size = (source.name, source.record_name(index)), source.split_size
        with self._lock:
            self._sizes[source.name] = size
            if image not in self._listed:
                line = dict(zip(_KEYS, (*image, reason, size), strict=True))
                self._write(line)
                self._count({image: line})
            if self._file is not None:
                with contextlib.suppress(OSError):  # a full disk; the next image tries again
                    self._file.flush()
            self._check()
            started = time.monotonic()
            own_part = self._max_share * size / self._num_processes
            if self._counts[source.name] > own_part and started >= self._next_read:
                # Whatever a bucket's client raises: the next time, or `merge`, reads the list.
                with contextlib.suppress(Exception):
                    for path in self._others():
                        self._count(_read(path))
                ended = time.monotonic()
                pause = max(_SECONDS_BETWEEN_READS, (ended - started) / _LARGEST_SHARE)
                self._next_read = ended + pause
                self._check()

    def merge(self) -> None:
        """Joins the lists of all processes; called when no process adds any more.

        Raises:
          UnusableDataError: More than the largest share of the images of a source are skipped, of
            which an image was skipped since this was opened.
        """
        with self._lock:
            self._close()
            parts = self._parts()
            # Another process may do the same: it removes a part once the joined list has its lines.
            lists = [_read(part) for part in parts]
            joined = _read(self.path)
            lines = {image: line for found in lists for image, line in found.items()}
            if parts:
                lines = joined | {image: lines[image] for image in lines if image not in joined}
                text = "".join(json.dumps(line) + "\n" for line in lines.values())
                write_new(self.path, text.encode())
            for part in parts:
                part.unlink(missing_ok=True)
            self._count(lines)
            self._check()

    def check(self, source: Source) -> None:
        """Checks a source by the images that are known to be skipped, by earlier runs too.

        Raises:
          UnusableDataError: More than the largest share of the source's images are skipped.
        """
        with self._lock:
            self._sizes[source.name] = source.split_size
            self._check()

    def close(self) -> None:
        """Makes all listed images visible to others; more may be added later.

        Raises:
          OSError: The list cannot be written, for example on a full disk.
        """
        with self._lock:
            self._close()

    def summary(self) -> str:
        """Returns a line with the number of skipped images of each source."""
        counts = ", ".join(f"{count} of {source}" for source, count in sorted(self._counts.items()))
        return f"skipped images that cannot be read: {counts}; they are listed in {self.path}"

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _check(self) -> None:
        for source, size in self._sizes.items():
            count = self._counts[source]
            if count > self._max_share * size:
                lists = self.path.with_name("skipped*.jsonl") if self._parts() else self.path
                raise UnusableDataError(
                    f"{count} of the {size} images of {source} cannot be read, more than the share "
                    f"config.dataset.max_skipped_share = {self._max_share:g}; they are listed in "
                    f"{lists}, such as {self._examples[source]}. {self._remedy}"
                )

    def _count(self, lines: _Lines) -> None:
        """Counts the images that were not known."""
        for (source, name), line in lines.items():
            if (source, name) not in self._listed:
                self._listed.add((source, name))
                self._counts[source] += 1
                self._examples.setdefault(source, f"{name}: {line['reason']}"[:300])
                if "source_images" in line:
                    self._sizes.setdefault(source, line["source_images"])

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            text = _text(self._own)
            if text and not text.endswith("\n") and not os.path.islink(self._own):
                write_new(self._own, text[: text.rfind("\n") + 1].encode())
            self._file = Appender(self._own)  # refuses a link
        self._file.append(json.dumps(line) + "\n")

    def _others(self) -> list[epath.Path]:
        """Returns the existing lists of the other processes."""
        return [path for path in (self.path, *self._parts()) if path != self._own]

    def _parts(self) -> list[epath.Path]:
        return sorted(self.path.parent.glob(_part(self.path.parent, "*").name))


class UnlistedImages(SkippedImages):
    """Counts skipped images without writing a list."""

    def merge(self) -> None:
        """Leaves the lists of other processes as they are."""

    def _write(self, line: dict[str, Any]) -> None:
        pass


def _part(directory: epath.Path, process: int | str) -> epath.Path:
    return directory / f"skipped.process_{process}.jsonl"


def _read(path: epath.Path) -> _Lines:
    """Reads a list without its damaged lines, whose images are listed again once encountered."""
    found = {}
    for text in _text(path).splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            record = parse_json(text)
            line = {key: record[key] for key in _KEYS[:3]}
            if not all(isinstance(value, str) for value in line.values()):
                continue
            if type(size := record.get("source_images")) is int and size > 0:
                line["source_images"] = size
            found[line["source"], line["image"]] = line
    return found


def _text(path: epath.Path) -> str:
    try:
        return read_text(path)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; remove it and rerun the command") from error


def open_skipped(workdir: epath.Path, config: config_dict.ConfigDict) -> SkippedImages:
    """Opens skipped.jsonl, in which this process lists the images that it cannot decode."""
    return SkippedImages(
        workdir,
        max_share=config.dataset.max_skipped_share,
        share=Share(jax.process_index(), jax.process_count()),
    )


def join_skipped(skipped: SkippedImages, source: Source | None = None) -> None:
    """Joins the lists of all processes in skipped.jsonl; all processes call this together.

    Of a `source` that is given, the images that earlier runs skipped count as well.

    Raises:
      UnusableDataError: On process 0, if all processes together skip more of a source's images than
        allowed; the other processes then wait until its failure reaches them.
    """
    skipped.close()
    multihost_utils.sync_global_devices("skipped images noted")
    if jax.process_index() == 0:
        try:
            skipped.merge()
        finally:
            skipped.close()
        if source is not None:
            skipped.check(source)
    multihost_utils.sync_global_devices("skipped images joined")


def report_skipped(skipped: SkippedImages) -> None:
    """Joins the lists of all processes and logs how many images were skipped.

    Raises:
      UnusableDataError: See `join_skipped`.
    """
    join_skipped(skipped)
    if jax.process_index() == 0 and len(skipped):
        _logger.warning(skipped.summary())
