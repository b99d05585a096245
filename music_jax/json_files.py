"""Reading JSON that anyone may have written: it is data, or a `ValueError`."""

import codecs
import json
import os
import re
import stat
from typing import Any

from etils import epath

_MAX_DEPTH = 32
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
      ValueError: it is not JSON, or nested deeper than anything that this package writes.
    """
    if text.count("[") + text.count("{") > _MAX_DEPTH and _depth(text) > _MAX_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
    return json.loads(text)


def read_json(path: epath.Path) -> Any:
    """What a JSON file says.

    Raises:
      OSError: it cannot be read, or is no file but a pipe or a device.
      ValueError: as `parse_json`.
    """
    return parse_json(read_text(path, errors="strict"))


def read_text(path: epath.Path, *, errors: str = "replace") -> str:
    """The text of a file; what cannot be decoded is replaced, or with `strict` a `ValueError`.

    Raises:
      OSError: it cannot be read, or is no file but a pipe or a device, which could be waited for
        for ever.
    """
    if "://" not in str(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file")
    return decode_text(path.read_bytes(), errors)


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Decodes UTF-8, or what editors on Windows write: a byte order mark, then that or UTF-16."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig", errors)


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
