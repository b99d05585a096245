"""What can end a command early, each with the exit code that a scheduler or a script can act on."""

import contextlib
from collections.abc import Iterator


class MusicError(Exception):
    """Base of the errors that end a command with one clear line and no traceback."""

    exit_code = 1


class UserError(MusicError):
    """The user's input is wrong; the message says what was expected, what came and what to do."""

    exit_code = 2


class NotMeasurableError(UserError):
    """The images do not allow a measure: they have no labels, or are too few; others may be."""


class DivergedError(MusicError):
    """A guard tripped (see `train.guards`), or a probe's weights or scores are not finite."""

    exit_code = 3


class CorruptedError(MusicError):
    """Devices do not hold, or do not compute, the same bits."""

    exit_code = 3


class UnusableDataError(MusicError):
    """The data cannot be read, or too little of it can."""

    exit_code = 3


class UndecodableError(UnusableDataError):
    """One image cannot be read; the message begins with "it" or "its"."""


class StoppedError(MusicError):
    """A signal stopped the run and everything is saved: the same command goes on."""

    exit_code = 75


@contextlib.contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Names, where an import in the block fails, the extra that installs the missing package.

    Args:
      extra: Extra of music_jax in setup.cfg, such as `export`.

    Raises:
      UserError: A package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"this needs {error.name}, which is not installed: pip install 'music_jax[{extra}]'"
        ) from error
