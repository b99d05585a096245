"""Runs the cells of a sweep: trains and evaluates each as the commands do, in worker processes."""

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
import numpy as np
from etils import epath
from sklearn.metrics import normalized_mutual_info_score

from music_jax import registry
from music_jax.claims.sweep import RESULT, Cell, Sweep
from music_jax.config import default_config, from_json, get_field
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.distributed.signals import end_with_parent
from music_jax.errors import DivergedError, UnusableDataError
from music_jax.evaluation.protocols import read_final_results, run_protocols
from music_jax.evaluation.run import Run, load_run
from music_jax.metrics.linear_probe import ProbeRecipe, linear_probe
from music_jax.train import train_and_evaluate
from music_jax.workdir.directory import open_workdir, use_compilation_cache
from music_jax.workdir.files import write_json
from music_jax.workdir.run_config import DATA_FIELDS, as_json

_logger = logging.getLogger(__name__)

_ATTEMPTS = 2  # per cell, if it fails or its process is killed
_PROTOCOLS = ("linear", "knn", "fewshot", "label_free", "segments", "clustering")


def run_missing(sweep: Sweep, *, cores: Sequence[int | None]) -> None:
    """Runs every cell of the sweep that has no result.

    Each worker runs on its core as a single device, or on all devices if its core is None.

    Raises:
      UnusableDataError: Cells failed. All others have been run.
    """
    logs = [sweep.directory / f"worker-{number}.log" for number in range(len(cores))]
    # One process per executor, so that the death of a process affects only its own cell.
    workers = list(map(start_worker, logs, cores))
    running: dict[concurrent.futures.Future[str | None], tuple[int, Cell]] = {}
    attempts: collections.Counter[Cell] = collections.Counter()
    failed: dict[Cell, str] = {}
    total, done = sweep.num_cells(), len(sweep.results())
    try:
        with progress.bar(total, unit="cell", description="claims", done=done) as bar:
            while True:
                for number in set(range(len(workers))) - {number for number, _ in running.values()}:
                    busy = [cell for _, cell in running.values()]
                    free = [c for c in sweep.missing() if c not in busy and c not in failed]
                    if free:
                        cell = choose(free, busy)
                        config = as_json(sweep.cell_config(cell))
                        directory = os.fspath(sweep.directory / cell.name)
                        future = workers[number].submit(_try_cell, cell, config, directory)
                        running[future] = number, cell
                if not running:
                    break
                for future in concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                ).done:
                    number, cell = running.pop(future)
                    try:
                        error = future.result()
                    except concurrent.futures.process.BrokenProcessPool:
                        error = "its process was killed"
                        workers[number] = start_worker(logs[number], cores[number])
                    attempts[cell] += 1
                    if error is None:
                        bar.set_postfix_str(cell.name, refresh=False)
                        bar.update(1)
                    elif attempts[cell] == _ATTEMPTS:
                        failed[cell] = error
                        _logger.warning(f"{cell.name} failed: {error}; see {logs[number]}")
    finally:
        for worker in workers:
            worker.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
    if failed:
        cell, error = next(iter(failed.items()))
        raise UnusableDataError(
            f"{len(failed)} of {total} cells failed, {cell.name} first: {error}; rerun the command "
            "to try them again"
        )


def choose(free: list[Cell], busy: list[Cell]) -> Cell:
    """Returns the first free cell of a setting that no worker runs, or else the first of all.

    Cells of one setting share their compiled programs, so one worker should compile them.
    """
    others = {cell.setting.name for cell in busy}
    return min(free, key=lambda cell: cell.setting.name in others)


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
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if one_device:
        jax.config.update("jax_num_cpu_devices", 1)
    progress.log_to_stdout()
    registry.import_modules()
    use_compilation_cache()


def _try_cell(cell: Cell, config: dict[str, Any], directory: str) -> str | None:
    """Runs a cell; returns the error message, or None if it succeeded."""
    try:
        run_cell(cell, config, directory)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def run_cell(cell: Cell, config_json: dict[str, Any], directory: str) -> None:
    """Trains and measures a cell, resuming if it was interrupted, and writes its result.json."""
    started, cpu_started = time.monotonic(), time.process_time()
    config, default = from_json(config_json), default_config()
    given = {field: get_field(config, field) for field in DATA_FIELDS}  # by the user, not by a run
    data = {field: value for field, value in given.items() if value != get_field(default, field)}
    path = open_workdir(directory)
    start_path = path / "start"
    result: dict[str, Any] = {"learning_rate": config.optimizer.base_learning_rate, "start": None}
    try:
        start = None
        if cell.setting.collapsed_start:
            weights = {f"objective.{term}_weight": 0.0 for term in ("diagonal", "cross_segment")}
            collapsed = from_json(config_json)
            collapsed.update_from_flattened_dict(weights)
            state = train_and_evaluate(collapsed, os.fspath(start_path))
            start = (state.params, state.batch_stats)
            result["start"] = measure(load_run(os.fspath(start_path), overrides=data))
        state = train_and_evaluate(config, directory, initial=start)
        if cell.searching:
            found = read_final_results(config, path, int(state.step))
            if found is None:
                raise UnusableDataError(f"{path} has no labeled images to choose a rate with")
            result["linear_top1"] = found["linear"]["top1"]
        else:
            result |= measure(load_run(directory, overrides=data))
    except DivergedError as error:
        result["diverged"] = str(error)
    result["seconds"] = time.monotonic() - started
    result["core_seconds"] = time.process_time() - cpu_started
    # What is not needed once a cell has its result.
    large = [path / "features", start_path / "features", start_path / "checkpoints"]
    for folder in (*large, path / "checkpoints") if cell.searching else large:
        folder.rmtree(missing_ok=True)
    write_json(path / RESULT, result)


def measure(run: Run) -> dict[str, Any]:
    """Returns the measures of a trained run that the tables show, by name."""
    found = run_protocols(run, _PROTOCOLS)
    result = {
        "linear_top1": found["linear"]["top1"],
        "knn_top1": found["knn"]["top1"],
        "ten_shot_top1": found["fewshot"]["top1_by_shots"]["10"]["top1"],
        "rankme": found["label_free"]["features"]["rankme"],
        "embedding_rankme": found["label_free"]["embeddings"]["rankme"],
    }
    if "segments" in found:
        segments = found["segments"]
        result |= {
            "segment_information": segments["mutual_information"]["mean"] / segments["log_units"],
            "usage_entropy": segments["usage_entropy_share"],
            "confidence": segments["confidence"]["mean"],
            "dead_units": segments["dead_units"] / segments["num_units"],
        }
    if "clustering" in found:
        clusters = found["clustering"]
        nmi = [segment["nmi"] for segment in clusters["segments"]]
        result |= {
            "segment_accuracy": clusters["chosen_segment"]["accuracy"],
            "segment_purity": clusters["chosen_segment"]["purity"],
            "joint_code_accuracy": clusters["joint_code"]["accuracy"],
            "joint_code_nmi": clusters["joint_code"]["nmi"],
            "segments_label_nmi": nmi,
            "segments_label_nmi_mean": float(np.mean(nmi)),
        }
    return result | _measure_factors(run, result["linear_top1"])


def _measure_factors(run: Run, linear_top1: float) -> dict[str, Any]:
    """Returns measures of each label, if the images have several.

    These are the accuracy of a linear probe of each label, on one view of each image, and, for
    MUSIC, the normalized mutual information of each segment with each label.
    """
    sources, train, test = run.evaluation_sources(), run.train(), run.test()
    train_labels = label_columns(sources.train, train.indices)
    if len(train_labels) < 2:
        return {}
    test_labels = label_columns(sources.test, test.indices)
    settings = run.config.linear_eval
    fields = [field.name for field in dataclasses.fields(ProbeRecipe)]
    top1 = [linear_top1]  # of the first label, which the run is evaluated with
    for name in list(train_labels)[1:]:
        probe = linear_probe(
            train.features,
            train_labels[name],
            test.features,
            test_labels[name],
            ProbeRecipe(**{field: settings[field] for field in fields}),
            num_classes=int(train_labels[name].max()) + 1,
            feature_scaling=settings.feature_scaling,
            validation_fraction=settings.validation_fraction,
            seed=run.config.seed,
        )
        top1.append(probe.top1)
    result: dict[str, Any] = {"factors": list(train_labels), "factor_linear_top1": top1}
    if run.config.objective.name == "music":
        labeled = np.flatnonzero(run.unlabeled().labels >= 0)
        codes = run.probabilities()[labeled].argmax(axis=2)  # [images, segments]
        result["factor_nmi"] = [
            [float(normalized_mutual_info_score(test_labels[name], code)) for name in train_labels]
            for code in codes.T
        ]
    return result


def label_columns(source: Source, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns all integer labels of some images by name, the source's own label first.

    A label that equals an earlier one of another name is omitted.
    """
    first = source.record(int(indices[0]))
    others = [
        name
        for name, value in first.items()
        if np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.integer)
    ]
    names = list(dict.fromkeys([source.label_key, *others]))
    if len(names) == 1:
        return {names[0]: np.empty(0, np.int32)}
    rows = [source.record(int(index)) for index in indices]
    columns: dict[str, np.ndarray] = {}
    for name in names:
        column = np.array([int(row[name]) for row in rows])
        if not any(np.array_equal(column, other) for other in columns.values()):
            columns[name] = column
    return columns
