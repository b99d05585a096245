"""Measures for the pictures of a report: images, segments, units, neighbors, maps, confusions.

Most return values of the page's scripts: JSON values and arrays, by name.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

from music_jax.data.augment import augment_views, view_augmentations
from music_jax.data.pictures import as_pictures, shown_channels
from music_jax.distributed.mesh import Placing
from music_jax.errors import UserError
from music_jax.evaluation.results import Predictions
from music_jax.evaluation.run import Run
from music_jax.metrics.knn import nearest_neighbors, unit_length
from music_jax.metrics.segments import cluster_scores, measure_segments, mutual_information
from music_jax.objectives import joint_probability, segment_probabilities

NEIGHBORS = 8
TOP = 8  # images shown per unit
NO_IMAGE = 65535

_SAMPLE_STREAM = 2**36  # separates the choice of the images from other random numbers
_VIEWED = 6  # images whose augmented views are shown
_PAIRS = 2  # pairs of views of each
_MIN_RATIO = 0.01  # joint probability relative to independence; smaller ones are clipped
_MAX_CLASSES = 40  # in the confusion matrix
_MAX_ERRORS = 12  # in the table of errors
_PERPLEXITY = 30
_MAP_ITERATIONS = 500
_MISTAKES = 12  # images of errors of the probe
_SHUFFLED = 16  # segments that the information shared by chance is measured with

# Each compiles one program in place of several.
_segment_probabilities, _joint_probability = (
    jax.jit(function, static_argnames=("num_segments", "temperature"))
    for function in (segment_probabilities, joint_probability)
)


class Sample(NamedTuple):
    """The images that a report shows, and the outputs of the network for them."""

    source: str
    source_size: int
    indices: np.ndarray  # int64 [images], in the source
    names: list[str]
    labels: np.ndarray  # int32 [images], -1 for none or several classes
    class_names: tuple[str, ...]
    num_classes: int  # 0 for no labels
    pixels: np.ndarray  # uint8 [images, height, width, 1 or 3], pictures of the central squares
    features: np.ndarray  # float32 [images, features]
    embeddings: np.ndarray  # float32 [images, dim]
    view_pairs: np.ndarray  # float32 [some images, 2, dim], embeddings of two training views
    # uint8 [shown, 1 + 2 pairs, height, width, 1 or 3]: a crop, then pairs of augmented views.
    views: np.ndarray


def sample_images(run: Run, num_images: int) -> Sample:
    """Chooses images of a run at random and runs the network on them.

    Args:
      run: Run with its images.
      num_images: Number of images to choose; all, if there are fewer.

    Raises:
      UserError: No image can be decoded, or an output of the network is not finite.
    """
    rng = np.random.Generator(np.random.Philox(key=[0, _SAMPLE_STREAM]))
    chosen = np.sort(rng.permutation(len(run.images))[:num_images])
    source = run.images.subset(chosen)
    extractor = run.extractor("trained", embeddings=True)
    split = run.extract(
        lambda images: extractor(images) | {"pixels": jnp.asarray(_pictures(run, images))},
        source,
        f"images of {source.name}",
    )
    if not len(split):
        raise UserError(f"none of the images of {source.name} can be decoded")
    view_pairs = run.extract_views(
        source,
        num_images=len(split),
        num_views=2,
        description=f"two views of images of {source.name}",
    )["embeddings"]
    embeddings = split.arrays["embeddings"]
    if not all(np.all(np.isfinite(x)) for x in (split.features, embeddings, view_pairs)):
        raise UserError("the network's outputs for the images are not finite")
    return Sample(
        source=source.name,
        source_size=len(run.images),
        indices=chosen[split.indices],
        names=[source.record_name(int(i)) for i in split.indices],
        labels=np.full(len(split), -1, np.int32) if source.multi_label else split.labels,
        class_names=() if source.multi_label else source.class_names,
        num_classes=0 if source.multi_label else source.num_classes,
        pixels=split.arrays["pixels"],
        features=split.features,
        embeddings=embeddings,
        view_pairs=view_pairs,
        views=_augmented_views(run),
    )


def _pictures(run: Run, images: Any) -> np.ndarray:
    """Returns decoded images as pictures."""
    if images.dtype == np.uint8:
        return shown_channels(np.asarray(images))
    return _as_pictures(run, np.asarray(run.normalize(images)))


def _as_pictures(run: Run, normalized: np.ndarray) -> np.ndarray:
    dataset = run.config.dataset
    mean, std = dataset.mean, dataset.std
    return as_pictures(normalized, mean=mean, std=std, pixel_type=dataset.pixel_type)


def _augmented_views(run: Run) -> np.ndarray:
    """Returns crops and training views of a few images as pictures; see `Sample.views`."""
    config, source = run.config, run.images
    placing = Placing(min(_VIEWED, len(source)), run.mesh)
    (batch,) = run.random_crops(source, placing, num_steps=1, num_views=2 * _PAIRS)
    views = view_augmentations(config)
    augment = jax.jit(functools.partial(augment_views, views=views, **run.normalization))
    images, key = batch["images"], jax.random.key(config.seed)
    pictures = [_pictures(run, images[:, :1])]
    for i in range(_PAIRS):  # a program for one pair compiles in less time
        pair = images[:, 2 * i : 2 * i + 2]
        views = augment(pair, batch["sample_index"], jax.random.fold_in(key, i))
        pictures.append(_as_pictures(run, np.asarray(views)))
    return np.concatenate(pictures, axis=1)


def measure_sample_segments(
    sample: Sample, *, num_segments: int, temperature: float
) -> dict[str, Any]:
    """Measures the segments and their units on the images.

    Returns:
      Values by segment, and `order`: the segments, the most informative first about the labels or
      else about the images. `told` is the information of a unit about the image, `information` that
      of a unit about another segment's, and `chance` what two independent segments of these images
      share, all in nats. `top` has the images with the highest probability of a unit among those
      whose most probable unit it is, or `NO_IMAGE`; `certainty` has these probabilities times 255;
      both are [segments, units, images].
    """
    p = np.asarray(
        _segment_probabilities(
            sample.embeddings, num_segments=num_segments, temperature=temperature
        )
    )
    measures, codes, units = measure_segments(p), p.argmax(axis=2), p.shape[2]
    selected = codes[..., None] == np.arange(units)  # [images, segments, units]
    probabilities = np.where(selected, p, -1)
    ranked = np.argsort(-probabilities, axis=0, kind="stable")[:TOP]
    certainty = np.take_along_axis(probabilities, ranked, axis=0)
    top = np.where(certainty >= 0, ranked, NO_IMAGE)
    nmi, labeled = None, sample.labels >= 0
    labels = sample.labels[labeled]
    if len(np.unique(labels)) > 1:
        nmi = [cluster_scores(codes[labeled, s], labels).nmi for s in range(num_segments)]
    order = np.argsort(-(measures.information if nmi is None else np.asarray(nmi)), kind="stable")
    return {
        "count": num_segments,
        "units": units,
        "temperature": temperature,
        "order": order.tolist(),
        "usage": measures.usage.astype(np.float32),
        "counts": selected.sum(axis=0).astype(np.uint16),
        "codes": codes.astype(np.uint8 if units <= 256 else np.uint16),
        "top": np.moveaxis(top, 0, -1).astype(np.uint16),
        "certainty": np.moveaxis(np.round(255 * certainty.clip(0)), 0, -1).astype(np.uint8),
        "labelNmi": nmi,
        "entropy": measures.usage_entropy.tolist(),
        "confidence": measures.confidence.tolist(),
        "told": np.maximum(measures.information, 0).tolist(),
        "information": measures.mutual_information.astype(np.float32),
        "chance": _chance_information(p),
    }


def _chance_information(p: np.ndarray) -> float:
    """Returns the mean information that segments share after each was shuffled over the images."""
    rng = np.random.Generator(np.random.Philox(key=[1, _SAMPLE_STREAM]))
    shuffled = np.stack([rng.permutation(segment) for segment in p[:, :_SHUFFLED].swapaxes(0, 1)])
    shared = mutual_information(shuffled.swapaxes(0, 1))
    return float(shared[~np.eye(len(shared), dtype=bool)].mean()) if len(shared) > 1 else 0.0


def joint_ratios(sample: Sample, segments: dict[str, Any], *, max_side: int) -> dict[str, Any]:
    """Returns the ratio of the joint probability of the units of two views to independence.

    Args:
      sample: Images.
      segments: Result of `measure_sample_segments`.
      max_side: Largest side of the matrix; some segments are excluded if there are more units.

    Returns:
      The segments `shown`, ascending; the `levels` of the ratios of their units, uint8
      [units, units], from 0 for `10 ** low` or less to 255 for `10 ** high` or more; and the number
      of `pairs` of views.
    """
    units, count = segments["units"], len(sample.view_pairs)
    shown = np.sort(segments["order"][: max(max_side // units, 2)])
    pairs = sample.view_pairs.reshape(count, 2, segments["count"], units)[:, :, shown]
    p = _joint_probability(
        *pairs.reshape(count, 2, -1).swapaxes(0, 1),
        num_segments=len(shown),
        temperature=segments["temperature"],
    )
    low, high = math.log10(_MIN_RATIO), math.log10(units)
    ratio = np.log10(np.maximum(np.asarray(p, np.float64) * units**2, _MIN_RATIO))
    levels = np.round(255 * np.clip((ratio - low) / (high - low), 0, 1)).astype(np.uint8)
    return {"shown": shown.tolist(), "levels": levels, "low": low, "high": high, "pairs": count}


def neighbors(features: np.ndarray) -> dict[str, Any]:
    """Finds each image's nearest other images by cosine similarity.

    Returns:
      Their `rows`, and `similarity` times 1000, both [images, neighbors].
    """
    k = min(NEIGHBORS, len(features) - 1)
    similarities, rows = nearest_neighbors(features, features, k=k + 1)
    others = rows != np.arange(len(rows))[:, None]
    others[others.all(axis=1), -1] = False  # duplicates of the image have displaced it
    rows, similarities = (x[others].reshape(len(rows), k) for x in (rows, similarities))
    similarity = np.round(1000 * similarities).astype(np.int16)
    return {"rows": rows.astype(np.uint16), "similarity": similarity}


def tsne_map(vectors: np.ndarray) -> np.ndarray | None:
    """Places vectors in the plane by t-SNE of their cosine similarity.

    Returns:
      float32 [images, 2] in [0, 1]; None for too few vectors, or vectors that are all the same.
    """
    from sklearn.manifold import TSNE

    unit = unit_length(vectors)
    if len(unit) < 5 or unit.shape[1] < 2 or not np.any(np.std(unit, axis=0) > 1e-4):
        return None
    perplexity = min(_PERPLEXITY, (len(unit) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, max_iter=_MAP_ITERATIONS, random_state=0)
    # Each iteration is so short that a second thread waits longer than it computes.
    with threadpoolctl.threadpool_limits(1, "openmp"):
        placed = tsne.fit_transform(unit)
    placed = placed - placed.min(axis=0)
    return placed / np.maximum(placed.max(), 1e-9)


class Confusion(NamedTuple):
    """Predictions of the probe by class."""

    names: list[str]  # of the rows and columns; the last may stand for all other classes
    counts: np.ndarray  # int [classes, predicted classes]
    errors: list[tuple[str, str, int, int]]  # class, prediction, images, images of the class
    num_others: int  # classes in the last row and column


def count_confusions(found: Predictions, class_names: list[str]) -> Confusion:
    """Counts the probe's predictions by class."""
    both = np.stack([found.labels, found.predictions])
    size = int(both.max()) + 1
    # Labels can be huge in a damaged file: of many classes, only those that occur.
    classes = np.arange(size) if size <= _MAX_CLASSES else np.unique(both)
    labels, predictions = ranks = np.searchsorted(classes, both)
    names = [class_names[i] if i < len(class_names) else str(i) for i in classes.tolist()]
    totals = np.bincount(labels, minlength=len(classes))
    wrong = labels != predictions
    cells, times = np.unique(labels[wrong] * len(classes) + predictions[wrong], return_counts=True)
    errors = []
    for cell in np.argsort(-times, kind="stable")[:_MAX_ERRORS]:
        i, j = divmod(int(cells[cell]), len(classes))
        errors.append((names[i], names[j], int(times[cell]), int(totals[i])))
    num_others = max(len(classes) - _MAX_CLASSES, 0)
    if num_others:
        mistaken = np.bincount(ranks[:, wrong].ravel(), minlength=len(classes))
        kept = np.sort(np.argsort(-mistaken, kind="stable")[:_MAX_CLASSES])
        place = np.full(len(classes), _MAX_CLASSES)
        place[kept] = np.arange(_MAX_CLASSES)
        labels, predictions = place[ranks]
        names = [names[i] for i in kept] + [f"{num_others} others"]
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return Confusion(names, counts, errors, num_others)


def predictions_of(sample: Sample, found: Predictions | None) -> np.ndarray:
    """Returns the probe's prediction for each image, int32; -1 for none.

    If a label differs, the probe was tested on other images, and there are no predictions.
    """
    known: dict[int, tuple[int, int]] = {}
    if found is not None:
        outcomes = zip(found.labels.tolist(), found.predictions.tolist(), strict=True)
        known = dict(zip(found.indices.tolist(), outcomes, strict=True))
    own = zip(sample.indices.tolist(), sample.labels.tolist(), strict=True)
    labels, predictions = np.asarray([known.get(i, (y, -1)) for i, y in own], np.int32).T
    return predictions if np.array_equal(labels, sample.labels) else np.full_like(labels, -1)


class Mistakes(NamedTuple):
    """Images that the probe takes for another class, the most confident errors first."""

    names: list[str]
    labels: np.ndarray  # [images]
    predictions: np.ndarray  # [images]
    confidences: np.ndarray | None  # [images], None if unknown
    pixels: np.ndarray  # uint8 [images, height, width, 1 or 3]


def mistaken_images(run: Run, found: Predictions) -> Mistakes | None:
    """Reads the images of the probe's most confident errors, or of its first without confidences.

    Returns:
      The images; None if there are no errors, or the images are not those of the predictions.
    """
    wrong = np.flatnonzero(found.labels != found.predictions)
    if found.confidences is not None:
        wrong = wrong[np.argsort(-found.confidences[wrong], kind="stable")]
    wrong = wrong[:_MISTAKES]
    if not len(wrong) or found.indices[wrong].max() >= len(run.images):
        return None
    source = run.images.subset(found.indices[wrong])
    split = run.extract(
        lambda images: {"pixels": jnp.asarray(_pictures(run, images))},
        source,
        f"errors of the probe on {source.name}",
    )
    wrong = wrong[split.indices]
    if (
        not len(wrong)
        or source.multi_label
        or not np.array_equal(split.labels, found.labels[wrong])
    ):
        return None
    return Mistakes(
        names=[source.record_name(int(i)) for i in split.indices],
        labels=found.labels[wrong],
        predictions=found.predictions[wrong],
        confidences=None if found.confidences is None else found.confidences[wrong],
        pixels=split.arrays["pixels"],
    )
