"""Patterns that name many files, as shells and WebDataset expand them."""

import glob
import itertools
import os
import re

from music_jax.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")
_MAX_FILES = 10**6


def expand(pattern: str) -> list[str]:
    """Returns the files that a pattern names.

    `{0000..0127}` stands for each number, with the zeros of the first, and `{a,b}` for each text.
    `*`, `?`, `[` and `**` stand for what they match, in sorted order, unless there is a file of
    this name. Commands and addresses, which
    WebDataset also takes, are not supported.

    Raises:
      UserError: The pattern matches nothing, or a file that it names does not exist.
    """
    found: list[str] = []
    for name in _expand_braces(os.path.expanduser(pattern)):
        is_pattern = glob.has_magic(name) and not os.path.isfile(name)
        files = sorted(glob.glob(name, recursive=True)) if is_pattern else [name]
        if not files:
            raise UserError(f"no file matches {name!r}")
        found += [file for file in files if not (is_pattern and os.path.isdir(file))]
    for file in found:
        if "\0" in file or not os.path.isfile(file):
            raise UserError(f"there is no file {file!r}")
    if not found:
        raise UserError(f"no file matches {pattern!r}")
    return found


def _expand_braces(pattern: str) -> list[str]:
    parts: list[list[str]] = []
    end = 0
    for match in _BRACES.finditer(pattern):
        parts += [[pattern[end : match.start()]], _alternatives(match[1])]
        end = match.end()
    parts.append([pattern[end:]])
    size = 1
    for part in parts:
        size *= len(part)
        if size > _MAX_FILES:
            raise UserError(f"{pattern!r} stands for more than {_MAX_FILES:,} files")
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def _alternatives(text: str) -> list[str]:
    if limits := _RANGE.fullmatch(text):
        first, last = limits.groups()
        if int(last) - int(first) >= _MAX_FILES:
            raise UserError(f"{{{text}}} stands for more than {_MAX_FILES:,} files")
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return text.split(",") if "," in text else [f"{{{text}}}"]
