"""Output on a terminal, in a notebook or into a log: lines, tables and progress bars."""

import importlib.util
import logging
import os
import sys
import time
import unicodedata
from collections.abc import Sequence
from typing import Any, TextIO

import tqdm
from tqdm.utils import disp_len

# Times between two lines of a bar in a log.
_SECONDS_BETWEEN_LINES = 10.0
_SHARE_BETWEEN_LINES = 0.05  # of the time since the bar began


def escape_surrogates(text: str) -> str:
    r"""Escapes characters that UTF-8 cannot encode, such as in the name of a file.

    Bytes of a name that are not UTF-8, which Python reads as surrogates, become `\xe9`.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that do not stand for bytes
        return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    r"""Escapes characters that a terminal would interpret, so that the text stays on one line.

    Control characters, format characters and line ends become, for example, `\x1b` and `\n`; for
    surrogates see `escape_surrogates`.
    """
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1]
        for c in escape_surrogates(text)
    )


def is_main_process() -> bool:
    """Returns whether this is the process that prints and writes."""
    import jax  # takes a second, which `--help` should not

    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints one line on the main process, above any progress bar."""
    if is_main_process():
        text = printable(text)
        encoding = sys.stdout.encoding or "utf-8"  # which may lack characters of a name
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        tqdm.tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def say_lines(text: str) -> None:
    """Prints a table or other text of several lines, as `say` does."""
    for line in text.split("\n"):
        say(line)


def log_lines(logger: logging.Logger, text: str, *, level: int = logging.INFO) -> None:
    """Logs a table or other text of several lines, one record per line."""
    for line in text.split("\n"):
        logger.log(level, "%s", line)


class _Printer(logging.Handler):
    """Prints messages on the main process, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def log_to_stdout(level: int = logging.INFO) -> None:
    """Prints the package's messages of a level and above on standard output.

    Commands and notebooks call this; importing the package installs no handler.
    """
    logger = logging.getLogger("music_jax")
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers = [_Printer()]


def bar(total: int, *, unit: str, description: str, done: int = 0, delay: float = 0.0) -> Any:
    """Creates a progress bar that shows the rate and the time left.

    In a notebook it is a widget if ipywidgets is installed. Without it, and in a terminal, it is
    text that is redrawn in place. In a log it is a line every ten seconds at first, and less and
    less often in a long run.

    Args:
      total: Number of items.
      unit: Name of an item.
      description: Text before the bar.
      done: Number of items that were done before.
      delay: Seconds before which nothing is shown.

    Returns:
      A `tqdm` bar.
    """
    terminal, notebook = sys.stderr.isatty(), _in_notebook()
    # Some terminals, such as containers', report no columns; tqdm then draws nothing.
    unknown = terminal and not os.get_terminal_size(sys.stderr.fileno()).columns
    file: Any = sys.stdout if notebook else sys.stderr if terminal else _Lines(sys.stderr)
    make: Any = _Bar
    if widget := notebook and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm_notebook

        make = type("_Widget", (_Compiling, tqdm_notebook), {})
    return make(
        total=total,
        initial=done,
        unit=unit,
        unit_scale=total >= 10_000,
        desc=printable(description),
        delay=delay,
        file=file,
        ncols=100 if unknown else None,
        nrows=20 if unknown else None,
        dynamic_ncols=terminal and not unknown,
        bar_format="{l_bar}{bar}{r_bar}" if widget else "{l_bar}{bar:12}{r_bar}",
        mininterval=0.2 if terminal else 1.0,
        disable=not is_main_process(),
    )


class _Compiling(tqdm.tqdm):
    """A bar whose rate and time left exclude the first items, which wait for a compilation."""

    _time: Any  # tqdm's clock

    def update(self, n: float | None = 1) -> Any:
        """Adds items."""
        if not self.disable and self.n == self.initial:
            self.last_print_n, self.last_print_t = self.n + (n or 0), self._time()
        return super().update(n)


class _Bar(_Compiling):
    """A bar as text, in which values that do not fit are left out and not cut."""

    @property
    def format_dict(self) -> Any:
        """The arguments of `format_meter`."""
        shown: dict[str, Any] = dict(super().format_dict)
        if columns := shown["ncols"]:
            unlimited = shown | {"ncols": None}
            while shown["postfix"] and disp_len(self.format_meter(**unlimited)) > columns:
                shown["postfix"] = unlimited["postfix"] = shown["postfix"].rpartition(", ")[0]
        return shown


class _Lines:
    """A file for a bar in a log, which writes complete lines only, and omits some."""

    def __init__(self, log: TextIO):
        self._log = log
        self._start = self._last = time.monotonic()
        self._waiting = self._written = ""

    def write(self, text: str) -> None:
        """Receives the text that tqdm would draw, or the line end with which tqdm ends the bar."""
        self._waiting = text.strip() or self._waiting
        if text == "\n" and self._waiting.partition("[")[0] == self._written.partition("[")[0]:
            return  # the last line has the end already
        now = time.monotonic()
        due = self._last + max(_SECONDS_BETWEEN_LINES, _SHARE_BETWEEN_LINES * (now - self._start))
        if self._waiting and (text == "\n" or now >= due):
            self._log.write(self._waiting + "\n")
            self._log.flush()
            self._written, self._waiting, self._last = self._waiting, "", now

    def flush(self) -> None:
        """Does nothing: lines are flushed as they are written."""


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table whose first column is aligned to the left and the others to the right."""
    header, *rows = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
