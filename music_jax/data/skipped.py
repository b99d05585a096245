"""skipped.jsonl: the images that a run could not read, one line each, by what they are called."""

import collections
import contextlib
import json
import threading

from etils import epath

from music_jax.appending import Appended, open_to_append
from music_jax.data.sources import Source
from music_jax.errors import UnusableDataError, UserError
from music_jax.json_files import parse_json, read_text

_FILE = "skipped.jsonl"


class SkippedImages:
    """Takes note of images that were skipped, from any thread, and says when they are too many.

    Each process of a run notes what it met in a file of its own; `merge` makes one of them.
    """

    def __init__(self, directory: epath.Path, *, max_share: float, process_index: int = 0):
        """Opens the list, with what earlier runs noted in the same directory.

        Args:
          directory: where the list is.
          max_share: the largest share of a source's images that may be skipped.
          process_index: of this process.

        Raises:
          UserError: the list cannot be read.
        """
        self.path = directory / _FILE
        self._max_share = max_share
        self._own = self.path if process_index == 0 else _part(directory, process_index)
        self._lock = threading.Lock()
        self._file: Appended | None = None  # open from the first image on
        # (source, image): reason
        self._reasons: dict[tuple[str, str], str] = {}
        for path in {self.path, self._own, *self._parts()}:
            self._reasons |= _read(path)
        self._counts = collections.Counter(source for source, _ in self._reasons)
        _drop_cut_off_line(self._own)

    def __len__(self) -> int:
        return len(self._reasons)

    def add_left_out(self, source: Source) -> None:
        """Notes what was left out when the source was opened."""
        for image, reason in source.left_out:
            self._add(source, image, reason)

    def add(self, source: Source, index: int, reason: str) -> None:
        """Notes one image.

        Raises:
          UnusableDataError: more than the largest share of the source's images are skipped.
        """
        self._add(source, source.record_name(index), reason)

    def _add(self, source: Source, image: str, reason: str) -> None:
        with self._lock:
            if (source.name, image) not in self._reasons:
                self._write(source.name, image, reason)
            count = self._counts[source.name]
        if count > self._max_share * source.split_size:
            raise UnusableDataError(
                f"{count} of the {source.split_size} images of {source.name} cannot be read, more "
                f"than the share config.dataset.max_skipped_share = {self._max_share:g}; they are "
                f"listed in {self.path}"
            )

    def merge(self) -> None:
        """Joins what all processes noted; for process 0, once the others add nothing any more."""
        with self._lock:
            listed = set(_read(self.path))
            for part in self._parts():
                for (source, image), reason in _read(part).items():
                    if (source, image) not in listed:
                        listed.add((source, image))
                        self._write(source, image, reason)
                if self._file is not None:
                    self._file.flush(now=True)
                part.unlink()

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

    def _write(self, source: str, image: str, reason: str) -> None:
        if (source, image) not in self._reasons:
            self._reasons[source, image] = reason
            self._counts[source] += 1
        if self._file is None:
            self._file = open_to_append(self._own)
        line = json.dumps({"source": source, "image": image, "reason": reason})
        self._file.write(line + "\n")
        with contextlib.suppress(OSError):  # a full disk; the next line, or `close`, tries again
            self._file.flush()

    def _parts(self) -> list[epath.Path]:
        return sorted(self.path.parent.glob(_part(self.path.parent, "*").name))


def _part(directory: epath.Path, process: int | str) -> epath.Path:
    return directory / f"skipped.process_{process}.jsonl"


def _read(path: epath.Path) -> dict[tuple[str, str], str]:
    """The lines of a list; one that was cut off is left out, and noted again when it is met."""
    found = {}
    for line in _text(path).splitlines():
        try:
            record = parse_json(line)
            said = record["source"], record["image"], record["reason"]
        except (ValueError, KeyError, TypeError):
            continue
        if all(isinstance(each, str) for each in said):
            found[said[:2]] = said[2]
    return found


def _text(path: epath.Path) -> str:
    try:
        return read_text(path) if path.exists() else ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; remove it to go on") from error


def _drop_cut_off_line(path: epath.Path) -> None:
    text = _text(path)
    if text and not text.endswith("\n"):
        temporary = path.with_name(path.name + ".new")
        temporary.write_text(text[: text.rfind("\n") + 1])
        temporary.replace(path)
