"""Classification from a few labeled samples per class."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import scipy  # which imports its modules when they are used
from threadpoolctl import threadpool_limits

from music_jax.metrics.knn import check_samples, unit_length


def mean_interval(
    values: Sequence[float] | np.ndarray, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Returns the mean of independent values with its Student-t confidence interval.

    Args:
      values: Values, [draws].
      confidence: Probability that the interval contains the true mean, in (0, 1).

    Returns:
      The mean and the interval's half-width, which is NaN for a single value.

    Raises:
      ValueError: There are no values.

    Example:
      >>> from music_jax.metrics.few_shot import mean_interval
      >>> mean, half = mean_interval([0.9, 0.92, 0.94])
      >>> f"{mean:.3f} ± {half:.3f}"
      '0.920 ± 0.050'
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"expected values [draws], at least one; got shape {x.shape}")
    if len(x) == 1:
        return float(x[0]), float("nan")
    quantile = scipy.special.stdtrit(len(x) - 1, (1 + confidence) / 2)
    return float(x.mean()), float(quantile * x.std(ddof=1) / np.sqrt(len(x)))


def few_shot(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    shots: int,
    draws: int = 20,
    seed: int = 0,
    after_draw: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Evaluates logistic regression on a few samples per class, over several random draws.

    Features are scaled to unit length. The classifier is scikit-learn's, with an L2 penalty whose
    inverse strength C is the number of drawn samples. If only one class was drawn, it predicts that
    class.

    Args:
      train_features: Features that the samples are drawn from, [train, features].
      train_labels: Training labels, integers [train].
      test_features: Test features, [test, features].
      test_labels: Test labels, integers [test].
      shots: Number of samples drawn per class, without replacement; all of a smaller class.
      draws: Number of draws.
      seed: Seed of the draws. Draw `i` takes the same samples whatever the features are.
      after_draw: Function called after each draw, such as the update of a progress bar.

    Returns:
      The accuracies on the whole test set, float64 [draws]; see `mean_interval`.

    Raises:
      ValueError: The shapes do not match.
    """
    # Imported here because scikit-learn takes seconds to import.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    check_samples(training=(train_features, train_labels), test=(test_features, test_labels))
    train, test = (unit_length(x, np.float64) for x in (train_features, test_features))
    accuracies = np.empty(draws)
    for draw in range(draws):
        rows = draw_shots(train_labels, shots, seed=seed, draw=draw)
        drawn, labels, tested = train[rows], train_labels[rows], test
        if np.all(labels == labels[0]):  # scikit-learn rejects a single class
            predictions = np.full(len(test), labels[0])
        else:
            if drawn.shape[0] < drawn.shape[1]:
                # An L2-penalized kernel lies in the span of the samples: solve the problem there.
                basis, _ = np.linalg.qr(drawn.T)  # [features, drawn]
                drawn, tested = drawn @ basis, test @ basis
            # For so little data, several threads would mostly wait for each other.
            with threadpool_limits(1), warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                classifier = LogisticRegression(C=len(rows), max_iter=1000, tol=1e-5)
                predictions = classifier.fit(drawn, labels).predict(tested)
        accuracies[draw] = np.mean(predictions == test_labels)
        after_draw()
    return accuracies


def draw_shots(labels: np.ndarray, shots: int, *, seed: int, draw: int = 0) -> np.ndarray:
    """Draws the same number of samples of each class, without replacement.

    Args:
      labels: Labels, integers [samples].
      shots: Number of samples per class; all of a smaller class.
      seed: Seed of the draws.
      draw: Index of the draw.

    Returns:
      The rows of the samples, ascending.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, draw]))
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[by_class], prepend=labels.min() - 1))
    place = np.arange(len(labels)) - np.repeat(starts, np.diff(starts, append=len(labels)))
    return np.sort(by_class[place < shots])


def stratified_subset(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Draws a fraction of each class, at least one sample of each.

    Args:
      labels: Labels, integers [samples].
      fraction: Fraction of each class, in (0, 1].
      seed: Seed of the draw.

    Returns:
      The rows of the samples, ascending.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 2**33]))
    rows = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        rows.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(rows))
