"""Runs the cells of a comparison in worker processes, and waits for those of other workers."""

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from music_jax import registry
from music_jax.claims.cells import Cell, Results
from music_jax.claims.code import fingerprint, made_by_other_code
from music_jax.claims.planning import make_plan, missing_cells
from music_jax.claims.sweep import Sweep
from music_jax.config import from_json
from music_jax.distributed import progress
from music_jax.distributed.shares import ALL, Share
from music_jax.distributed.signals import end_with_parent
from music_jax.errors import StoppedError, UnusableDataError, one_line
from music_jax.workdir.compilation_cache import use_compilation_cache
from music_jax.workdir.run_config import as_json

_logger = logging.getLogger(__name__)

_ATTEMPTS = 2  # per cell, if it fails or its process is killed
_POLL_SECONDS = 10.0
_PATIENCE_SECONDS = 300.0  # after which a worker that gives no sign of life has ended
_RUNS, _FAILED, _SILENT = "runs", "failed", "silent"  # states of a worker
_SCALED = 1_000_000  # images: numbers on the bar have units, whatever the total
_IMAGES_PER_EVALUATION = 0.5  # costs of an evaluation, in training images per image


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker process needs to run a cell."""

    cell: Cell
    config: dict[str, Any]
    runs: str  # directory of the trainings
    results: str
    test_split: str
    validation: str


def run_missing(
    sweep: Sweep,
    *,
    runs: epath.Path,
    cores: Sequence[int | None],
    share: Share = ALL,
    patience: float = _PATIENCE_SECONDS,
) -> None:
    """Runs every cell of a share that has no result, as soon as those it depends on have one.

    Each worker process runs on its core as a single device, or on all devices if its core is None.
    Once no cell of the share is left to run, results of other shares are awaited as long as one of
    the workers whose results are missing runs.

    Args:
      sweep: The comparison.
      runs: Directory of the trainings, and of the files by which workers tell that they run.
      cores: Core of each worker process.
      share: The cells that this call runs.
      patience: Seconds after which another worker that gives no sign of life has ended.

    Raises:
      UnusableDataError: Cells failed, of this share or another one.
      StoppedError: Cells of other shares are missing, and none of their workers runs.
    """
    if differing := made_by_other_code(sweep, make_plan(sweep).cells):
        _logger.warning(
            f"{len(differing)} results were made by other code than this, {differing[0]} first; to "
            f"train these again, remove their files from {sweep.results.directory}"
        )
    signs = _SignsOfLife(runs, share)
    logs = [runs / f"worker-{share.index}-{number}.log" for number in range(len(cores))]
    # One process per executor, so that the death of a process affects only its own cell.
    workers = list(map(start_worker, logs, cores))
    running: dict[concurrent.futures.Future[str | None], tuple[int, Cell]] = {}
    attempts: collections.Counter[str] = collections.Counter()
    failed: dict[str, str] = {}
    try:
        with progress.bar(_SCALED, unit="img", description="claims") as bar:
            while True:
                missing = missing_cells(sweep)
                _show(bar, sweep)
                busy = [cell for _, cell in running.values()]
                free = [
                    cell
                    for cell in missing
                    if cell.is_in_share(share) and cell not in busy and cell.name not in failed
                ]
                for number in set(range(len(workers))) - {n for n, _ in running.values()}:
                    if free:
                        cell = choose(free, busy)
                        free.remove(cell)
                        busy.append(cell)
                        job = _job(sweep, cell, runs)
                        try:
                            future = workers[number].submit(_try_job, job)
                        except concurrent.futures.process.BrokenProcessPool:  # killed while idle
                            workers[number] = start_worker(logs[number], cores[number])
                            future = workers[number].submit(_try_job, job)
                        running[future] = number, cell
                signs.give()
                if not running:
                    others = [c for c in missing if not c.is_in_share(share)]
                    if failed or not others:
                        break
                    owners = sorted({cell.owner(share.count) for cell in others})
                    states = {owner: signs.state(owner, patience) for owner in owners}
                    if _RUNS not in states.values():
                        if unsuccessful := [o for o in owners if states[o] == _FAILED]:
                            raise UnusableDataError(
                                f"{len(others)} cells of other workers are missing, such as "
                                f"{others[0].name}, and worker {unsuccessful[0]}/{share.count} "
                                "failed: see its output, and rerun its command and this one"
                            )
                        raise StoppedError(
                            f"{len(others)} cells of other workers are missing, such as "
                            f"{others[0].name}, and none of these workers runs; start them, and "
                            "rerun this command"
                        )
                    time.sleep(_POLL_SECONDS)
                    continue
                ended = concurrent.futures.wait(
                    running, timeout=_POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
                ).done
                for future in ended:
                    number, cell = running.pop(future)
                    try:
                        error = future.result()
                    except concurrent.futures.process.BrokenProcessPool:
                        error = "its process was killed"
                        workers[number] = start_worker(logs[number], cores[number])
                    attempts[cell.name] += 1
                    if error is None:
                        bar.set_postfix_str(cell.name, refresh=False)
                    elif attempts[cell.name] == _ATTEMPTS:
                        failed[cell.name] = error
                        _logger.warning(f"{cell.name} failed: {error}; see {logs[number]}")
    finally:
        for worker in workers:
            worker.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
    if failed:
        signs.fail()
        name, error = next(iter(failed.items()))
        raise UnusableDataError(
            f"{len(failed)} cells failed, {name} first: {error}; rerun the command to try them "
            "again"
        )


class _SignsOfLife:
    """Files by which workers on any machine tell each other that they run."""

    def __init__(self, directory: epath.Path, share: Share):
        self._directory = directory / "workers"
        self._share = share
        self._count = 0
        self._sweep = os.environ.get("MUSIC_JAX_SWEEP", "")
        self._seen: dict[int, tuple[str, float]] = {}  # content of a file, and when it changed
        self._directory.mkdir(parents=True, exist_ok=True)
        self._before = {path.name: path.read_text() for path in self._directory.iterdir()}

    def _file(self, index: int) -> epath.Path:
        return self._directory / f"{index}-of-{self._share.count}"

    def give(self) -> None:
        """Changes the own file."""
        self._count += 1
        self._file(self._share.index).write_text(f"{os.getpid()} {self._count}")

    def fail(self) -> None:
        """Tells the other workers that this one has ended with failed cells."""
        text = f"{_FAILED} {self._sweep} {os.getpid()} {time.time()}"
        self._file(self._share.index).write_text(text)

    def state(self, index: int, patience: float) -> str:
        """Returns the state of another worker.

        A worker is silent if its file has not changed for `patience` seconds, or did not exist for
        so long. One that failed before this worker started may start again, unless both are of the
        same sweep, which launchers name in MUSIC_JAX_SWEEP: they do not start failed workers again.
        """
        path = self._file(index)
        content = path.read_text() if path.exists() else ""
        if content.startswith(_FAILED):
            same_sweep = self._sweep and content.startswith(f"{_FAILED} {self._sweep} ")
            if same_sweep or content != self._before.get(path.name):
                return _FAILED
        now = time.monotonic()
        if index not in self._seen or self._seen[index][0] != content:
            self._seen[index] = content, now
        return _RUNS if now - self._seen[index][1] < patience else _SILENT


def _show(bar: Any, sweep: Sweep) -> None:
    """Updates a bar to the costs of the cells that are done, of all that there will be."""
    cells = make_plan(sweep, assume=True).cells
    fixed = _IMAGES_PER_EVALUATION * sweep.images.num_train
    costs = {cell.name: cell.cost + fixed for cell in cells}
    bar.total = max(1, round(sum(costs.values())))
    done = round(sum(cost for name, cost in costs.items() if sweep.results.has(name)))
    if not bar.n:  # what was done before does not count for the time left
        bar.initial = bar.n = done
    bar.update(done - bar.n)


def _job(sweep: Sweep, cell: Cell, runs: epath.Path) -> Job:
    return Job(
        cell=cell,
        config=as_json(sweep.cell_config(cell)),
        runs=os.fspath(runs),
        results=os.fspath(sweep.results.directory),
        test_split=sweep.config.dataset.test_split,
        validation=sweep.images.validation,
    )


def choose(free: list[Cell], busy: list[Cell]) -> Cell:
    """Returns the first free cell of a group that no worker process runs, or else the first of all.

    Cells of one group share their compiled programs, so one process should compile them.
    """
    others = {cell.group for cell in busy}
    return min(free, key=lambda cell: cell.group in others)


def start_worker(log: epath.Path, core: int | None) -> concurrent.futures.ProcessPoolExecutor:
    """Starts a process that writes its output to a file and uses one core, or all devices."""
    worker = concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), _begin, (os.fspath(log), core is not None)
    )
    if core is None:
        return worker
    # The process inherits its core, because libraries count cores as soon as they are imported.
    own = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {core})
        worker.submit(os.getpid)
    finally:
        os.sched_setaffinity(0, own)
    return worker


def _begin(log: str, one_device: bool) -> None:
    """Prepares a worker process: ends it with the sweep, and sets its log and its devices."""
    end_with_parent()
    if "://" not in log:  # a file in a bucket cannot grow: the output stays that of the command
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    if one_device:
        jax.config.update("jax_num_cpu_devices", 1)
    progress.log_to_stdout()
    registry.import_modules()
    use_compilation_cache()


def _try_job(job: Job) -> str | None:
    """Runs a cell and writes its result; returns the error message, or None if it succeeded."""
    # Imported here because it takes seconds, which --tables_only should not.
    from music_jax.claims.measure import run_cell

    directory = epath.Path(job.runs) / job.cell.name
    try:
        code = fingerprint(from_json(job.config))  # before the files change
        result, arrays = run_cell(
            job.cell, job.config, os.fspath(directory), job.test_split, job.validation
        )
        result["code"] = code
        Results(epath.Path(job.results)).write(job.cell, result, arrays)
        # Not needed once a cell has its result; a final one keeps its checkpoint.
        unneeded = ["features", "start"] if job.cell.kind == "final" else [""]
        for name in unneeded:
            (directory / name).rmtree(missing_ok=True)
    except Exception as error:
        traceback.print_exc()
        return one_line(error, named=True)
    return None
