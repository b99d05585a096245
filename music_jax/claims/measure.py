"""Trains a cell and measures it, on validation images in a search and else on test images."""

import json
import math
import os
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import config_dict
from sklearn.metrics import normalized_mutual_info_score

from music_jax.claims.cells import Cell, Result
from music_jax.claims.probe import logistic_probe
from music_jax.claims.references import (
    Arrays,
    classify,
    measure_reference,
    probe_result,
    samples,
    with_test,
)
from music_jax.config import default_config, from_json, get_field
from music_jax.data.sources import Source
from music_jax.errors import DivergedError, NonFiniteError
from music_jax.evaluation.features import Model
from music_jax.evaluation.run import Run, load_run
from music_jax.metrics.label_free import rankme
from music_jax.metrics.segments import measure_segments
from music_jax.models.network import init_network
from music_jax.train import train_and_evaluate
from music_jax.workdir.directory import open_workdir
from music_jax.workdir.run_config import DATA_FIELDS

# Objectives whose minimum is a collapse, for the starts of claim 5.
_COLLAPSING: dict[str, dict[str, Any]] = {
    # All embeddings become equal.
    "constant": {
        "objective.name": "vicreg",
        "objective.similarity_weight": 25.0,
        "objective.variance_weight": 0.0,
        "objective.covariance_weight": 0.0,
        "projector.output_size": 512,
    },
    # Each segment uses one unit for all images, with a probability near one.
    "saturated": {
        "objective.name": "music",
        "objective.center": False,
        "objective.num_segments": 32,
        "objective.units_per_segment": 16,
        "objective.temperature": 1.0,
        "objective.diagonal_weight": 0.0,
        "objective.cross_segment_weight": 0.0,
        "projector.output_size": None,
    },
}
_START_RATE = 1e-2
_MAX_SEGMENTS = 32  # whose mutual information is compared with permutations
_PERMUTATIONS = 99


def run_cell(
    cell: Cell, config_json: dict[str, Any], directory: str, test_split: str, validation: str
) -> tuple[Result, Arrays]:
    """Trains and measures a cell, resuming its training if it was interrupted.

    Args:
      cell: The cell.
      config_json: Its config.
      directory: Workdir of its training.
      test_split: Split of the test images.
      validation: Split of the images on which options and penalties are chosen.

    Returns:
      The result, and the predictions and the labels of the test images of a final cell.
    """
    started, cpu_started = time.monotonic(), time.process_time()
    config, default = from_json(config_json), default_config()
    result: Result = {}
    arrays: Arrays = {}
    try:
        if cell.reference:
            result, arrays = measure_reference(
                cell, config, open_workdir(directory), test_split, validation
            )
        else:
            # Locations of data that the user gave; those that only a run names are not trusted.
            given = {field: get_field(config, field) for field in DATA_FIELDS}
            data = {f: value for f, value in given.items() if value != get_field(default, f)}
            data["dataset.test_split"] = validation
            config.evaluation.train = ""  # which only the measures need
            start = None
            if cell.start:
                start, result["start_state"] = _collapsed(cell, config, directory, data)
            train_and_evaluate(config, directory, initial=start)
            result["first_grad_norm"] = _first_grad_norm(directory)
            run = load_run(directory, overrides=data)
            if cell.kind == "search":
                probe = logistic_probe(samples(run.train()), samples(run.test()))
                result |= probe_result(probe)
            else:
                found, arrays = _measure(run, with_test(run, test_split))
                result |= found
    except (DivergedError, NonFiniteError) as error:
        result["diverged"] = str(error)
        arrays = {}
    result["seconds"] = round(time.monotonic() - started, 1)
    result["core_seconds"] = round(time.process_time() - cpu_started, 1)
    return result, arrays


def _measure(run: Run, tested: Run) -> tuple[Result, Arrays]:
    """Measures a trained network once on the test images."""
    model: Model = "trained"
    train, test = run.train(model), tested.test(model)
    result, arrays = classify(samples(train), samples(run.test()), samples(test), run)
    outputs = tested.unlabeled().arrays
    embeddings = outputs["embeddings"]
    result |= {
        "rankme": _finite(rankme(outputs["features"])),
        "embedding_rankme": _finite(rankme(embeddings)),
        # 1 for isotropic embeddings, 0 for equal ones.
        "embedding_std": _normalized_std(embeddings),
    }
    if run.config.objective.name == "music":
        result |= measure_codes(tested.probabilities(), seed=run.config.seed)
        result |= _factors(tested)
    return result, arrays


def measure_codes(probabilities: np.ndarray, *, seed: int) -> Result:
    """Measures the segments' usage and information, which is compared with permutations.

    Under the null hypothesis the codes of different segments are independent: each segment's codes
    are permuted among the images.

    Args:
      probabilities: Probabilities of the units, [images, segments, units].
      seed: Seed of the permutations.
    """
    measures = measure_segments(probabilities)
    _, segments, units = probabilities.shape
    rng = np.random.Generator(np.random.Philox(key=seed))
    chosen = np.sort(rng.permutation(segments)[:_MAX_SEGMENTS])
    codes = probabilities[:, chosen].argmax(axis=2)  # [images, segments]
    observed = pair_information(codes, units)
    permuted = (rng.permuted(codes, axis=0) for _ in range(_PERMUTATIONS))
    null = np.stack([pair_information(those, units) for those in permuted])
    log_units = math.log(units)
    return {
        "usage_entropy": float(np.mean(measures.usage_entropy)) / log_units,
        "dead_units": float(np.sum(measures.dead_units)) / (segments * units),
        "confidence": float(np.mean(measures.confidence)),
        "segment_information": float(np.mean(observed)) / log_units,
        "null_information": float(np.mean(null)) / log_units,
        "null_p": float((1 + np.sum(null.mean(axis=1) >= observed.mean())) / (1 + len(null))),
        # Pairs that share more than in 95 % of the permutations, as 6 % of independent ones do.
        "dependent_pairs": float(np.mean(observed > np.quantile(null, 0.95, axis=0))),
    }


def pair_information(codes: np.ndarray, units: int) -> np.ndarray:
    """Returns the mutual information of each pair of segments, in nats.

    Args:
      codes: Unit of each segment, integers [images, segments].
      units: Number of units.

    Returns:
      float64 [pairs].
    """
    images, segments = codes.shape
    found = []
    for s in range(segments - 1):
        others = codes[:, s + 1 :]
        pairs = others.shape[1]
        cells = (np.arange(pairs) * units + codes[:, s, None]) * units + others
        joint = np.bincount(cells.ravel(), minlength=pairs * units**2) / images
        joint = joint.reshape(pairs, units, units)
        independent = joint.sum(axis=2, keepdims=True) * joint.sum(axis=1, keepdims=True)
        ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
        found.append(np.sum(joint * np.log(ratio), axis=(1, 2)))
    return np.concatenate(found)


def _factors(run: Run) -> Result:
    """Returns the normalized mutual information of each segment with each label, if several."""
    labeled = run.unlabeled()
    columns = label_columns(run.evaluation_sources().test, labeled.indices)
    if len(columns) < 2:
        return {}
    codes = run.probabilities().argmax(axis=2)  # [images, segments]
    nmi = [
        [float(normalized_mutual_info_score(labels, code)) for labels in columns.values()]
        for code in codes.T
    ]
    return {"factors": list(columns), "factor_nmi": nmi}


def label_columns(source: Source, indices: np.ndarray) -> Arrays:
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
    columns: Arrays = {}
    for name in names:
        column = np.array([int(row[name]) for row in rows])
        if not any(np.array_equal(column, other) for other in columns.values()):
            columns[name] = column
    return columns


def _normalized_std(embeddings: np.ndarray) -> float:
    """Returns the root of the total variance over the mean squared length."""
    x = np.asarray(embeddings, np.float64)
    squared = np.mean(np.sum(x**2, axis=1))
    return float(np.sqrt(np.sum(np.var(x, axis=0)) / squared)) if squared > 0 else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _first_grad_norm(directory: str) -> float | None:
    """Returns the norm of the gradient by the parameters in the first step, from its log."""
    with (epath.Path(directory) / "metrics.jsonl").open("r") as file:
        lines = map(json.loads, file)  # the first may have online measures alone
        return next((line["grad_norm"] for line in lines if "grad_norm" in line), None)


def _collapsed(
    cell: Cell, config: config_dict.ConfigDict, directory: str, data: dict[str, Any]
) -> tuple[Any, Result]:
    """Trains the collapsed state that a cell starts from; it is the same for every method."""
    start = config_dict.ConfigDict(config.to_dict())
    start.update_from_flattened_dict(
        _COLLAPSING[cell.start] | {"optimizer.base_learning_rate": _START_RATE}
    )
    start.objective.options = config_dict.ConfigDict()  # of a registered objective
    path = os.path.join(directory, "start")
    state = train_and_evaluate(start, path)
    run = load_run(path, overrides=data)
    embeddings = run.unlabeled().arrays["embeddings"]
    about = {
        "embedding_std": _normalized_std(embeddings),
        "embedding_rankme": _finite(rankme(embeddings)),
    }
    stats = state.batch_stats
    if config.objective.name == "music" and config.objective.center:
        # This network has one more statistic, the running mean of the embeddings.
        init = jax.jit(lambda key: init_network(config, key)[1]["projector"])
        stats = stats | {"projector": init(jax.random.key(config.seed)) | stats["projector"]}
    return (state.params, stats), about
