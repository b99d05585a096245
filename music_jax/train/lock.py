"""One writer a workdir."""

import datetime
import fcntl
import json
import os
import socket
from types import TracebackType
from typing import IO

from etils import epath

from music_jax.errors import UserError
from music_jax.json_files import parse_json

_FILE = "lock"
_MAX_CHARACTERS = 4096  # what is written is far shorter


class WorkdirLock:
    """Holds a workdir for this process, from entering the context to leaving it.

    The operating system frees the lock when the process ends, however it ends, so a lock that was
    left behind is never in the way. Buckets (`gs://`) have no such lock: there nothing is held.
    """

    def __init__(self, workdir: epath.Path):
        """Names the workdir; nothing is locked yet."""
        self._workdir = workdir
        self._file: IO[str] | None = None

    def __enter__(self) -> "WorkdirLock":
        """Takes the lock.

        Raises:
          UserError: another process holds it; the message tells its host and pid.
        """
        if "://" in str(self._workdir):
            return self
        self._file = open(self._workdir / _FILE, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(self._file)
            self._file.close()
            raise UserError(
                f"{self._workdir} is being written to by {holder}; wait for it or stop it, or give "
                "another --workdir"
            ) from error
        self._file.truncate(0)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _holder(file: IO[str]) -> str:
    """Who holds the lock, by what it wrote into the file."""
    file.seek(0)
    try:
        record = parse_json(file.read(_MAX_CHARACTERS))
        return f"process {record['pid']} on {record['host']}, since {record['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
