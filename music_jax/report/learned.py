"""What a run has learned: scores beside their baselines, and verdicts on its embedding."""

import math
from typing import Any, NamedTuple

import numpy as np
import scipy  # which imports its modules when they are used

from music_jax.evaluation.results import MEAN_AVERAGE_PRECISION, TITLES
from music_jax.metrics.knn import unit_length
from music_jax.report.measures import Sample
from music_jax.report.reading import RecordedRun, as_number

_FEATURES = {  # by the prefix of their scores
    "": "trained backbone",
    "random_init_": "random backbone",
    "raw_pixels_": "raw pixels",
}
_COLLAPSE = {"good": "No collapse", "fair": "Partial collapse", "bad": "Collapse"}
_FEW_STEPS = 500  # fewer may not have left the initial state
_REDUNDANCY = {"good": "Little redundancy", "fair": "Some redundancy", "bad": "High redundancy"}


class Verdict(NamedTuple):
    """A verdict on a run, and how to read the number behind it."""

    level: str  # "good", "fair", "bad" or "unknown"
    text: str
    reading: str
    value: float | None = None  # the number as a share of its range


def verdicts(
    run: RecordedRun, sample: Sample | None, segments: dict[str, Any] | None
) -> tuple[Verdict, Verdict]:
    """Judges the collapse and the redundancy of a run.

    Args:
      run: Records of the run.
      sample: Its images, if there are any.
      segments: Result of `measures.measure_sample_segments`, if it has segments.
    """
    if sample is None or len(sample.indices) < 2:
        collapse = _logged_collapse(run)
        reading = "It is measured on several images, with a checkpoint."
        redundancy = Verdict("unknown", "Redundancy is not measured", reading)
    elif segments is None:
        collapse, redundancy = _judge_embeddings(sample.embeddings)
    else:
        collapse, redundancy = _judge_segments(segments, len(sample.indices))
    if collapse.level == "bad" and 0 < run.last_step < _FEW_STEPS:
        more = f"After {run.last_step} steps these look alike: train for more epochs first."
        collapse = collapse._replace(
            text="Collapsed, or hardly trained", reading=f"{collapse.reading} {more}"
        )
    return collapse, redundancy


def _judge_segments(segments: dict[str, Any], num_images: int) -> tuple[Verdict, Verdict]:
    count, units = segments["count"], segments["units"]
    told, most = np.asarray(segments["told"]), math.log(min(units, num_images))
    share = float(told.mean()) / max(most, 1e-9)
    idle = int(np.sum(told < 0.1 * most))
    level = _level(1 - share, 0.5, 0.9)
    level = "fair" if level == "good" and idle else level
    reading = (
        f"The unit of a segment tells {told.mean():.2f} nats about the image, on average over "
        f"{count} segments; 0 after a collapse, {most:.2f} at the optimum."
    )
    if idle:
        reading += f" {idle} of the segments tell less than a tenth of that."
    collapse = Verdict(level, _COLLAPSE[level], reading, share)
    if level == "bad" or count == 1:
        reason = "There is one segment." if count == 1 else "Collapsed segments share nothing."
        return collapse, Verdict("unknown", "No verdict on redundancy", reason)
    shared, chance = np.asarray(segments["information"], np.float64), segments["chance"]
    pairs, copies = shared[~np.eye(count, dtype=bool)].mean(), np.diagonal(shared).mean()
    share = float(np.clip((pairs - chance) / max(copies - chance, 1e-9), 0, 1))
    level = _level(share, 0.1, 0.5)
    return collapse, Verdict(
        level,
        _REDUNDANCY[level],
        f"Two segments share {pairs:.2f} nats on average; 0 at the optimum, where they are "
        f"independent ({chance:.2f} by chance with {num_images:,} images), {copies:.2f} if all "
        "were copies of one.",
        share,
    )


def _judge_embeddings(embeddings: np.ndarray) -> tuple[Verdict, Verdict]:
    """Judges embeddings without segments; see `train.guards.embedding_statistics`."""
    count, dim = embeddings.shape
    unit = unit_length(embeddings)
    centered = unit - unit.mean(axis=0, dtype=np.float64).astype(np.float32)
    spread = float(np.mean(centered.std(axis=0)) * math.sqrt(dim))
    found = f"The spread of the embeddings is {spread:.2f}"
    collapse = _spread_verdict(spread, found, "1 if they point in all directions")
    if collapse.level == "bad" or min(dim, count - 1) < 2:
        reason = "Redundancy needs several dimensions in which images differ."
        return collapse, Verdict("unknown", "No verdict on redundancy", reason)
    gram = centered @ centered.T if count < dim else centered.T @ centered
    rank = float(np.trace(gram) ** 2 / np.sum(gram**2, dtype=np.float64))
    # That of as many normal vectors: E tr(C)² / E tr(C²) of a Wishart matrix C.
    most = ((count - 1) * dim + 2) / (count + dim)
    share = float(np.clip((most - rank) / (most - 1), 0, 1))
    level = _level(share, 0.5, 0.9)
    return collapse, Verdict(
        level,
        _REDUNDANCY[level],
        f"The embeddings vary in {rank:.1f} of {dim:,} dimensions (their effective rank); 1 if all "
        f"dimensions were copies of one, about {most:,.0f} with {count:,} images if all dimensions "
        "were independent.",
        share,
    )


def _logged_collapse(run: RecordedRun) -> Verdict:
    record = run.metrics[-1] if run.metrics else {}
    for name, title, best in (
        ("usage_entropy", "usage entropy", "1 at the optimum, for equal use of all units"),
        ("embedding_std", "spread of the embeddings", "1 if they point in all directions"),
    ):
        value = as_number(record.get(name))
        if value is not None:
            step = f"At the last logged step, the {title} was {value:.2f}"
            verdict = _spread_verdict(value, step, best)
            if name == "usage_entropy" and verdict.level == "good":
                more = "If all units were equally probable for every image, it would be 1 as well."
                reading = f"{verdict.reading} {more}"
                return Verdict("unknown", "No collapse to a few units", reading)
            return verdict
    reading = "The log has no statistics of the embeddings (config.guards)."
    return Verdict("unknown", "Collapse is not measured", reading)


def _spread_verdict(value: float, found: str, best: str) -> Verdict:
    level = _level(1 - value, 0.5, 0.9)
    return Verdict(level, _COLLAPSE[level], f"{found}; 0 after a collapse, {best}.", value)


def _level(share: float, fair: float, bad: float) -> str:
    """Returns the level of a share that is 0 at the optimum and 1 in the worst case."""
    return "good" if share <= fair else "fair" if share <= bad else "bad"


def score_columns(runs: list[RecordedRun]) -> list[tuple[str, str, str]]:
    """Returns the columns of the table of scores: title, protocol, and key of its result."""
    top1 = [("linear", "linear", "top1"), ("linear", "linear", "top5"), ("kNN", "knn", "top1")]
    several = [(title, protocol, MEAN_AVERAGE_PRECISION) for title, protocol, _ in top1[::2]]
    results = [run.results.get(protocol) for run in runs for protocol in ("linear", "knn")]
    found = [MEAN_AVERAGE_PRECISION in result for result in results if result is not None]
    columns = top1 * (not all(found) or not found) + several * any(found)
    return [(f"{title} {TITLES[key]}, %", protocol, key) for title, protocol, key in columns]


def scores(runs: list[RecordedRun]) -> list[tuple[int, str, list[float | None]]]:
    """Returns the scores of each run, of its random backbone, of raw pixels and of chance.

    Returns:
      Run, name, and the scores in `score_columns`, in [0, 1] or None.
    """
    columns = score_columns(runs)
    found = []
    for i, run in enumerate(runs):
        for prefix, name in _FEATURES.items():
            results = [(run.results.get(protocol, {}), key) for _, protocol, key in columns]
            values = [as_number(result.get(f"{prefix}{key}")) for result, key in results]
            if any(value is not None for value in values):
                found.append((i, name, values))
        values = [_chance(run, key) for _, _, key in columns]
        if any(value is not None for value in values):
            found.append((i, "chance", values))
    return found


def _chance(run: RecordedRun, key: str) -> float | None:
    linear = run.results.get("linear", {})
    if key == MEAN_AVERAGE_PRECISION:
        return as_number(linear.get(f"chance_{key}"))
    classes = linear.get("num_classes")  # which earlier versions did not write
    if type(classes) is not int or classes < 1 or MEAN_AVERAGE_PRECISION in linear:
        return None
    return min(1.0, (5 if key == "top5" else 1) / classes)


def main_score(run: RecordedRun, protocol: str, prefix: str = "") -> float | None:
    """Returns a protocol's main score in [0, 1], of the features of a prefix; None if unknown."""
    result = run.results.get(protocol, {})
    key = MEAN_AVERAGE_PRECISION if MEAN_AVERAGE_PRECISION in result else "top1"
    return as_number(result.get(f"{prefix}{key}"))


def accuracy(run: RecordedRun) -> str:
    """Describes the linear probe's score: its interval, and its distance to the baselines."""
    score = main_score(run, "linear")
    if score is None:
        return ""
    text = f"The linear probe on the trained backbone reaches {100 * score:.1f} %"
    if count := num_test(run):
        test = scipy.stats.binomtest(round(score * count), count)
        low, high = test.proportion_ci(method="wilson")
        text += f" of {count:,} test images (95 % Wilson interval {100 * low:.1f} to "
        text += f"{100 * high:.1f} %)"
    gains = [
        f"{points(score - baseline)} points compared with {name}"
        for prefix, name in (("random_init_", "the random backbone"), ("raw_pixels_", "raw pixels"))
        if (baseline := main_score(run, "linear", prefix)) is not None
    ]
    return f"{'; '.join([text, *gains])}."


def points(share: float) -> str:
    """Formats a difference in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def num_test(run: RecordedRun) -> int | None:
    """Returns the number of test images behind a top-1 accuracy."""
    linear = run.results.get("linear", {})
    count = linear.get("num_test")
    known = type(count) is int and 0 < count < 2**31 and as_number(linear.get("top1")) is not None
    return count if known else None
