"""Directories: workdirs and the user's own."""

import contextlib
import os
import pathlib
import re
import stat
import time

from etils import epath

from music_jax.distributed.progress import escape_surrogates
from music_jax.errors import UserError
from music_jax.workdir.files import PREFIX, check_writable, in_bucket

_MAX_PATH_BYTES = 3500  # Linux takes paths of 4096; the longest name in a workdir has 500
_GLOB_CHARACTERS = "*?[]"
_TEMPORARY = re.compile(re.escape(PREFIX) + "[0-9a-f]{16}")
_TEMPORARY_SECONDS = 86_400.0  # age of a temporary file that a killed process has left


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
