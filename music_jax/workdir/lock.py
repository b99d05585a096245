"""The lock of a workdir, for one writer at a time on any host."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
from typing import IO, Any

from etils import epath

from music_jax.distributed.progress import printable
from music_jax.errors import UserError
from music_jax.workdir.files import in_bucket, parse_json, read_text

_logger = logging.getLogger(__name__)

_MAX_RECORD = 4096  # characters
_RECORD_WIDTH = 511  # of what a holder writes
_HEARTBEAT_SECONDS = 10.0
_SILENT_SECONDS = 40.0  # without an update, after which a holder on another host counts as ended
_SETTLE_SECONDS = 2.0  # until one of two processes that lock at once can read the other's record


class WorkdirLock:
    """A context in which this process alone may write to a workdir.

    The file `lock` records the holder's host and pid, and a count that the holder increments while
    it runs. On the holder's host the operating system shows whether it has ended, so that a killed
    run can be resumed at once. On another host, and in buckets (`gs://`), the holder has ended once
    the count stops changing.
    """

    def __init__(self, workdir: epath.Path):
        """Stores the directory; entering the context locks it."""
        self._workdir = workdir
        self._path = workdir / "lock"
        self._file: IO[str] | None = None
        self._released = threading.Event()
        self._heartbeats = threading.Thread(target=self._send_heartbeats, name="lock", daemon=True)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
        self._count = 0

    def __enter__(self) -> "WorkdirLock":
        """Takes the lock.

        Raises:
          UserError: Another process holds the lock (the message names its host and pid), or the
            file cannot be read or written, or it is a hard link, so that writing would change
            another file.
        """
        try:
            has_os_lock = self._take_os_lock()
            if (holder := self._other()) and not self._has_ended(holder, has_os_lock):
                raise self._is_held(holder)
            self._write()
            if not has_os_lock:
                time.sleep(_SETTLE_SECONDS)
                if holder := self._other():
                    raise self._is_held(holder)
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise UserError(f"cannot lock {self._workdir}: {error}") from error
            raise
        self._heartbeats.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._released.set()
        self._heartbeats.join()
        with contextlib.suppress(OSError):
            if self._other() is None:  # not taken over while this process was suspended
                self._path.write_text("")
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _take_os_lock(self) -> bool:
        """Returns whether the operating system now excludes other processes of this host."""
        if in_bucket(self._workdir):
            return False
        self._file = open(self._path, "a")  # noqa: SIM115  (open as long as the lock is held)
        if os.fstat(self._file.fileno()).st_nlink > 1:
            raise UserError(f"{self._path} is another file too, by a hard link; remove it")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._is_held(_read(self._path)) from error
        except OSError:  # a file system without locks
            return False
        return True

    def _has_ended(self, holder: dict[str, Any], has_os_lock: bool) -> bool:
        if holder["host"] == self._own["host"]:
            return has_os_lock or not _is_running(holder["pid"])
        _logger.info(
            f"{self._workdir} was last written to by {_describe(holder)}; waiting for up to "
            f"{_SILENT_SECONDS:g} s to see whether it still is"
        )
        deadline = time.monotonic() + _SILENT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(1)
            if (now := _read(self._path)) != holder:
                return now is None
        return True

    def _send_heartbeats(self) -> None:
        while not self._released.wait(_HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # the disk is full, or the bucket does not answer
                if holder := self._other():
                    message = printable(
                        f"error: {self._workdir} was taken over by {_describe(holder)} while this "
                        "process was suspended"
                    )
                    print(f"\n{message}", file=sys.stderr, flush=True)
                    os._exit(UserError.exit_code)
                self._write()

    def _write(self) -> None:
        self._count += 1
        record = json.dumps(self._own | {"count": self._count})
        if self._file is None:
            self._path.write_text(record + "\n")
            return
        # One write of fixed length, since others take an empty file for a released lock.
        content = f"{record:{_RECORD_WIDTH}}\n".encode()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
        with open(descriptor, "wb", buffering=0) as file:
            file.write(content)
            file.truncate()

    def _other(self) -> dict[str, Any] | None:
        """Returns the record of another holder; None if there is none."""
        holder = _read(self._path)
        return None if holder is None or self._own.items() <= holder.items() else holder

    def _is_held(self, holder: dict[str, Any] | None) -> UserError:
        return UserError(
            f"{self._workdir} is being written to by {_describe(holder)}; wait for it or stop it, "
            "or give another --workdir"
        )


def _read(path: epath.Path) -> dict[str, Any] | None:
    """Returns the holder's record; None if there is none or it is damaged.

    Raises:
      OSError: The file cannot be read.
    """
    try:
        record = parse_json(read_text(path)[:_MAX_RECORD])
        return record if {"host", "pid", "started"} <= record.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _describe(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    return f"process {holder['pid']} on {holder['host']}, since {holder['started']}"


def _is_running(pid: Any) -> bool:
    if pid == os.getpid():  # a container's process often gets the number of the one before it
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError, ValueError, TypeError):
        return False
    except PermissionError:
        pass
    return True
