"""Reads and writes files on disks and in buckets.

A path is an `etils.epath.Path`, whether on a disk or in a bucket (`gs://`). Importing this module
corrects three properties of these paths, also for Orbax and TFDS:

- The characters `*?[]` in a directory's name are taken literally when its files are listed by a
  pattern.
- The owner and the group of a file need no name on this machine.
- Whatever the client of a bucket raises becomes an OSError, as for a file on a disk.
"""

import codecs
import contextlib
import functools
import glob
import io
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Generator, Iterator
from typing import IO, Any, TypeVar

import numpy as np
from etils import epath
from etils.epath import gpath
from etils.epath.stat_utils import StatResult

from music_jax.errors import UserError, one_line

# Prefix of the names of files that are being written; a killed process leaves such a file behind.
PREFIX = ".new-"

_MAX_BYTES = 1 << 26  # default limit of a file; those of this package are far smaller
_CHUNK_BYTES = 1 << 18
_MAX_JSON_DEPTH = 32
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_ARRAYS = 64
_ZIP_ENTRY = b"PK\x01\x02"  # begins each entry of a zip file's directory

_Path = TypeVar("_Path", pathlib.Path, epath.Path)


class BucketError(OSError):
    """A bucket could not be read or written."""


def in_bucket(path: Any) -> bool:
    """Returns whether a path is in a bucket, not on a disk."""
    return "://" in str(path)


@contextlib.contextmanager
def bucket_errors(path: Any) -> Iterator[None]:
    """Raises a BucketError in place of any exception that a bucket's client raises.

    The methods of a path do so by themselves; use this while a file is open. gcsfs, aiohttp,
    google-auth, botocore and TensorFlow have exceptions of their own, only some of them OSErrors.
    Files that are missing or exist already keep their usual exceptions.
    """
    try:
        yield
    except (BucketError, ImportError):  # ImportError: the client is not installed
        raise
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
        raise
    except Exception as error:
        if not in_bucket(path):
            raise
        reason = f"{path}: {one_line(error, 300, named=True)}"
        missing = type(error).__name__ == "NotFoundError"  # TensorFlow's
        raise (FileNotFoundError if missing else BucketError)(reason) from error


def _glob(self: epath.Path, pattern: str) -> Iterator[epath.Path]:
    found = self._backend.glob(os.path.join(glob.escape(os.fspath(self)), pattern))
    return iter(sorted(type(self)(path) for path in found))


def _stat(self: epath.Path) -> StatResult:
    if in_bucket(self):
        return _original_stat(self)
    status = os.stat(self)
    return StatResult(
        is_directory=stat.S_ISDIR(status.st_mode),
        length=status.st_size,
        mtime=int(status.st_mtime),
        mode=status.st_mode,
    )


def _with_bucket_errors(method: Any) -> Any:
    @functools.wraps(method)
    def corrected(self: epath.Path, *args: Any, **options: Any) -> Any:
        with bucket_errors(self):
            result = method(self, *args, **options)
            # A generator raises only when it is iterated over.
            return iter(list(result)) if isinstance(result, Generator) else result

    return corrected


_original_stat = gpath.PosixGPath.stat
gpath.PosixGPath.glob, gpath.PosixGPath.stat = _glob, _stat
for _name in (
    *("exists", "is_dir", "is_file", "iterdir", "glob", "stat", "open"),
    *("read_bytes", "read_text", "write_bytes", "write_text", "touch"),
    *("mkdir", "rmdir", "rmtree", "unlink", "rename", "replace", "copy"),
):
    setattr(gpath.PosixGPath, _name, _with_bucket_errors(getattr(gpath.PosixGPath, _name)))


def check_is_file(path: pathlib.Path | epath.Path) -> None:
    """Checks that a path is a file, or a link to one.

    Raises:
      OSError: It does not exist, or is a directory, a pipe or a device.
    """
    if not in_bucket(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file")


def read_bytes(path: pathlib.Path | epath.Path, *, max_bytes: int = _MAX_BYTES) -> bytes:
    """Reads a file of at most `max_bytes`, so that it cannot fill the memory.

    Raises:
      OSError: The file cannot be read, is larger, or is a pipe or a device, which could block
        forever.
    """
    check_is_file(path)
    content = bytearray()
    with bucket_errors(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            content += chunk
            if len(content) > max_bytes:
                raise OSError(f"{path} is larger than the {max_bytes >> 20} MiB that it may have")
    return bytes(content)


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Decodes UTF-8, with or without a byte order mark, or UTF-16 with one."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig", errors)


def read_text(path: epath.Path) -> str:
    """Reads a text file; bytes that cannot be decoded are replaced. Raises as `read_bytes`."""
    return decode_text(read_bytes(path), "replace")


def parse_json(text: str) -> Any:
    """Parses JSON that anyone may have written.

    Raises:
      ValueError: The text is not JSON, is nested too deeply, or has an integer of more than 64 bits
        or a surrogate that does not stand for a byte of a file's name.
    """
    try:
        value = json.loads(text, parse_int=_parse_int)
        # Counting brackets is much faster than walking through a long list of names.
        if text.count("[") + text.count("{") > _MAX_JSON_DEPTH and _depth(value) > _MAX_JSON_DEPTH:
            raise RecursionError
    except RecursionError as error:
        raise ValueError(f"it is nested more than {_MAX_JSON_DEPTH} levels deep") from error
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    return value


def _parse_int(digits: str) -> int:
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError("it has a whole number of more than 64 bits")
    return value


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0


def read_json(path: epath.Path, *, max_bytes: int = _MAX_BYTES) -> Any:
    """Reads a JSON file that anyone may have written; raises as `read_bytes` and `parse_json`."""
    return parse_json(decode_text(read_bytes(path, max_bytes=max_bytes)))


def read_record(path: epath.Path, *, max_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """Reads a JSON object that anyone may have written; {} if it is missing or damaged."""
    try:
        record = read_json(path, max_bytes=max_bytes)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_npz(
    path: pathlib.Path | epath.Path, *, max_array_bytes: int | None = None, more_bytes: int = 0
) -> dict[str, np.ndarray]:
    """Reads all arrays of numbers of an .npz file by name.

    The file may come from anyone: its arrays take no more memory than `max_array_bytes`, or by
    default than the file itself, which a compressed file exceeds.

    Args:
      path: File.
      max_array_bytes: Largest size of all arrays together.
      more_bytes: Bytes that the file may have beyond the limit of `read_bytes`.

    Raises:
      OSError: See `read_bytes`.
      ValueError: The file is damaged or not an .npz file.
    """
    content = read_bytes(path, max_bytes=_MAX_BYTES + more_bytes)
    arrays: dict[str, np.ndarray] = {}
    try:
        if content.count(_ZIP_ENTRY) > _MAX_ARRAYS:
            raise ValueError(f"it has more than {_MAX_ARRAYS} arrays")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            left = len(content) if max_array_bytes is None else max_array_bytes
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    array = read_npy(file, max_bytes=left)
                arrays[entry.filename.removesuffix(".npy")] = array
                left -= array.nbytes
        return arrays
    except Exception as error:  # zipfile raises many kinds
        raise ValueError(f"it is not a valid .npz file: {one_line(error)}") from error


def read_npy(file: IO[bytes], *, max_bytes: int) -> np.ndarray:
    """Reads an array of numbers from an .npy file.

    Args:
      file: File, open for binary reading, at its start.
      max_bytes: Largest size of the array; a larger one is refused before it takes memory.

    Raises:
      OSError: The file cannot be read.
      ValueError: The file is damaged, not an .npy file, larger, or does not hold numbers.
    """
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its header is not of version 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind not in "biuf" or not dtype.isnative or min(shape, default=0) < 0:
            raise ValueError("it is not an array of numbers")
        if (size := math.prod(shape) * dtype.itemsize) > max_bytes:
            raise ValueError(f"its {size:,} bytes are more than the {max_bytes:,} expected")
        file.seek(0)
        return np.lib.format.read_array(file)
    except OSError:
        raise
    except Exception as error:  # Python literals: SyntaxError, MemoryError and others
        raise ValueError(f"it is not a valid .npy file: {one_line(error)}") from error


@contextlib.contextmanager
def new_file(path: pathlib.Path | epath.Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that replaces `path` when the block ends.

    A reader finds either the old file or the complete new one, however many processes write at
    once. If `path` is a link, the link is replaced and its target stays as it is. If the block
    raises, `path` stays as it is. Its directory must exist.
    """
    with new_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextlib.contextmanager
def new_path(path: _Path, tag: str = "") -> Iterator[_Path]:
    """Provides the path of a file that replaces `path` when the block ends; see `new_file`.

    Args:
      path: Path of the file.
      tag: Beginning of the temporary name after `PREFIX`, by which its writer can find it again.

    Yields:
      Path of an empty file with an unpredictable name in the same directory; for a bucket, path of
      a file on this machine, which is uploaded when the block ends.
    """
    if in_bucket(path):  # an object appears only once it is complete, and renaming copies it
        with tempfile.TemporaryDirectory() as directory:
            local = type(path)(directory) / path.name
            yield local
            with bucket_errors(path), local.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory; remove or rename it")
    temporary = path.with_name(PREFIX + tag + secrets.token_hex(8))
    try:
        pathlib.Path(temporary).touch(exist_ok=False)
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_new(path: pathlib.Path | epath.Path, content: bytes) -> None:
    """Writes a complete file; see `new_file`."""
    with new_file(path) as file:
        file.write(content)


def write_json(path: epath.Path, record: dict[str, Any]) -> None:
    """Writes a JSON file; see `new_file`.

    Raises:
      ValueError: A number in the record is not finite, which JSON cannot express.
    """
    write_new(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def check_writable(directory: pathlib.Path | epath.Path) -> None:
    """Writes a file into a directory and removes it; raises OSError if that fails."""
    temporary = directory / (PREFIX + secrets.token_hex(8))
    temporary.write_bytes(b"")
    temporary.unlink()
