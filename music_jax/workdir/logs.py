"""The logs of a run, which grow line by line: metrics.jsonl and events.jsonl."""

import atexit
import contextlib
import datetime
import json
import logging
import math
import os
import stat
import time
from typing import Any

from etils import epath

from music_jax.distributed.mesh import is_main_process
from music_jax.errors import UserError
from music_jax.workdir.files import in_bucket, parse_json, write_new

_logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_UPLOADS = 10.0
_MAX_UPLOAD_SHARE = 0.05  # of the time, that uploads may take


class Appender:
    """A text file to which text is appended.

    A file on a disk is open only while it is written to. A file with several hard links is first
    replaced by a copy, so that only this one grows.

    An object in a bucket (`gs://`) cannot grow, so it is uploaded completely: at most every ten
    seconds, when it is closed, and when Python exits. A process that is killed loses what was
    written since the last upload.
    """

    def __init__(self, path: epath.Path | None, *, ignore_failures: bool = False):
        """Checks the path.

        Args:
          path: File; None to drop the text.
          ignore_failures: Whether a full disk or an unreachable bucket causes a warning, and text
            that is written later, in place of an OSError.

        Raises:
          UserError: The path is a link, a pipe or the like.
        """
        self._path: Any = path
        self._ignore_failures = ignore_failures
        self._has_failed = False
        self._pending = ""
        self._uploaded: str | None = None  # content of an object in a bucket
        self._next_upload = 0.0
        if path is None:
            return
        if in_bucket(path):
            self._uploaded = path.read_text() if path.exists() else ""
            atexit.register(self.close)
            return
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(
                    f"{path} is a link or not a file, so it is not written to; remove it"
                )
            if status.st_nlink > 1:
                write_new(path, path.read_bytes())

    def append(self, text: str) -> None:
        """Appends text, which `flush` writes to the file."""
        if self._path is not None:
            self._pending += text

    def flush(self) -> None:
        """Makes the text visible to others; in a bucket some seconds later.

        Raises:
          OSError: The file cannot be written; the next flush tries again.
        """
        started = time.monotonic()
        if not self._pending or started < self._next_upload:
            return
        try:
            if self._uploaded is None:
                self._append_pending()
            else:
                self._path.write_text(self._uploaded + self._pending)
                self._uploaded += self._pending
                ended = time.monotonic()
                pause = max(_SECONDS_BETWEEN_UPLOADS, (ended - started) / _MAX_UPLOAD_SHARE)
                self._next_upload = ended + pause
        except OSError as error:
            if not self._ignore_failures:
                raise
            if not self._has_failed:
                self._has_failed = True
                _logger.warning(f"{self._path.name} is behind: {error}")
            return
        self._pending = ""

    def close(self) -> None:
        """Makes the text visible to others at once; more may be appended later. See `flush`."""
        self._next_upload = 0.0
        self.flush()

    def _append_pending(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with open(os.open(self._path, flags, 0o666), "wb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            rest = memoryview(self._pending.encode())
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)  # leaves no partial line
                raise


class MetricsLog(Appender):
    """metrics.jsonl: one line for each logged step, written by the main process alone."""

    def __init__(self, workdir: epath.Path, start_step: int, *, ignore_failures: bool = False):
        """Opens the file and removes what an interrupted run logged after `start_step`.

        Lines that cannot be read or that repeat a step are removed with a warning.

        Args:
          workdir: Workdir of the run.
          start_step: Step from which the run resumes.
          ignore_failures: See `Appender`.
        """
        path = workdir / "metrics.jsonl"
        if is_main_process():
            _repair(path, start_step)
        super().__init__(path if is_main_process() else None, ignore_failures=ignore_failures)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line."""
        self.append(json.dumps(record) + "\n")
        self.flush()


class EventsLog(Appender):
    """events.jsonl: one line for each resume, tripped guard, rewind, skip or failed save.

    Unlike metrics.jsonl it covers every attempt, and nothing is ever removed. Every process may
    write; the lines of all but the main process are dropped. If the disk is full, the lines are
    written when there is space again.
    """

    def __init__(self, workdir: epath.Path):
        """Opens the file and completes a partial last line."""
        path = workdir / "events.jsonl" if is_main_process() else None
        super().__init__(path, ignore_failures=True)
        if path is not None and path.exists() and not path.read_bytes().endswith(b"\n"):
            self.append("\n")

    def write(self, event: str, **fields: Any) -> None:
        """Adds a line; numbers that are not finite become text."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.append(json.dumps({"event": event, "time": now} | _finite(fields)) + "\n")
        self.flush()


def _repair(path: epath.Path, start_step: int) -> None:
    """Removes lines that are damaged, repeat a step or come after `start_step`."""
    before = path.read_bytes() if path.exists() else b""
    kept: dict[int, bytes] = {}
    lines, last = before.splitlines(), -1
    for line in lines:
        step = _step_of(line)
        if step is not None and step > last:
            kept[step], last = line, step
    num_lost = len(lines) - len(kept)
    # An interrupted run may leave a partial last line, which is not worth a warning.
    num_lost -= bool(lines and not before.endswith(b"\n") and _step_of(lines[-1]) is None)
    if num_lost:
        _logger.warning(f"removed {num_lost} damaged or repeated lines from {path}")
    # A run that starts logs step 0 again.
    after = b"".join(line + b"\n" for step, line in kept.items() if step <= start_step != 0)
    if after != before:
        write_new(path, after)


def _finite(value: Any) -> Any:
    """Replaces every number that JSON cannot express by text, such as "nan"."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _step_of(line: bytes) -> int | None:
    """Returns the step of a line; None if the line is damaged or incomplete."""
    try:
        step = parse_json(line.decode())["step"]
        return step if type(step) is int and step >= 0 else None
    except (ValueError, KeyError, TypeError):
        return None
