"""Directories: workdirs, which are locked for one writer at a time, and the user's own."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import pathlib
import re
import socket
import stat
import sys
import threading
import time
import warnings
from typing import IO, Any

import jax
from etils import epath

from music_jax.distributed.progress import escape_surrogates, printable
from music_jax.errors import UserError
from music_jax.workdir.files import PREFIX, check_writable, in_bucket, parse_json, read_text

_logger = logging.getLogger(__name__)

_MAX_PATH_BYTES = 3500  # Linux takes paths of 4096; the longest name in a workdir has 500
_GLOB_CHARACTERS = "*?[]"
_TEMPORARY = re.compile(re.escape(PREFIX) + "[0-9a-f]{16}")
_TEMPORARY_SECONDS = 86_400.0  # age of a temporary file that a killed process has left

_RECORD_WIDTH = 511  # of what a holder writes
_HEARTBEAT_SECONDS = 10.0
_SILENT_SECONDS = 40.0  # without an update, after which a holder on another host counts as ended
_SETTLE_SECONDS = 2.0  # until one of two processes that lock at once can read the other's record

# Loading a program takes some tens of milliseconds: faster compilations are not worth a file.
_MIN_COMPILE_SECONDS = 0.1
# JAX's own limit, `jax_compilation_cache_max_size`, needs one more package, `filelock`.
_MAX_CACHE_BYTES = 4 << 30

_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']*)'")


def open_workdir(path: str, *, create: bool = True) -> epath.Path:
    """Creates a workdir if needed and checks that it can be written to.

    Also removes temporary files that killed processes left in it.

    Raises:
      UserError: `absolute_path` rejects the path, checkpoints cannot be stored below it, it cannot
        be created or written to, does not exist (without `create`), or holds a pipe, a device or a
        link (other than `checkpoints`) that leads out of it.
    """
    workdir = absolute_path(path)
    check_checkpoint_path(workdir)
    if not create and not workdir.exists():
        raise UserError(f"the workdir {path} does not exist")
    if not in_bucket(path):
        _check_entries(os.fspath(workdir))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        check_writable(workdir)
    except FileExistsError as error:
        raise UserError(f"the workdir {path} is a file; give a directory") from error
    except OSError as error:
        raise UserError(f"cannot write to the workdir {path}: {error}") from error
    return workdir


def find_workdir(path: str) -> epath.Path:
    """Returns the directory of an existing run, to read from it.

    Raises:
      UserError: The directory does not exist or does not hold a run.
    """
    workdir = absolute_path(path)
    if not workdir.exists():
        raise UserError(f"the workdir {path} does not exist")
    if not (workdir / "config.json").exists():
        raise UserError(f"{path} holds no run: it has no config.json")
    return workdir


def absolute_path(path: str) -> epath.Path:
    """Returns the absolute path of a workdir, or the address of one in a bucket as it is.

    Raises:
      UserError: The kind of bucket is unknown, the bucket cannot be reached or its directory cannot
        hold checkpoints, or `epath` takes the directory for a bucket.
    """
    if not in_bucket(path):
        # POSIX lets a path begin with two slashes, and TensorStore does not.
        found = epath.Path("/" + os.path.abspath(os.path.expanduser(path)).lstrip("/"))
        if in_bucket(found):
            raise UserError(f"{path} is taken for the bucket {found}; give it by another name")
        return found
    try:
        found = epath.Path(path)
        check_checkpoint_path(found)  # before a pattern is looked up
        found.exists()
    except KeyError as error:
        raise UserError(
            f"the workdir {path} is in an unknown kind of bucket; give a directory or "
            "gs://BUCKET/NAME"
        ) from error
    except (ImportError, OSError) as error:
        missing = "; buckets need one more package: pip install gcsfs for gs://, s3fs for s3://"
        todo = missing if isinstance(error, ImportError) else ""
        raise UserError(f"cannot reach the workdir {path}: {error}{todo}") from error
    return found


def check_checkpoint_path(path: epath.Path) -> None:
    """Checks that Orbax can store a checkpoint below a directory.

    Raises:
      UserError: It cannot; the message gives the problem of the path.
    """
    text = str(path)
    wrong = None
    if "\\" in text:
        wrong = r"it holds a backslash (\), which TensorStore takes for a slash"
    elif "\0" in text:
        wrong = "it holds a zero byte"
    elif escape_surrogates(text) != text:
        wrong = "it is not UTF-8, which TensorStore requires"
    elif in_bucket(path):
        if found := [c for c in _GLOB_CHARACTERS if c in text]:
            wrong = f"it holds {' and '.join(found)}, which clients of buckets take for a pattern"
    elif len(os.fsencode(text)) > _MAX_PATH_BYTES:
        wrong = f"it is longer than {_MAX_PATH_BYTES} bytes"
    if wrong:
        raise UserError(f"checkpoints cannot be kept in {text!r}: {wrong}; rename the directory")


def check_utf8(path: str) -> None:
    """Checks that a path can be given to a library that is written in C++.

    Raises:
      UserError: The path is not UTF-8.
    """
    if escape_surrogates(path) != path:
        raise UserError(
            f"the name of {escape_surrogates(path)} is not UTF-8, which Orbax and array_record "
            "need; rename it, or give another directory"
        )


def _check_entries(workdir: str) -> None:
    """Checks that nothing written into a workdir ends up elsewhere or blocks.

    Only `checkpoints` may be a link to a directory elsewhere, whose entries are checked as well.
    Removes old temporary files.
    """
    checkpoints = os.path.join(workdir, "checkpoints")
    roots = [workdir]
    if os.path.islink(checkpoints) and os.path.isdir(checkpoints):
        roots.append(os.path.realpath(checkpoints))
    for root in roots:
        top, folders = os.path.realpath(root), [root]
        while folders:
            try:
                entries = list(os.scandir(folders.pop()))
            except OSError:  # it may not be read, is nested too deeply, or was just removed
                continue
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    allowed = entry.path == checkpoints and os.path.isdir(target)
                    inside = os.path.exists(target) and os.path.commonpath([top, target]) == top
                    if not allowed and not inside:
                        raise UserError(
                            f"{entry.path} in the workdir is a link that leads out of it or to no "
                            f"file, {target}; replace it by what it leads to, or give another "
                            "--workdir"
                        )
                elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                    raise UserError(f"{entry.path} in the workdir is a pipe or a device; remove it")
                elif _TEMPORARY.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        if time.time() - entry.stat().st_mtime > _TEMPORARY_SECONDS:
                            os.unlink(entry.path)


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


_MAX_RECORD = 4096  # characters


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


def user_directory(kind: str, name: str = "", *, create: bool = True) -> pathlib.Path:
    """Returns `music_jax/NAME` in one of this user's own directories, outside any run.

    Args:
      kind: `cache` (`$XDG_CACHE_HOME`, by default `~/.cache`) or `state` (`$XDG_STATE_HOME`, by
        default `~/.local/state`).
      name: Name of the directory.
      create: Whether to create it.

    Raises:
      OSError: It cannot be created or (without `create`) does not exist, or others can write to it.
    """
    variable = f"XDG_{kind.upper()}_HOME"
    default = {"cache": "~/.cache", "state": "~/.local/state"}[kind]
    base = pathlib.Path(os.environ.get(variable) or os.path.expanduser(default))
    if not base.is_absolute():
        raise OSError(f"{base} is not an absolute path; set HOME or {variable}")
    own = base / "music_jax"
    if create:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        (own / name).mkdir(mode=0o700, exist_ok=True)
    for directory in (own, own / name):
        status = directory.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(f"others can write to {directory}; chmod go-w {directory}")
    return own / name


def use_compilation_cache() -> None:
    """Caches compiled programs in `~/.cache/music_jax/compiled` for later processes.

    Call it before anything is compiled. JAX_COMPILATION_CACHE_DIR names another directory. A
    program is found by its text, the compiler's version and the devices. A damaged file is replaced
    with a warning; a file that cannot be written causes a warning. Beyond 4 GiB, the programs that
    were not used for the longest time are removed.

    The process runs these programs, so they are never read from a run's directory or from one that
    others can write to. Several processes of a run compile some programs together, so that all of
    them must find a program or none: they use a cache only if JAX_COMPILATION_CACHE_DIR names a
    directory that they share.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.distributed.is_initialized():
        return
    try:
        directory = user_directory("cache", "compiled")
    except OSError as error:
        _logger.warning(f"compiled programs are not cached: {error}")
        return
    with contextlib.suppress(OSError):  # another process may remove files at the same time
        _remove_oldest(directory)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    _condense_warnings(directory)


def _remove_oldest(directory: pathlib.Path) -> None:
    files = [(path.stat(), path) for path in directory.iterdir() if path.is_file()]
    excess = sum(status.st_size for status, _ in files) - _MAX_CACHE_BYTES
    for status, path in sorted(files, key=lambda file: max(file[0].st_atime, file[0].st_mtime)):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= status.st_size


def _condense_warnings(directory: pathlib.Path) -> None:
    """Replaces JAX's warning for each unusable file by one for all, and removes damaged files."""
    original, warned = warnings.showwarning, set()

    def show(message: Any, *context: Any, **options: Any) -> None:
        failed = _FAILED.match(str(message))
        if failed is None:
            original(message, *context, **options)
            return
        action, program = failed.groups()
        consequence = "compiled programs are not cached"
        if action == "reading":
            consequence = "compiling again"
            for damaged in directory.glob(f"{program}-*"):  # which JAX does not overwrite
                damaged.unlink(missing_ok=True)
        if action not in warned:
            warned.add(action)
            reason = " ".join(str(message).split())[:200]
            _logger.warning(f"{action} {directory} failed: {consequence}. {reason}")

    warnings.showwarning = show
