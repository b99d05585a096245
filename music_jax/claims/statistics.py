"""Statistics of comparisons: paired differences, equivalence, and corrections for their number."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

Values = Sequence[float] | np.ndarray

_CONFIDENCE = 0.95  # probability that an interval contains the true difference
_EQUAL = 1e-9  # differences of accuracies that differ by less are rounding errors


class Difference(NamedTuple):
    """The mean difference of paired values, with an interval and a p-value."""

    mean: float
    low: float
    high: float
    p: float


def paired_difference(
    a: Values, b: Values, *, confidence: float = _CONFIDENCE
) -> Difference | None:
    """Compares paired values by Student's t-test.

    Args:
      a: Values, [pairs].
      b: Values of the same seeds in the same order, [pairs].
      confidence: Probability that the interval contains the true difference.

    Returns:
      The mean of a - b, its interval, and the two-sided p-value; None for fewer than two pairs, or
      if all differences are equal, which gives no estimate of their spread.

    Raises:
      ValueError: The numbers of values differ.
    """
    differences = _differences(a, b)
    if len(differences) < 2 or np.ptp(differences) < _EQUAL:
        return None
    test = scipy.stats.ttest_1samp(differences, 0.0)
    low, high = map(float, test.confidence_interval(confidence))
    return Difference(float(differences.mean()), low, high, float(test.pvalue))


def equivalence(a: Values, b: Values, *, margin: float) -> Difference | None:
    """Tests by two one-sided t-tests (TOST) whether paired values differ by less than a margin.

    Returns:
      The mean of a - b, its 90 % interval, which lies within the margin if p < 0.05, and the
      larger p-value of the two tests; None where `paired_difference` is.

    Raises:
      ValueError: The numbers of values differ.

    Reference:
      Schuirmann, A comparison of the two one-sided tests procedure, 1987
    """
    found = paired_difference(a, b, confidence=0.9)
    if found is None:
        return None
    differences = _differences(a, b)
    above = scipy.stats.ttest_1samp(differences, -margin, alternative="greater")
    below = scipy.stats.ttest_1samp(differences, margin, alternative="less")
    return found._replace(p=float(max(above.pvalue, below.pvalue)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for their number by Holm's step-down method.

    Example:
      >>> from music_jax.claims.statistics import holm
      >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
      [0.03, 0.06, 0.06]

    Reference:
      Holm, A simple sequentially rejective multiple test procedure, 1979
    """
    count, largest = len(p_values), 0.0
    adjusted = [0.0] * count
    for rank, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def crossed_bootstrap(
    correct_a: np.ndarray, correct_b: np.ndarray, *, samples: int
) -> tuple[float, float]:
    """Returns a 95 % interval of the difference of two accuracies over seeds and test images.

    Each bootstrap sample draws seeds and images with replacement, independently of each other; both
    methods get the same ones. The interval is that of the percentiles, which is too narrow if there
    are few seeds: of three, one in 27 samples is the lowest alone.

    Args:
      correct_a: Whether each prediction of one method is correct, bool [seeds, images].
      correct_b: Those of the other method, for the same seeds and images.
      samples: Number of bootstrap samples.

    Raises:
      ValueError: The shapes differ.

    Reference:
      Owen, The pigeonhole bootstrap, 2007
    """
    if correct_a.shape != correct_b.shape or correct_a.ndim != 2:
        raise ValueError(
            f"expected two arrays [seeds, images]; got {correct_a.shape} and {correct_b.shape}"
        )
    difference = correct_a.astype(np.float32) - correct_b.astype(np.float32)
    seeds, images = difference.shape
    rng = np.random.Generator(np.random.Philox(key=0))
    means = np.empty(samples)
    for i in range(samples):
        by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds)) / seeds
        by_image = np.bincount(rng.integers(images, size=images), minlength=images) / images
        means[i] = by_seed @ (difference @ by_image.astype(np.float32))
    low, high = np.quantile(means, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


def _differences(a: Values, b: Values) -> np.ndarray:
    if len(a) != len(b):
        raise ValueError(f"expected pairs of values; got {len(a)} and {len(b)}")
    return np.asarray(a, np.float64) - np.asarray(b, np.float64)
