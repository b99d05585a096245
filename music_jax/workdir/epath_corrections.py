"""Corrects `etils.epath`, the paths of files on disks and in buckets, once it is imported.

Three things, wherever Orbax, TFDS and this package use such a path:

- A directory's name is taken literally when its files are listed by a pattern; `[1]` in it was
  taken for a set of characters.
- A file's owner and group need no name on this machine.
- Whatever the client of a bucket raises becomes an OSError, as for a file on a disk.

Outside the methods of a path, such as while an open file is read, `bucket_errors` does the last.
"""

import contextlib
import fnmatch
import functools
import os
import stat
from collections.abc import Generator, Iterator
from typing import Any

from etils import epath
from etils.epath import gpath
from etils.epath.stat_utils import StatResult

from music_jax.errors import UserError

_MAX_WORKDIR_BYTES = 3500  # Linux takes paths of 4096; the longest name in a workdir has 500
_GLOB_CHARACTERS = "*?[]"
_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


class BucketError(OSError):
    """A bucket could not be read or written."""


@contextlib.contextmanager
def bucket_errors(path: Any) -> Iterator[None]:
    """Raises a BucketError for whatever says that a bucket cannot be used now.

    gcsfs, aiohttp, google-auth, botocore and TensorFlow each have errors of their own; some are
    OSErrors. What is missing, or there already, is no failure of the bucket.
    """
    try:
        yield
    except (*_ANSWERS, BucketError, ImportError):  # ImportError: the client is not installed
        raise
    except Exception as error:
        if "://" not in str(path):
            raise
        reason = " ".join(f"{path}: {type(error).__name__}: {error}".split())[:400]
        missing = type(error).__name__ == "NotFoundError"  # TensorFlow's
        raise (FileNotFoundError if missing else BucketError)(reason) from error


def check_checkpoint_path(path: epath.Path) -> None:
    """Checks that Orbax can keep a checkpoint below a directory.

    Raises:
      UserError: it cannot; the message names what is wrong with the directory's path.
    """
    text = str(path)
    wrong = None
    if "\\" in text:
        wrong = r"it holds a backslash (\), which TensorStore takes for a slash"
    elif "\0" in text:
        wrong = "it holds a zero byte"
    elif "://" in text:
        found = [c for c in _GLOB_CHARACTERS if c in text]
        if found:
            wrong = f"it holds {' and '.join(found)}, which clients of buckets take for a pattern"
    elif len(os.fsencode(text)) > _MAX_WORKDIR_BYTES:
        wrong = f"it is longer than {_MAX_WORKDIR_BYTES} bytes"
    try:
        text.encode()
    except UnicodeEncodeError:
        wrong = "it is not UTF-8, which TensorStore requires"
    if wrong:
        raise UserError(f"checkpoints cannot be kept in {text!r}: {wrong}; rename the directory")


def _glob(self: epath.Path, pattern: str) -> Iterator[epath.Path]:
    if "**" in pattern:
        raise NotImplementedError(f"no recursive patterns; got {pattern!r}")
    found = [self]
    for part in pattern.split("/"):
        found = [inner for directory in found for inner in _matching(directory, part)]
    yield from sorted(found)


def _matching(directory: epath.Path, part: str) -> list[epath.Path]:
    if not any(character in part for character in _GLOB_CHARACTERS):
        return [directory / part] if (directory / part).exists() else []
    if not directory.is_dir():
        return []
    hidden = part.startswith(".")
    return [
        path
        for path in directory.iterdir()
        if fnmatch.fnmatchcase(path.name, part) and path.name.startswith(".") <= hidden
    ]


def _stat(self: epath.Path) -> StatResult:
    if "://" in str(self):
        return _uncorrected_stat(self)
    about = os.stat(self)
    return StatResult(
        is_directory=stat.S_ISDIR(about.st_mode),
        length=about.st_size,
        mtime=int(about.st_mtime),
        mode=about.st_mode,
    )


def _with_bucket_errors(method: Any) -> Any:
    @functools.wraps(method)
    def corrected(self: epath.Path, *args: Any, **options: Any) -> Any:
        with bucket_errors(self):
            result = method(self, *args, **options)
            # A generator raises as it goes.
            return iter(list(result)) if isinstance(result, Generator) else result

    return corrected


_uncorrected_stat = gpath.PosixGPath.stat
_METHODS = (
    *("exists", "is_dir", "is_file", "iterdir", "glob", "stat", "open"),
    *("read_bytes", "read_text", "write_bytes", "write_text", "touch"),
    *("mkdir", "rmdir", "rmtree", "unlink", "rename", "replace", "copy"),
)
for _name, _method in (("glob", _glob), ("stat", _stat)):
    setattr(gpath.PosixGPath, _name, _method)
for _name in _METHODS:
    setattr(gpath.PosixGPath, _name, _with_bucket_errors(getattr(gpath.PosixGPath, _name)))
