"""Errors that end a command with one line, each with the exit code for scripts and schedulers."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence


class MusicError(Exception):
    """Base class of the errors that end a command with one clear line and no traceback."""

    exit_code = 1


class UserError(MusicError):
    """Wrong input; the message says what is wrong, what was expected and what to do."""

    exit_code = 2


class MissingSplitError(UserError):
    """A split that a dataset does not have."""


class NotMeasurableError(UserError):
    """Images that do not allow one measure, such as those without labels, but may allow others."""


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
    """An image that cannot be read; the message begins with "it" or "its"."""


class UnexpectedPixelsError(UndecodableError):
    """An image with another number of channels, or another type of values, than the config says."""


class NonFiniteError(UserError):
    """Features of a network that are not finite, since it has diverged."""

    exit_code = 3


class StoppedError(MusicError):
    """A signal stopped the run after everything was saved; the same command resumes it."""

    exit_code = 75


def one_line(error: object, limit: int | None = None, *, named: bool = False) -> str:
    """Returns the message of an error in one line of at most `limit` characters.

    The name of the error's type comes before it if `named`, and alone if there is no message.
    """
    kind, message = type(error).__name__, " ".join(str(error).split())
    return (f"{kind}: {message}" if named and message else message or kind)[:limit]


def first_of(texts: Sequence[str], limit: int = 3, *, separator: str = ", ") -> str:
    """Returns the first texts, joined, and how many more there are."""
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return separator.join(texts[:limit]) + more


@contextlib.contextmanager
def raising(kind: type[MusicError], what: str) -> Iterator[None]:
    """Turns whatever the block raises, such as a library on damaged files, into one error.

    Args:
      kind: Type of the error; errors of this type pass unchanged.
      what: What failed; the message gives it before the reason.

    Raises:
      MusicError: The block raises; of the type `kind`.
    """
    try:
        yield
    except kind:
        raise
    except Exception as error:
        raise kind(f"{what}: {one_line(error, 300)}") from error


@contextlib.contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Turns a failed import in the block into an error that names the extra to install.

    Args:
      extra: Extra of music_jax in setup.cfg, such as `export`.

    Raises:
      UserError: A package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"this needs {error.name}, which is not installed: {install_command(extra)}"
        ) from error


def install_command(extra: str) -> str:
    """Returns the command that installs an extra of this package, into a clone or beside it."""
    root = pathlib.Path(__file__).parent.parent
    if (root / "pyproject.toml").is_file():  # pip would look for its name in the index
        return f"pip install -e '{root}[{extra}]'"
    return f"pip install 'music_jax[{extra}]'"
