"""Figures of what was compiled before: a plan that is asked for again, or was stopped, goes on."""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

from music_jax.workdir.files import write_new
from music_jax.workdir.user_directories import cache_directory

_logger = logging.getLogger(__name__)

_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt")
# What reads the figures out of a program.
_COUNTING = ("compiling", "counts", "hlo", "chips", "gpus")


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
    name = f"{_key(program, chips)}.json"
    try:
        return kind(**json.loads((cache_directory("plan") / name).read_text()))
    except (OSError, ValueError, TypeError):
        figures = make()
    try:
        write_new(cache_directory("plan") / name, json.dumps(dataclasses.asdict(figures)).encode())
    except OSError as error:
        _logger.info(f"these figures are not kept for later: {error}")
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
