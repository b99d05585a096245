"""Runs one cell: trains and evaluates it as the commands do, and collects its measures."""

import dataclasses
import os
import time
from typing import Any

import numpy as np
from etils import epath
from sklearn.metrics import normalized_mutual_info_score

from music_jax.claims.sweep import result_file
from music_jax.config import default_config, from_json, get_field
from music_jax.data.sources import Source
from music_jax.errors import DivergedError, UnusableDataError
from music_jax.evaluation.features import SplitFeatures
from music_jax.evaluation.protocols import read_final_results, run_protocols
from music_jax.evaluation.run import Run, load_run
from music_jax.metrics.linear_probe import ProbeRecipe, linear_probe
from music_jax.train import train_and_evaluate
from music_jax.workdir.directory import open_workdir
from music_jax.workdir.files import write_json
from music_jax.workdir.run_config import DATA_FIELDS

_PROTOCOLS = ("linear", "knn", "fewshot", "label_free", "segments", "clustering")


@dataclasses.dataclass(frozen=True)
class CellTask:
    """Input of a worker process that runs a cell.

    Attributes:
      directory: Directory of the cell.
      config: Config to train, as JSON.
      searching: Whether the cell belongs to a search for the learning rate.
      collapsed_start: Whether to train for invariance alone first.
    """

    directory: str
    config: dict[str, Any]
    searching: bool
    collapsed_start: bool


def run_cell(task: CellTask) -> None:
    """Trains and measures a cell, resuming if it was interrupted, and writes its result.json."""
    started, cpu_started = time.monotonic(), time.process_time()
    config = from_json(task.config)
    default = default_config()
    given = {field: get_field(config, field) for field in DATA_FIELDS}  # by the user, not by a run
    data = {field: value for field, value in given.items() if value != get_field(default, field)}
    directory = open_workdir(task.directory)
    start_directory = directory / "start"
    result: dict[str, Any] = {"learning_rate": config.optimizer.base_learning_rate, "start": None}
    try:
        start = None
        if task.collapsed_start:
            weights = {f"objective.{term}_weight": 0.0 for term in ("diagonal", "cross_segment")}
            collapsed = from_json(task.config)
            collapsed.update_from_flattened_dict(weights)
            start = train_and_evaluate(collapsed, os.fspath(start_directory))
            result["start"] = measure(load_run(os.fspath(start_directory), overrides=data))
        state = train_and_evaluate(config, task.directory, initial=start)
        if task.searching:
            found = read_final_results(config, directory, int(state.step))
            if found is None:
                raise UnusableDataError(f"{directory} has no labeled images to choose a rate with")
            result["linear_top1"] = found["linear"]["top1"]
        else:
            result |= measure(load_run(task.directory, overrides=data))
    except DivergedError as error:
        result["diverged"] = str(error)
    result["seconds"] = time.monotonic() - started
    result["core_seconds"] = time.process_time() - cpu_started
    _remove(directory, start_directory, checkpoints=task.searching)
    write_json(result_file(directory), result)


def _remove(directory: epath.Path, start_directory: epath.Path, *, checkpoints: bool) -> None:
    """Removes the files that are not needed once a cell has its result."""
    large = [directory / "features", start_directory / "features", start_directory / "checkpoints"]
    if checkpoints:
        large.append(directory / "checkpoints")
    for path in large:
        path.rmtree(missing_ok=True)


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

    These are the accuracy of a linear probe of each label and, for MUSIC, the normalized mutual
    information of each segment with each label.
    """
    sources, train, test = run.evaluation_sources(), run.train(), run.test()
    train_labels = label_columns(sources.train, train.indices)
    if len(train_labels) < 2:
        return {}
    test_labels = label_columns(sources.test, test.indices)
    first, *others = train_labels  # the first is the label that the run is evaluated with
    result: dict[str, Any] = {
        "factors": [first, *others],
        "factor_linear_top1": [
            linear_top1,
            *(_probe(run, train, test, train_labels[name], test_labels[name]) for name in others),
        ],
    }
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


def _probe(
    run: Run,
    train: SplitFeatures,
    test: SplitFeatures,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
) -> float:
    """Returns the top-1 accuracy of a linear probe of another label, on one view of each image."""
    settings = run.config.linear_eval
    recipe = ProbeRecipe(
        num_epochs=settings.num_epochs,
        batch_size=settings.batch_size,
        base_learning_rates=tuple(settings.base_learning_rates),
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        drop_epochs=tuple(settings.drop_epochs),
    )
    return linear_probe(
        train.features,
        train_labels,
        test.features,
        test_labels,
        recipe,
        num_classes=int(train_labels.max()) + 1,
        feature_scaling=settings.feature_scaling,
        validation_fraction=settings.validation_fraction,
        seed=run.config.seed,
    ).top1
