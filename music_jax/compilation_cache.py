"""What was compiled is kept in the workdir, so that a run that goes on need not compile again."""

import os
import re
import warnings
from typing import Any

import jax
from etils import epath

from music_jax import progress

# Reading a program back takes some tens of milliseconds: less is not worth a file.
_MIN_COMPILE_SECONDS = 0.1

_FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']*)'")


def use_compilation_cache(workdir: str) -> None:
    """Keeps what this process compiles in `workdir`/compilation_cache, and reads it from there.

    To be called before anything is compiled. It leaves alone what the user has chosen by
    JAX_COMPILATION_CACHE_DIR. A program is found by its text, the
    compiler's version and the devices, so that another one is never taken for it. What cannot be
    read is compiled anew and kept in the damaged file's place; what cannot be written is not kept;
    the run goes on in either case, and one line says so.

    The programs are machine code, which the process runs: the workdir is to be writable by those
    alone who may run code as its owner.

    Args:
      workdir: of the run; may be a `gs://` one.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    directory = epath.Path(workdir).expanduser() / "compilation_cache"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    _watch(directory)


def _watch(directory: epath.Path) -> None:
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
            progress.say(f"{action} {directory} failed: {consequence}. {_reason(message)}")

    warnings.showwarning = show


def _reason(message: Any) -> str:
    return " ".join(str(message).split())[:200]
