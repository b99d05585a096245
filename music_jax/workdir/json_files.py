"""Reading JSON that anyone may have written: it is data, or a `ValueError`."""

import codecs
import json
import os
import pathlib
import re
import stat
from typing import Any

from etils import epath

from music_jax.workdir.epath_corrections import bucket_errors

_MAX_DEPTH = 32
_CHUNK = 1 << 18  # bytes
_MAX_BYTES = 1 << 26  # of a file; what this package writes is far smaller
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
      ValueError: it is not JSON, nested deeper than anything that this package writes, has a whole
        number of more than 64 bits, or a surrogate that stands for no byte of a file's name.
    """
    if text.count("[") + text.count("{") > _MAX_DEPTH and _depth(text) > _MAX_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
    value = json.loads(text, parse_int=_integer)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    return value


def _integer(digits: str) -> int:
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError("it has a whole number of more than 64 bits")
    return value


def read_json(path: epath.Path, *, max_bytes: int = _MAX_BYTES) -> Any:
    """What a JSON file of at most `max_bytes` says.

    Raises:
      OSError: it cannot be read, or is no file but a pipe or a device.
      ValueError: as `parse_json`.
    """
    return parse_json(decode_text(read_bytes(path, max_bytes=max_bytes)))


def read_text(path: epath.Path, *, errors: str = "replace") -> str:
    """The text of a file; what cannot be decoded is replaced, or with `strict` a `ValueError`.

    Raises:
      OSError: as `read_bytes`.
    """
    return decode_text(read_bytes(path, max_bytes=_MAX_BYTES), errors)


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Decodes UTF-8, or what editors on Windows write: a byte order mark, then that or UTF-16."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig", errors)


def read_bytes(path: pathlib.Path | epath.Path, *, max_bytes: int) -> bytes:
    """Reads a file that is expected to be small.

    Args:
      path: File on a disk or in a bucket.
      max_bytes: Largest size that is read, so that a file cannot fill the memory.

    Raises:
      OSError: The file cannot be read, is larger, or is a pipe or a device, which could block
        forever.
    """
    check_is_file(path)
    chunks, size = [], 0
    with bucket_errors(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                raise OSError(
                    f"{path} is larger than the {max_bytes / 2**20:.0f} MiB that it may have"
                )
    return b"".join(chunks)


def check_is_file(path: pathlib.Path | epath.Path) -> None:
    """Checks that a path is a file, or a link to one.

    Raises:
      OSError: It is not there, or is a directory, a pipe or a device.
    """
    if "://" not in str(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file")


def _depth(text: str) -> int:
    """How deep brackets are nested, at least, up to where the text is JSON."""
    depth = deepest = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        if found[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif found[0] in "]}":
            depth -= 1
    return deepest
