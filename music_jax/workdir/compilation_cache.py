"""Keeps compiled programs in this user's cache, so that a resumed run need not compile again."""

import logging
import os
import pathlib
import re
import warnings
from typing import Any

import jax

from music_jax.workdir.user_directories import cache_directory

_logger = logging.getLogger(__name__)

# Reading a program back takes some tens of milliseconds: less is not worth a file.
_MIN_COMPILE_SECONDS = 0.1

_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']*)'")


def use_compilation_cache() -> None:
    """Keeps what this process compiles in `~/.cache/music_jax/compiled`, and reads it from there.

    Call it before anything is compiled. JAX_COMPILATION_CACHE_DIR names another directory. A
    program is found by its text, the compiler's version and the devices. One that cannot be read is
    compiled again and replaces the damaged file; one that cannot be written is not kept; one line
    says so.

    The programs are machine code, which the process runs: they are never read from a run's
    directory, nor from one that others can write to. A run of several processes keeps none unless
    JAX_COMPILATION_CACHE_DIR names a directory that all of them share: the processes compile some
    programs together, so all must find a program or none.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.distributed.is_initialized():
        return
    try:
        directory = cache_directory("compiled")
    except OSError as error:
        _logger.info(f"not keeping what is compiled: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    _watch(directory)


def _watch(directory: pathlib.Path) -> None:
    """Turns JAX's warning for each file that fails into one line for all, and removes the file."""
    usual, told = warnings.showwarning, set()

    def show(message: Any, *context: Any, **options: Any) -> None:
        failed = _FAILED.match(str(message))
        if failed is None:
            usual(message, *context, **options)
            return
        action, program = failed.groups()
        if action == "reading":  # JAX does not write over a file that is there
            for damaged in directory.glob(f"{program}-*"):
                damaged.unlink(missing_ok=True)
        if action not in told:
            told.add(action)
            consequence = (
                "compiling anew" if action == "reading" else "not keeping what is compiled"
            )
            _logger.info(f"{action} {directory} failed: {consequence}. {_reason(message)}")

    warnings.showwarning = show


def _reason(message: Any) -> str:
    return " ".join(str(message).split())[:200]
