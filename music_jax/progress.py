"""What a person sees: lines of text, tables, and a progress bar with the time left."""

import sys
from collections.abc import Sequence
from typing import Any

import tqdm

from music_jax.mesh import is_main_process


def say(text: str) -> None:
    """Prints on the main process, above any progress bar."""
    if is_main_process():
        encoding = sys.stdout.encoding or "utf-8"  # names of files may have bytes that it has not
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        tqdm.tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def bar(total: int, *, unit: str, description: str, done: int = 0) -> Any:
    """A progress bar that shows rate and time left; in a log file it adds a line now and then.

    Args:
      total: how many there are to do.
      unit: of what.
      description: what is being done.
      done: how many were done before.

    Returns:
      A `tqdm` bar.
    """
    interactive = sys.stderr.isatty()
    return tqdm.tqdm(
        total=total,
        initial=done,
        unit=unit,
        unit_scale=True,
        desc=description,
        file=sys.stderr,
        dynamic_ncols=interactive,
        bar_format="{l_bar}{bar:12}{r_bar}",
        mininterval=0.2 if interactive else 10.0,
        disable=not is_main_process(),
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a table, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
