"""One writer a workdir."""

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
from types import TracebackType
from typing import IO, Any

from etils import epath

from music_jax.distributed.terminal import printable
from music_jax.errors import UserError
from music_jax.workdir.json_files import parse_json, read_text

_logger = logging.getLogger(__name__)

_FILE = "lock"
_MAX_CHARACTERS = 4096  # what is written is far shorter
_WIDTH = 511  # to which a record on a disk is filled up
_BEAT_SECONDS = 10.0
_SILENT_SECONDS = 40.0  # after which a holder on another host counts as ended
_SETTLE_SECONDS = 2.0  # in which one of two that take the lock at once sees the other's record


class WorkdirLock:
    """Holds a workdir for this process, from entering the context to leaving it.

    The file `lock` in it records the holder's host and pid, and a count that the holder raises as
    long as it lives. On the holder's own host the operating system tells whether it has ended, so
    a killed run can go on at once. Elsewhere, and in buckets (`gs://`), it has ended once the count
    stands still.
    """

    def __init__(self, workdir: epath.Path):
        """Names the workdir; nothing is locked yet."""
        self._workdir = workdir
        self._path = workdir / _FILE
        self._file: IO[str] | None = None
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
        self._count = 0

    def __enter__(self) -> "WorkdirLock":
        """Takes the lock.

        Raises:
          UserError: Another process holds it, whose host and pid the message tells; it cannot be
            read or written; or it is a hard link, so that writing it would change another file.
        """
        try:
            if "://" not in str(self._workdir):
                self._file = open(self._path, "a")
                if os.fstat(self._file.fileno()).st_nlink > 1:
                    raise UserError(f"{self._path} is another file too, by a hard link; remove it")
            os_lock = self._take_os_lock()
            holder = _read(self._path)
            if holder and not self._has_ended(holder, os_lock):
                raise self._refusal(holder)
            self._write()
            if not os_lock:
                time.sleep(_SETTLE_SECONDS)
                holder = _read(self._path)
                if holder and not self._is_mine(holder):
                    raise self._refusal(holder)
        except OSError as error:
            self._close()
            raise UserError(f"cannot lock {self._workdir}: {error}") from error
        except BaseException:
            self._close()
            raise
        self._beating.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._released.set()
        self._beating.join()
        with contextlib.suppress(OSError):
            self._path.write_text("")
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _take_os_lock(self) -> bool:
        """Whether the operating system now keeps other processes of this host out."""
        if self._file is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._refusal(_read(self._path)) from error
        except OSError:  # a file system without locks
            return False
        return True

    def _has_ended(self, holder: dict[str, Any], os_lock: bool) -> bool:
        if holder["host"] == self._mine["host"]:
            return os_lock or not _is_running(holder["pid"])
        _logger.info(
            f"{self._workdir} was last written to by {_name(holder)}; waiting for up to "
            f"{_SILENT_SECONDS:g} s to see whether it still is"
        )
        deadline = time.monotonic() + _SILENT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(1)
            now = _read(self._path)
            if now != holder:
                return now is None
        return True

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk, a bucket out of reach for a while
                holder = _read(self._path)
                if holder and not self._is_mine(holder):
                    told = (
                        f"error: {self._workdir} was taken over by {_name(holder)} while this "
                        "process stood still"
                    )
                    sys.stderr.write(f"\n{printable(told)}\n")
                    sys.stderr.flush()
                    os._exit(UserError.exit_code)
                self._write()

    def _write(self) -> None:
        self._count += 1
        record = json.dumps(self._mine | {"count": self._count})
        if self._file is None:
            self._path.write_text(record + "\n")
            return
        # In one step over the one before: whoever finds no record takes the lock as released.
        record = f"{record:{_WIDTH}}\n"
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(file, record.encode(), 0)
            os.ftruncate(file, len(record))
        finally:
            os.close(file)

    def _is_mine(self, holder: dict[str, Any]) -> bool:
        return self._mine.items() <= holder.items()

    def _refusal(self, holder: dict[str, Any] | None) -> UserError:
        return UserError(
            f"{self._workdir} is being written to by {_name(holder)}; wait for it or stop it, or "
            "give another --workdir"
        )


def _read(path: epath.Path) -> dict[str, Any] | None:
    """What the holder has written, or None if there is none or it makes no sense.

    Raises:
      OSError: it cannot be read.
    """
    try:
        record = parse_json(read_text(path)[:_MAX_CHARACTERS])
        return record if {"host", "pid", "started"} <= record.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _name(holder: dict[str, Any] | None) -> str:
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
