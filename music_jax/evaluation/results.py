"""Reads results from a workdir, whose files anyone may have written, and formats them."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from music_jax.distributed import progress
from music_jax.distributed.mesh import is_main_process
from music_jax.workdir.files import new_file, read_json, read_npz

_logger = logging.getLogger(__name__)

Result = dict[str, Any]  # result of a protocol, as JSON values
Rows = list[tuple[str, str]]

MEAN_AVERAGE_PRECISION = "mean_average_precision"

TITLES = {"top1": "top-1", "top5": "top-5", MEAN_AVERAGE_PRECISION: "mAP"}
_BASELINES = (("random_init", "random backbone"), ("raw_pixels", "raw pixels"))
_PREFIXES = ("", "random_init_", "raw_pixels_", "chance_")
_ACCURACIES = tuple(f"{prefix}{score}" for score in TITLES for prefix in _PREFIXES)
_PREDICTIONS = "linear_eval.npz"
_CLASSIFIER = "linear_classifier.npz"


def result_path(workdir: epath.Path, protocol: str) -> epath.Path:
    """Returns the path of a protocol's result."""
    return workdir / ("linear_eval.json" if protocol == "linear" else f"{protocol}.json")


def read_result(workdir: epath.Path, protocol: str) -> Result | None:
    """Reads the result of a protocol; None if there is none, or it is damaged."""
    try:
        result = read_json(result_path(workdir, protocol))
        _check_result(protocol, result)
        return result
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def read_all_results(workdir: epath.Path) -> dict[str, Result]:
    """Reads the results of all protocols, whatever step they belong to."""
    results = {protocol: read_result(workdir, protocol) for protocol in _SUMMARIES}
    return {protocol: result for protocol, result in results.items() if result is not None}


def _check_result(protocol: str, result: Any) -> None:
    """Raises an exception unless a file, which anyone may have written, holds a result."""
    accuracies = [result[name] for name in _ACCURACIES if result.get(name) is not None]
    if not all(isinstance(value, float) and 0 <= value <= 1 for value in accuracies):
        raise ValueError("an accuracy is not in [0, 1]")
    if not all(type(count) is int for count in result.get("without_label", {}).values()):
        raise ValueError("a number of images is not an integer")
    if not all(isinstance(reason, str) for reason in result.get("not_measured", {}).values()):
        raise ValueError("a reason is not a text")
    summary_rows({protocol: result})


class Predictions(NamedTuple):
    """Predictions of the linear probe, in linear_eval.npz beside linear_eval.json.

    Attributes:
      indices: Indices of the images in the test source, int64 [images].
      labels: Labels, int32 [images].
      predictions: Predicted labels, int32 [images].
      step: Step of the checkpoint.
      confidences: Probabilities of the predicted labels, float32 [images]; None in files of earlier
        versions.
    """

    indices: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    step: int
    confidences: np.ndarray | None = None

    @property
    def top1(self) -> float:
        """Top-1 accuracy."""
        return float(np.mean(self.labels == self.predictions))


class Classifier(NamedTuple):
    """The linear probe, in linear_classifier.npz: `features @ kernel + bias` scores the classes.

    Attributes:
      kernel: Weights of features that are not scaled, float32 [features, classes].
      bias: Biases, float32 [classes].
      step: Step of the checkpoint.
    """

    kernel: np.ndarray
    bias: np.ndarray
    step: int


def write_predictions(workdir: epath.Path, found: Predictions) -> None:
    """Writes predictions; if they cannot be written, a warning is logged."""
    _write(workdir / _PREDICTIONS, found, "the predictions of the linear probe")


def write_classifier(workdir: epath.Path, found: Classifier) -> None:
    """Writes a classifier; if it cannot be written, a warning is logged."""
    _write(workdir / _CLASSIFIER, found, "the linear probe")


def _write(path: epath.Path, found: Predictions | Classifier, description: str) -> None:
    if not is_main_process():
        return
    try:
        arrays = {name: x for name, x in found._asdict().items() if x is not None}
        with new_file(path) as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        _logger.warning(f"{description}: {path.name} cannot be written: {error}")


def read_predictions(workdir: epath.Path) -> Predictions | None:
    """Reads predictions; None if there are none.

    Raises:
      ValueError: The file is damaged, or contains something else.
    """
    path = workdir / _PREDICTIONS
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
        *columns, step = (arrays[name] for name in Predictions._fields[:4])
        shapes = [(columns[0].size,)] * 3 + [()]
        for array, shape in zip((*columns, step), shapes, strict=True):
            if array.shape != shape or array.dtype.kind not in "iu":
                raise ValueError("an array has an unexpected shape or type")
        indices, labels, predictions = columns
        if not len(indices) or min(array.min() for array in columns) < 0:
            raise ValueError("there are no images, or images without a label")
        if max(labels.max(), predictions.max()) >= 2**31:
            raise ValueError("a prediction is not a label")
        confidences = arrays.get("confidences")
        if confidences is not None and not (
            confidences.shape == labels.shape
            and confidences.dtype == np.float32
            and np.all((confidences >= 0) & (confidences <= 1))
        ):
            raise ValueError("a confidence is not in [0, 1]")
        return Predictions(indices, labels, predictions, int(step), confidences)
    except (OSError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def read_classifier(workdir: epath.Path) -> Classifier | None:
    """Reads a classifier; None if there is none.

    Raises:
      ValueError: The file is damaged, or contains something else.
    """
    path = workdir / _CLASSIFIER
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
        kernel, bias, step = (arrays[name] for name in Classifier._fields)
        if kernel.ndim != 2 or bias.shape != kernel.shape[1:] or not kernel.size:
            raise ValueError("an array has an unexpected shape")
        if step.shape or step.dtype.kind not in "iu":
            raise ValueError("its step is not an integer")
        if not all(x.dtype == np.float32 and np.isfinite(x).all() for x in (kernel, bias)):
            raise ValueError("its weights are not finite numbers of type float32")
        return Classifier(kernel, bias, int(step))
    except (OSError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def main_score(result: Result) -> tuple[str, float]:
    """Returns the name and the value of the main score of a classifier.

    It is `mean_average_precision` if images may have several classes, else `top1`.
    """
    name = MEAN_AVERAGE_PRECISION if MEAN_AVERAGE_PRECISION in result else "top1"
    return name, result[name]


def results_table(results: dict[str, Result]) -> str:
    """Formats the results of the linear probe and kNN, with the baselines and chance level."""
    linear, knn = results.get("linear", {}), results.get("knn", {})
    if multi_label := MEAN_AVERAGE_PRECISION in linear | knn:
        scores = [("linear", linear, MEAN_AVERAGE_PRECISION), ("kNN", knn, MEAN_AVERAGE_PRECISION)]
    else:
        scores = [("linear", linear, "top1"), ("linear", linear, "top5"), ("kNN", knn, "top1")]
    rows = [["trained backbone", *(_percent(result.get(name)) for _, result, name in scores)]]
    for key, label in _BASELINES:
        if any(result.get(f"{key}_{name}") is not None for _, result, name in scores):
            values = [(f"{key}_{name}", result) for _, result, name in scores]
            cells = [
                "" if "top5" in name else _percent(result.get(name)) for name, result in values
            ]
            rows.append([label, *cells])
    classes = linear.get("num_classes")  # which earlier versions did not write
    if multi_label:
        rows.append(["chance", *[_percent(linear.get(f"chance_{MEAN_AVERAGE_PRECISION}"))] * 2])
    elif isinstance(classes, int) and classes > 0:
        chance = _percent(1 / classes)
        rows.append(["chance", chance, _percent(min(1.0, 5 / classes)), chance])
    return progress.table(["", *(f"{probe} {TITLES[name]}" for probe, _, name in scores)], rows)


def summary_table(results: dict[str, Result]) -> str:
    """Formats the main metrics of some protocols, one per row."""
    rows = summary_rows(results)
    width = max(len(metric) for _, metric, _ in rows)
    return progress.table(
        ("protocol", "metric".ljust(width), "value"),
        [(name, metric.ljust(width), value) for name, metric, value in rows],
    )


def summary_rows(results: dict[str, Result]) -> list[tuple[str, str, str]]:
    """Returns the main metrics of some protocols: protocol, metric, and value with its unit."""
    return [
        (name, metric, value)
        for name, result in results.items()
        for metric, value in _SUMMARIES[name](result)
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _linear(result: Result) -> Rows:
    name, score = main_score(result)
    scores = {TITLES[name]: score}
    if name == "top1":
        scores["top-5"] = result["top5"]
    baselines = {f"{TITLES[name]}, {label}": result[f"{key}_{name}"] for key, label in _BASELINES}
    scores |= {label: score for label, score in baselines.items() if score is not None}
    return [(label, _percent(score)) for label, score in scores.items()]


def _knn(result: Result) -> Rows:
    name, _ = main_score(result)
    scores = result[f"{name}_by_k"].items()
    return [(f"{TITLES[name]}, k = {k}", _percent(score)) for k, score in scores]


def _finetune(result: Result) -> Rows:
    name, score = main_score(result)
    return [(TITLES[name], _percent(score))]


def _fewshot(result: Result) -> Rows:
    def value(found: Result) -> str:
        interval = found["interval"]
        return f"{_percent(found['top1'])} ± {'-' if interval is None else f'{100 * interval:.1f}'}"

    return [(f"top-1, {n} per class", value(r)) for n, r in result["top1_by_shots"].items()]


def _clustering(result: Result) -> Rows:
    clusterings = {
        "joint_code": "joint code",
        "chosen_segment": "segment chosen without labels",
        "oracle_segment": "best segment by the labels (oracle)",
    }
    scores = [("accuracy", "accuracy", _percent), ("nmi", "NMI", _number)]
    scores += [("adjusted_rand", "adjusted Rand", _number)]
    return [
        (f"{label}: {score}", show(result[key][name]))
        for key, label in clusterings.items()
        for name, score, show in scores
    ]


def _label_free(result: Result) -> Rows:
    metrics = {"rankme": "RankMe", "lidar": "LiDAR", "alpha_req": "α-ReQ"}
    metrics |= {"uniformity": "uniformity", "alignment": "alignment"}
    return [
        (f"{metric} of the {arrays} ({result[arrays]['size']})", _number(result[arrays][key]))
        for arrays in ("features", "embeddings")
        for key, metric in metrics.items()
    ]


def _segments(result: Result) -> Rows:
    def mean(name: str) -> str:
        return _number(result[name]["mean"])

    return [
        (f"usage entropy, at most log K = {result['log_units']:.3f}", mean("usage_entropy")),
        (f"dead units of {result['num_units']}", str(result["dead_units"])),
        ("confidence", mean("confidence")),
        ("mutual information of two segments, in nats", mean("mutual_information")),
        *((f"gap to bound: {k}", _number(v)) for k, v in list(result["gap_to_bound"].items())[:4]),
    ]


def _transfer(result: Result) -> Rows:
    return [
        (f"{spec}: {label} {TITLES[name]}", _percent(score))
        for spec, found in result["by_dataset"].items()
        for protocol, label in (("linear", "linear"), ("knn", "kNN"))
        for name, score in [main_score(found[protocol])]
    ]


_SUMMARIES: dict[str, Callable[[Result], Rows]] = {
    "linear": _linear,
    "knn": _knn,
    "fewshot": _fewshot,
    "retrieval": lambda result: [("mAP", _percent(result["map"]))],
    "clustering": _clustering,
    "label_free": _label_free,
    "segments": _segments,
    "semi": lambda result: [
        (f"top-1, {share} of the labels", _percent(found["top1"]))
        for share, found in result["by_share"].items()
    ],
    "finetune": _finetune,
    "transfer": _transfer,
}
