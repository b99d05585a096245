"""Packages that only some of the exchange needs."""

import contextlib
from collections.abc import Iterator

from music_jax.errors import UserError


@contextlib.contextmanager
def needs(package: str, extra: str) -> Iterator[None]:
    """Around an import: says which extra of music_jax brings a package that is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise UserError(
            f"this needs {package}, which is not installed: pip install 'music_jax[{extra}]'"
        ) from error
