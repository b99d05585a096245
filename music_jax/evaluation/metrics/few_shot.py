"""Classification after a few labeled samples of each class."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from music_jax.evaluation.metrics.knn import unit_length
from music_jax.evaluation.metrics.statistics import Interval, mean_interval


class FewShotResult(NamedTuple):
    """What some labeled samples a class are enough for.

    Attributes:
      shots: labeled samples a class.
      top1: mean accuracy over the draws and its 95 % interval.
      accuracies: of each draw, [draws].
    """

    shots: int
    top1: Interval
    accuracies: np.ndarray


def few_shot(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    shots: int,
    draws: int = 20,
    inverse_regularization: float = 1.0,
    seed: int = 0,
    after_draw: Callable[[], None] = lambda: None,
) -> FewShotResult:
    """Logistic regression on a few samples a class, over several draws of them.

    Features are scaled to unit length. The classifier is scikit-learn's, with an L2 penalty; where
    only one class was drawn, it predicts that class.

    Args:
      train_features: what the samples are drawn from, [train, features].
      train_labels: integers [train].
      test_features: [test, features].
      test_labels: integers [test].
      shots: samples drawn of each class, without replacement; all of a class that has fewer.
      draws: how many draws.
      inverse_regularization: scikit-learn's C, times the number of samples drawn.
      seed: of the draws; draw `i` takes the same samples whatever the features.
      after_draw: called after each draw, such as to move a progress bar.

    Returns:
      The accuracies over the whole test set.

    Raises:
      ValueError: features and labels do not fit together.
    """
    # Not above: scikit-learn takes seconds to import.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(train_features) != len(train_labels) or len(test_features) != len(test_labels):
        raise ValueError(
            f"expected a label for each sample; got {len(train_features)} training features and "
            f"{len(train_labels)} labels, {len(test_features)} test features and "
            f"{len(test_labels)} labels"
        )
    train, test = (unit_length(x, np.float64) for x in (train_features, test_features))
    accuracies = np.empty(draws)
    for draw in range(draws):
        rows = draw_shots(train_labels, shots, seed=seed, draw=draw)
        classifier = LogisticRegression(
            C=inverse_regularization * len(rows), max_iter=1000, tol=1e-5
        )
        labels = train_labels[rows]
        if np.all(labels == labels[0]):  # which scikit-learn refuses
            accuracies[draw] = np.mean(test_labels == labels[0])
            after_draw()
            continue
        drawn, tested = _in_span(train[rows], test)
        # On so little data, threads would wait for one another most of the time.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(drawn, labels)
        accuracies[draw] = np.mean(classifier.predict(tested) == test_labels)
        after_draw()
    return FewShotResult(shots, mean_interval(accuracies), accuracies)


def draw_shots(labels: np.ndarray, shots: int, *, seed: int, draw: int = 0) -> np.ndarray:
    """Rows of some samples of each class, drawn at random without replacement.

    Args:
      labels: integers [samples].
      shots: samples of each class; all of a class that has fewer.
      seed: of the draws.
      draw: which of them.

    Returns:
      The rows, ascending.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, draw]))
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[by_class], prepend=labels.min() - 1))
    place = np.arange(len(labels)) - np.repeat(starts, np.diff(starts, append=len(labels)))
    return np.sort(by_class[place < shots])


def stratified_subset(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Rows of a share of each class, at least one of each, drawn at random.

    Args:
      labels: integers [samples].
      fraction: of each class, in (0, 1].
      seed: of the draw.

    Returns:
      The rows, ascending.

    Raises:
      ValueError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"expected a fraction in (0, 1]; got {fraction}")
    rng = np.random.Generator(np.random.Philox(key=[seed, 2**33]))
    rows = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        rows.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(rows))


def _in_span(drawn: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in the span of the drawn samples, in which an L2-penalized kernel lies anyway."""
    if drawn.shape[0] >= drawn.shape[1]:
        return drawn, test
    basis, _ = np.linalg.qr(drawn.T)  # [features, drawn]
    return drawn @ basis, test @ basis
