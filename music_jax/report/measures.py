"""What a report shows of the images: segments, units, neighbors, maps and confusions."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from music_jax.evaluation.results import Predictions
from music_jax.metrics.knn import nearest_neighbors, unit_length
from music_jax.metrics.segments import SegmentMeasures, cluster_scores, measure_segments
from music_jax.objectives import joint_probability, segment_probabilities
from music_jax.report.images import Seen

NEIGHBORS = 8
TOP = 8  # images shown of each unit
NOBODY = 65535  # where there is no image

_LEAST_RATIO = 0.01  # of a joint probability to what independence gives, that is shown
_MAX_CONFUSED = 40  # classes in the matrix; the others are put together
_MAX_PAIRS = 12
_PERPLEXITY = 30


class Segments(NamedTuple):
    """What the segments do with the images.

    Attributes:
      measures: use of the units and information, over all images.
      codes: the most probable unit, int [images, segments].
      top: rows of the images most certain of each unit, [segments, units, TOP], `NOBODY` where
        there are fewer whose most probable unit it is.
      certainty: their probabilities, [segments, units, TOP].
      counts: images whose most probable unit it is, [segments, units].
      label_nmi: normalized mutual information with the labels, [segments]; None without labels.
      order: the segments, the one that says the most first.
    """

    measures: SegmentMeasures
    codes: np.ndarray
    top: np.ndarray
    certainty: np.ndarray
    counts: np.ndarray
    label_nmi: np.ndarray | None
    order: np.ndarray


def segments(seen: Seen, *, num_segments: int, temperature: float) -> Segments:
    """Measures the segments on the images."""
    p = np.asarray(
        segment_probabilities(
            jnp.asarray(seen.embeddings), num_segments=num_segments, temperature=temperature
        )
    )
    measures, codes = measure_segments(p), p.argmax(axis=2)
    units = p.shape[2]
    top = np.full((num_segments, units, TOP), NOBODY, np.uint16)
    certainty = np.zeros((num_segments, units, TOP), np.float32)
    counts = np.zeros((num_segments, units), np.uint16)
    for s in range(num_segments):
        for k in range(units):
            members = np.flatnonzero(codes[:, s] == k)
            best = members[np.argsort(-p[members, s, k], kind="stable")][:TOP]
            counts[s, k] = len(members)
            top[s, k, : len(best)] = best
            certainty[s, k, : len(best)] = p[best, s, k]
    nmi, labeled = None, np.flatnonzero(seen.labels >= 0)
    if len(np.unique(seen.labels[labeled])) > 1:
        labels = seen.labels[labeled]
        scores = [cluster_scores(codes[labeled, s], labels) for s in range(num_segments)]
        nmi = np.asarray([score.nmi for score in scores])
    says = measures.information if nmi is None else nmi
    return Segments(measures, codes, top, certainty, counts, nmi, np.argsort(-says, kind="stable"))


class Joint(NamedTuple):
    """The joint probability of units of two views, as ratio to what independence gives, on a scale.

    Attributes:
      shown: the segments in it, ascending.
      levels: uint8 [shown * units, shown * units]; 0 is the ratio `10 ** low`, 255 `10 ** high`.
      low: of the scale, or less.
      high: of the scale, or more.
    """

    shown: np.ndarray
    levels: np.ndarray
    low: float
    high: float


def joint(
    seen: Seen, order: np.ndarray, *, num_segments: int, temperature: float, largest: int
) -> Joint:
    """The matrix over pairs of views of the images.

    Args:
      seen: the images.
      order: the segments, those to keep first.
      num_segments: how many there are.
      temperature: of the softmax.
      largest: side of the matrix; if there are more units, some of the segments are left out.
    """
    units = seen.pair.shape[2] // num_segments
    shown = np.sort(order[: max(largest // units, 2)])
    pair = seen.pair.reshape(len(seen.pair), 2, num_segments, units)[:, :, shown]
    pair = pair.reshape(len(pair), 2, -1)
    p = np.asarray(
        joint_probability(
            jnp.asarray(pair[:, 0]),
            jnp.asarray(pair[:, 1]),
            num_segments=len(shown),
            temperature=temperature,
        ),
        np.float64,
    )
    low, high = math.log10(_LEAST_RATIO), math.log10(units)
    ratio = np.log10(np.maximum(p * units**2, _LEAST_RATIO))
    levels = np.round(255 * np.clip((ratio - low) / (high - low), 0, 1))
    return Joint(shown, levels.astype(np.uint8), low, high)


def neighbors(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest other images of each, by cosine similarity: rows and similarities [images, k]."""
    k = min(NEIGHBORS, len(features) - 1)
    if k < 1:
        return np.zeros((len(features), 0), np.int32), np.zeros((len(features), 0), np.float32)
    similarities, rows = nearest_neighbors(features, features, k=k + 1)
    others = rows != np.arange(len(rows))[:, None]
    others[others.all(axis=1), -1] = False  # one of its own doubles stands in its place
    shape = (len(rows), k)
    return rows[others].reshape(shape), similarities[others].reshape(shape)


def flat_map(vectors: np.ndarray) -> np.ndarray | None:
    """A t-SNE map, float64 [images, 2] in [0, 1]; None where there is nothing to spread out.

    Vectors of unit length, of which the 50 first principal components are taken.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit = unit_length(vectors)
    if len(unit) < 5 or not np.any(np.std(unit, axis=0) > 1e-4):
        return None
    size = min(50, len(unit) - 1, unit.shape[1])
    reduced = PCA(size, random_state=0).fit_transform(unit)
    placed = TSNE(
        init=1e-4 * reduced[:, :2] / np.std(reduced[:, 0]) if size > 1 else "random",
        perplexity=min(_PERPLEXITY, (len(unit) - 1) / 3),
        random_state=0,
    ).fit_transform(reduced.astype(np.float32))
    placed = placed - placed.min(axis=0)
    return placed / np.maximum(placed.max(), 1e-9)


@dataclasses.dataclass(frozen=True)
class Confusion:
    """What the probe took for what.

    Attributes:
      names: of the rows and columns; the last may put all other classes together.
      counts: images of a row's class that were taken for a column's, int [rows, columns].
      pairs: the most frequent errors: class, taken for, images, of so many.
      left_out: how many classes are put together.
    """

    names: list[str]
    counts: np.ndarray
    pairs: list[tuple[str, str, int, int]]
    left_out: int


def confusion(found: Predictions, class_names: list[str]) -> Confusion:
    """Counts the probe's predictions by class."""
    size = int(max(found.labels.max(), found.predictions.max())) + 1
    # Of many classes only those that occur: their number is that of the images at most.
    both = np.stack([found.labels, found.predictions])
    classes = np.arange(size) if size <= _MAX_CONFUSED else np.unique(both)
    labels, predictions = np.searchsorted(classes, both)
    names = [class_names[i] if i < len(class_names) else str(i) for i in classes.tolist()]
    totals = np.bincount(labels, minlength=len(classes))
    wrong = labels != predictions
    cells, times = np.unique(labels[wrong] * len(classes) + predictions[wrong], return_counts=True)
    pairs = []
    for cell in np.argsort(-times, kind="stable")[:_MAX_PAIRS]:
        i, j = divmod(int(cells[cell]), len(classes))
        pairs.append((names[i], names[j], int(times[cell]), int(totals[i])))
    left_out = max(len(classes) - _MAX_CONFUSED, 0)
    if left_out:
        mistaken = np.concatenate([labels[wrong], predictions[wrong]])
        errors = np.bincount(mistaken, minlength=len(classes))
        kept = np.sort(np.argsort(-errors, kind="stable")[:_MAX_CONFUSED])
        place = np.full(len(classes), _MAX_CONFUSED)
        place[kept] = np.arange(_MAX_CONFUSED)
        labels, predictions = place[labels], place[predictions]
        names = [names[i] for i in kept] + [f"{left_out} others"]
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return Confusion(names, counts, pairs, left_out)


def predicted(found: Predictions | None, indices: np.ndarray) -> np.ndarray:
    """The probe's prediction of each image by its index, int32; -1 where there is none."""
    if found is None:
        return np.full(len(indices), -1, np.int32)
    pairs = zip(found.indices.tolist(), found.predictions.tolist(), strict=True)
    known: dict[Any, Any] = dict(pairs)
    return np.asarray([known.get(index, -1) for index in indices.tolist()], np.int32)
