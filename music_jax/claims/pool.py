"""Runs the missing cells of a sweep in worker processes."""

import collections
import concurrent.futures
import concurrent.futures.process
import logging
import multiprocessing
import os
import traceback
from collections.abc import Sequence

import jax

from music_jax import registry
from music_jax.claims.run_cell import CellTask, run_cell
from music_jax.claims.sweep import Cell, Sweep
from music_jax.distributed import progress
from music_jax.distributed.signals import end_with_parent
from music_jax.errors import UnusableDataError
from music_jax.workdir.directory import use_compilation_cache
from music_jax.workdir.run_config import as_json

_logger = logging.getLogger(__name__)

_ATTEMPTS = 2  # per cell, if it fails or its process is killed


def run_missing(sweep: Sweep, *, cores: Sequence[int | None]) -> None:
    """Runs every cell of the sweep that has no result.

    Args:
      sweep: The sweep.
      cores: Core of each worker, which runs on it as a single device; None for a worker that uses
        all devices.

    Raises:
      UnusableDataError: Cells failed. All others have been run.
    """
    # One process per executor, so that the death of a process affects only its own cell.
    workers = [_start_worker(sweep, number, core) for number, core in enumerate(cores)]
    running: dict[concurrent.futures.Future[str | None], tuple[int, Cell]] = {}
    attempts: collections.Counter[str] = collections.Counter()
    failed: dict[str, str] = {}
    total, done = sweep.num_cells(), len(sweep.results())

    def assign() -> None:
        for number in set(range(len(workers))) - {number for number, _ in running.values()}:
            in_work = [cell for _, cell in running.values()]
            excluded = {cell.name for cell in in_work} | set(failed)
            if free := [cell for cell in sweep.missing() if cell.name not in excluded]:
                cell = choose(free, in_work)
                running[workers[number].submit(_run, _task(sweep, cell))] = number, cell

    try:
        with progress.bar(total, unit="cell", description="claims", done=done) as bar:
            assign()
            while running:
                finished = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                ).done
                for future in finished:
                    number, cell = running.pop(future)
                    try:
                        error = future.result()
                    except concurrent.futures.process.BrokenProcessPool:
                        error = "its process was killed"
                        workers[number] = _start_worker(sweep, number, cores[number])
                    attempts[cell.name] += 1
                    if error is None:
                        bar.set_postfix_str(cell.name, refresh=False)
                        bar.update(1)
                    elif attempts[cell.name] == _ATTEMPTS:
                        failed[cell.name] = error
                        log = sweep.directory / _log_name(number)
                        _logger.warning(f"{cell.name} failed: {error}; see {log}")
                assign()
    finally:
        for worker in workers:
            worker.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
    if failed:
        name, error = next(iter(failed.items()))
        raise UnusableDataError(
            f"{len(failed)} of {total} cells failed, {name} first: {error}; rerun the command to "
            "try them again"
        )


def choose(free: list[Cell], in_work: list[Cell]) -> Cell:
    """Returns the first cell of a setting that no worker runs, or else the first of all.

    Cells of one setting share their compiled programs, so one worker should compile them.

    Args:
      free: Cells that can be run; at least one.
      in_work: Cells that the workers run.
    """
    others = {cell.setting.name for cell in in_work}
    return min(free, key=lambda cell: cell.setting.name in others)


def _task(sweep: Sweep, cell: Cell) -> CellTask:
    return CellTask(
        directory=os.fspath(sweep.directory / cell.name),
        config=as_json(sweep.cell_config(cell)),
        searching=cell.searching,
        collapsed_start=cell.setting.collapsed_start,
    )


def _log_name(number: int) -> str:
    return f"worker-{number}.log"


def _start_worker(
    sweep: Sweep, number: int, core: int | None
) -> concurrent.futures.ProcessPoolExecutor:
    log = os.fspath(sweep.directory / _log_name(number))
    spawn = multiprocessing.get_context("spawn")
    worker = concurrent.futures.ProcessPoolExecutor(
        1, spawn, _begin, (log, None if core is None else 1)
    )
    # The process inherits its core, because libraries count cores as soon as they are imported.
    own = None if core is None else os.sched_getaffinity(0)
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})
        worker.submit(os.getpid)
    finally:
        if own is not None:
            os.sched_setaffinity(0, own)
    return worker


def _begin(log: str, num_devices: int | None) -> None:
    """Prepares a worker process: ends it with the sweep, and sets its log and its devices."""
    end_with_parent()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if num_devices is not None:
        jax.config.update("jax_num_cpu_devices", num_devices)
    progress.log_to_stdout()
    registry.import_modules()
    use_compilation_cache()


def _run(task: CellTask) -> str | None:
    """Runs a cell; returns the error message, or None if it succeeded."""
    try:
        run_cell(task)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
