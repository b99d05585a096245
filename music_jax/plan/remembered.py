"""Figures of what was compiled before: a plan that is asked for again, or was stopped, goes on."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt")
# What reads the figures out of a program.
_COUNTING = ("compiling", "counts", "hlo", "chips", "gpus")


def directory() -> pathlib.Path:
    """Where figures are kept: `music_jax/plan` in the user's cache."""
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if cache.startswith("~"):  # a user without a home, for whom nothing can be kept
        cache = os.devnull
    return pathlib.Path(cache) / "music_jax" / "plan"


def remember(program: str, chips: str, make: Callable[[], Any], kind: type) -> Any:
    """What `make` finds out of a program, made once for the same chips, compilers and counting.

    Args:
      program: the program's text before it is compiled.
      chips: all else that it depends on.
      make: compiles and measures.
      kind: the dataclass that it returns.

    Returns:
      What `make` gives, or has given before. What cannot be read is made anew, and what cannot be
      kept is not.
    """
    path = directory() / f"{_key(program, chips)}.json"
    try:
        return kind(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        figures = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(dataclasses.asdict(figures), file)
        os.replace(file.name, path)
    except OSError:
        pass
    return figures


def _key(program: str, chips: str) -> str:
    digest = hashlib.sha256()
    for text in (program, chips, *(f"{name}={_version(name)}" for name in _COMPILERS)):
        digest.update(text.encode() + b"\0")
    for name in _COUNTING:
        digest.update((pathlib.Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
