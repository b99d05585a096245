"""Runs the notebooks from start to end and saves them with their outputs.

.venv/bin/python launch/colab/execute.py              # all
.venv/bin/python launch/colab/execute.py first_steps  # some
"""

import os
import pathlib
import re
import sys
import tempfile
import time

import nbformat
from nbclient import NotebookClient

COLAB = pathlib.Path(__file__).resolve().parent
ROOT = COLAB.parents[1]


_LOGGED = (
    "Logging before InitGoogle",
    "Source Location Trace",
    "slow_operation_alarm",
    "os.fork() was called",  # by a cell that runs a command
)


_BAR = re.compile(r"^.*: +\d+%\|.*\n?", re.MULTILINE)
_WIDGET = "application/vnd.jupyter.widget-view+json"


def _drop_logs(notebook: nbformat.NotebookNode) -> None:
    """Removes progress bars, and what libtpu, XLA and JAX log about the machine."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            if output.get("name") == "stdout":
                output.text = _BAR.sub("", output.text)
        cell.outputs = [
            output
            for output in cell.outputs
            if output.get("text") != ""
            and _WIDGET not in output.get("data", {})
            and not (output.get("name") == "stderr" and any(log in output.text for log in _LOGGED))
        ]


def execute(path: pathlib.Path, *, timeout: float = 1800) -> nbformat.NotebookNode:
    """Runs a notebook in an empty directory of runs and returns it with its outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: If a cell raises an exception.
    """
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    with tempfile.TemporaryDirectory() as runs:
        os.environ["RUNS"] = runs
        NotebookClient(
            notebook,
            timeout=timeout,
            startup_timeout=300,  # on a busy machine
            kernel_name="python3",
            coalesce_streams=True,  # keeps one line of a progress bar
            store_widget_state=False,
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
        _drop_logs(notebook)
        text = nbformat.writes(notebook)
        for place, name in ((runs, "runs/colab"), (f"{ROOT}/", "")):
            text = text.replace(place, name)
    return nbformat.reads(text, nbformat.NO_CONVERT)


def main(names: list[str]) -> None:
    """Runs the given notebooks, or all."""
    for path in sorted(COLAB.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        start = time.monotonic()
        nbformat.write(execute(path), path)
        print(f"{path.stem}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
