"""The workers of a sweep, and handing them its cells."""

import concurrent.futures
import dataclasses
import json
import logging
import subprocess
import sys
import threading

from etils import epath

from music_jax.claims.cells import Cell, Sweep
from music_jax.claims.grid import Setting
from music_jax.claims.run_cell import CellTask
from music_jax.distributed import progress
from music_jax.errors import UnusableDataError
from music_jax.workdir.run_config import as_json

_logger = logging.getLogger(__name__)

_ATTEMPTS = 2  # a cell whose worker dies is tried once more


class _Worker:
    """A process that runs cells, started anew if it dies."""

    def __init__(self, directory: epath.Path, number: int, core: int | None):
        self._directory, self._core = directory, core
        self.log = directory / f"worker-{number}.log"
        self._process: subprocess.Popen[str] | None = None
        self._lock, self._stopped = threading.Lock(), False

    def run(self, task: CellTask) -> str | None:
        """Runs a cell; gives what went wrong, if anything did."""
        process = self._running()
        if process is None:
            return "the sweep is being stopped"
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(dataclasses.asdict(task)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            code = process.wait()
            self._process = None
            return f"its process ended with exit code {code}"
        return json.loads(line)["error"]

    def _running(self) -> subprocess.Popen[str] | None:
        with self._lock:
            return None if self._stopped else self._process or self._start()

    def _start(self) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "music_jax.claims.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a Ctrl-C is for the sweep, which then ends them
            )
        assert process.stdin is not None
        setup = {"core": self._core, "directory": str(self._directory)}
        process.stdin.write(json.dumps(setup) + "\n")
        process.stdin.flush()
        self._process = process
        return process

    def stop(self) -> None:
        """Ends the process, and the cell in work with it."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()


def choose(free: list[Cell], in_work: list[Cell], last: Setting | None) -> Cell:
    """The cell for a worker to go on with, so that a setting's programs are compiled by one.

    Args:
      free: cells that may be run, in their order; at least one.
      in_work: what the other workers run.
      last: the setting of the worker's last cell, if there was one.

    Returns:
      The first of its own setting, or else of one that no other worker is at, or else of all.
    """
    others = {cell.setting.name for cell in in_work}
    return min(free, key=lambda cell: (cell.setting != last, cell.setting.name in others))


def run_missing(sweep: Sweep, *, cores: list[int | None]) -> None:
    """Runs every cell of the sweep that has no result.

    Args:
      sweep: the cells.
      cores: one worker for each, which keeps to that core and makes one device of it; where it is
        None, the worker takes all devices there are.

    Raises:
      UnusableDataError: cells failed, after all others were run.
    """
    total = sweep.num_cells()
    lock = threading.Lock()
    in_work: dict[str, Cell] = {}
    failed: dict[str, str] = {}
    done = sum(
        sweep.result(cell) is not None
        for setting in sweep.settings_in_order()
        for cell in sweep.cells(setting)
    )
    workers = [_Worker(sweep.directory, i, core) for i, core in enumerate(cores)]
    stopping = threading.Event()
    changed = threading.Condition(lock)
    bar = progress.bar(total, unit="cell", description="claims", done=done)

    def next_cell(last: Setting | None) -> Cell | None:
        with changed:
            while not stopping.is_set():
                missing = [c for c in sweep.missing() if c.name not in failed]
                free = [c for c in missing if c.name not in in_work]
                if free:
                    cell = choose(free, list(in_work.values()), last)
                    in_work[cell.name] = cell
                    return cell
                if not in_work:
                    return None
                changed.wait()
            return None

    def work(worker: _Worker) -> None:
        last = None
        while (cell := next_cell(last)) is not None:
            last = cell.setting
            task = CellTask(
                directory=str(sweep.directory / cell.name),
                config=as_json(sweep.cell_config(cell)),
                searching=cell.searching,
                collapsed_start=cell.setting.collapsed_start,
                in_memory=sweep.settings.in_memory,
            )
            error = None
            for _ in range(_ATTEMPTS):
                error = worker.run(task)
                if error is None or stopping.is_set():
                    break
            with changed:
                del in_work[cell.name]
                if error is not None and not stopping.is_set():
                    failed[cell.name] = error
                    _logger.info(f"{cell.name} failed: {error}; see {worker.log}")
                elif error is None:
                    bar.set_postfix_str(cell.name, refresh=False)
                    bar.update(1)
                changed.notify_all()

    with concurrent.futures.ThreadPoolExecutor(len(workers)) as threads, bar:
        running = [threads.submit(work, worker) for worker in workers]
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
        finally:
            stopping.set()
            for worker in workers:
                worker.stop()
            with changed:
                changed.notify_all()
    if failed:
        name, error = next(iter(failed.items()))
        raise UnusableDataError(
            f"{len(failed)} of {total} cells failed, {name} first: {error}; run the same command "
            "to try them again"
        )
