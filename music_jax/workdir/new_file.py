"""Writes files whole, and never through a link."""

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, TypeVar

from etils import epath

from music_jax.workdir.epath_corrections import bucket_errors

# Begins the names of files that are being written; a process that is killed leaves one behind.
PREFIX = ".new-"

_Path = TypeVar("_Path", pathlib.Path, epath.Path)


@contextlib.contextmanager
def new_file(path: pathlib.Path | epath.Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that takes the place of `path` when the block ends.

    A reader finds either the old file or the whole new one, however many processes write at once.
    A link at `path` is replaced; what it leads to stays as it is. If the block raises, `path` stays
    as it is.

    Args:
      path: File on a disk or in a bucket; its directory exists.

    Yields:
      The file, open for binary writing.
    """
    with new_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextlib.contextmanager
def new_path(path: _Path) -> Iterator[_Path]:
    """Gives the name of a file that takes the place of `path`, for a library that opens it itself.

    See `new_file`.

    Args:
      path: File on a disk or in a bucket; its directory exists.

    Yields:
      Path of a file in the same directory whose name nobody could know before; for a bucket, of one
      on this machine, which is uploaded when the block ends.
    """
    if "://" in str(path):  # an object appears whole once it is uploaded, and renaming copies it
        with tempfile.TemporaryDirectory() as directory:
            local = type(path)(directory) / path.name
            yield local
            with bucket_errors(path), local.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    temporary = path.with_name(PREFIX + secrets.token_hex(8))
    try:
        _create(temporary)
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def check_writable(directory: pathlib.Path | epath.Path) -> None:
    """Makes a file in a directory and removes it; raises OSError if that fails."""
    temporary = directory / (PREFIX + secrets.token_hex(8))
    _create(temporary)
    temporary.unlink()


def _create(path: pathlib.Path | epath.Path) -> None:
    if "://" in str(path):
        path.write_bytes(b"")
    else:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        os.close(os.open(path, flags, 0o666))


def write_new(path: pathlib.Path | epath.Path, content: bytes) -> None:
    """Writes a whole file; see `new_file`."""
    with new_file(path) as file:
        file.write(content)
