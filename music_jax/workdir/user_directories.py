"""Directories of this user, outside any run."""

import os
import pathlib
import stat


def cache_directory(name: str) -> pathlib.Path:
    """Makes `music_jax/NAME` below `$XDG_CACHE_HOME`, by default `~/.cache`; see `_checked`."""
    return _checked("XDG_CACHE_HOME", "~/.cache", name, create=True)


def state_directory(*, create: bool) -> pathlib.Path:
    """Finds `music_jax` below `$XDG_STATE_HOME`, by default `~/.local/state`; see `_checked`."""
    return _checked("XDG_STATE_HOME", "~/.local/state", "", create=create)


def _checked(variable: str, default: str, name: str, *, create: bool) -> pathlib.Path:
    """Finds a directory that only this user can write to.

    Raises:
      OSError: It cannot be made or, without `create`, is not there; or others can write to it.
    """
    base = pathlib.Path(os.environ.get(variable) or os.path.expanduser(default))
    if not base.is_absolute():
        raise OSError(f"{base} is not an absolute path; set HOME or {variable}")
    own = base / "music_jax"
    if create:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        (own / name).mkdir(mode=0o700, exist_ok=True)
    for directory in (own, own / name):
        status = directory.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(f"others can write to {directory}; chmod go-w {directory}")
    return own / name
