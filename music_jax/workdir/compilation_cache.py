"""The cache of compiled programs, in the user's own directory."""

import contextlib
import logging
import os
import pathlib
import re
import warnings
from typing import Any

import jax

from music_jax.workdir.directory import user_directory

_logger = logging.getLogger(__name__)

# Loading a program takes some tens of milliseconds: faster compilations are not worth a file.
_MIN_COMPILE_SECONDS = 0.1
# JAX's own limit, `jax_compilation_cache_max_size`, needs one more package, `filelock`.
_MAX_CACHE_BYTES = 4 << 30

_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']*)'")


def use_compilation_cache() -> None:
    """Caches compiled programs in `~/.cache/music_jax/compiled` for later processes.

    Call it before anything is compiled. JAX_COMPILATION_CACHE_DIR names another directory. A
    program is found by its text, the compiler's version and the devices. A damaged file is replaced
    with a warning; a file that cannot be written causes a warning. Beyond 4 GiB, the programs that
    were not used for the longest time are removed.

    The process runs these programs, so they are never read from a run's directory or from one that
    others can write to. Several processes of a run compile some programs together, so that all of
    them must find a program or none: they use a cache only if JAX_COMPILATION_CACHE_DIR names a
    directory that they share.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.distributed.is_initialized():
        return
    try:
        directory = user_directory("cache", "compiled")
    except OSError as error:
        _logger.warning(f"compiled programs are not cached: {error}")
        return
    with contextlib.suppress(OSError):  # another process may remove files at the same time
        _remove_oldest(directory)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    _condense_warnings(directory)


def _remove_oldest(directory: pathlib.Path) -> None:
    files = [(path.stat(), path) for path in directory.iterdir() if path.is_file()]
    excess = sum(status.st_size for status, _ in files) - _MAX_CACHE_BYTES
    for status, path in sorted(files, key=lambda file: max(file[0].st_atime, file[0].st_mtime)):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= status.st_size


def _condense_warnings(directory: pathlib.Path) -> None:
    """Replaces JAX's warning for each unusable file by one for all, and removes damaged files."""
    original, warned = warnings.showwarning, set()

    def show(message: Any, *context: Any, **options: Any) -> None:
        failed = _FAILED.match(str(message))
        if failed is None:
            original(message, *context, **options)
            return
        action, program = failed.groups()
        consequence = "compiled programs are not cached"
        if action == "reading":
            consequence = "compiling again"
            for damaged in directory.glob(f"{program}-*"):  # which JAX does not overwrite
                damaged.unlink(missing_ok=True)
        if action not in warned:
            warned.add(action)
            reason = " ".join(str(message).split())[:200]
            _logger.warning(f"{action} {directory} failed: {consequence}. {reason}")

    warnings.showwarning = show
