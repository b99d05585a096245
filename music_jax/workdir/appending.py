"""Files that grow line by line, on disks and in buckets."""

import atexit
import contextlib
import os
import stat
import time
from typing import Protocol

from etils import epath

from music_jax.errors import UserError
from music_jax.workdir.new_file import write_new

_SECONDS_BETWEEN_UPLOADS = 10.0
_LARGEST_SHARE = 0.05  # of the time, that may be spent on uploading


class Appended(Protocol):
    """What `open_to_append` gives: a part of what text files do."""

    def write(self, text: str, /) -> object:
        """Adds text."""

    def flush(self, *, now: bool = False) -> None:
        """Makes it visible to others: on a disk at once, in a bucket some seconds later, or `now`.

        Raises:
          OSError: it cannot be written; the next flush tries again.
        """

    def close(self) -> None:
        """Makes it visible to others and ends; raises as `flush` does."""


def open_to_append(path: epath.Path) -> Appended:
    """Opens a text file to add lines to what is there.

    A file that has other names is replaced by a copy first, so that only this one grows.

    An object in a bucket (`gs://`) cannot grow, and opening it with mode `a` replaces it: it is
    written anew as a whole, at most every ten seconds, when it is closed, and when Python exits. A
    process that is killed loses what came after the last of these.

    Raises:
      UserError: The path is a link, a pipe or the like.
    """
    return _Object(path) if "://" in str(path) else _File(path)


class _File:
    """On a disk; it is open only while it is written to."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._added = ""
        _detach(path)

    def write(self, text: str) -> None:
        self._added += text

    def flush(self, *, now: bool = False) -> None:
        if not self._added:
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            left = memoryview(self._added.encode())
            try:
                while left:
                    left = left[os.write(descriptor, left) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)  # no half lines
                raise
        finally:
            os.close(descriptor)
        self._added = ""

    def close(self) -> None:
        self.flush()


def _detach(path: epath.Path) -> None:
    """Checks that a file, if it is there, is no link, and replaces a hard link by a copy."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is a link or no file, so nothing is added to it; remove it")
    if status.st_nlink > 1:
        write_new(path, path.read_bytes())


class _Object:
    """In a bucket."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._text = path.read_text() if path.exists() else ""
        self._uploaded = len(self._text)
        self._next_upload = 0.0
        atexit.register(self.close)

    def write(self, text: str) -> None:
        self._text += text

    def flush(self, *, now: bool = False) -> None:
        if now or time.monotonic() >= self._next_upload:
            self._upload()

    def close(self) -> None:
        self._upload()
        atexit.unregister(self.close)

    def _upload(self) -> None:
        if self._uploaded == len(self._text):
            return
        started = time.monotonic()
        self._path.write_text(self._text)
        self._uploaded, now = len(self._text), time.monotonic()
        self._next_upload = now + max(_SECONDS_BETWEEN_UPLOADS, (now - started) / _LARGEST_SHARE)
