"""Means with intervals, over draws or seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special


class Interval(NamedTuple):
    """A mean and the half-width of its confidence interval, `mean ± half_width`."""

    mean: float
    half_width: float


def mean_interval(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """The mean of independent values and its Student-t confidence interval.

    Args:
      values: [draws].
      confidence: that the true mean lies in the interval, in (0, 1).

    Returns:
      The mean and the interval's half-width, NaN for a single value.

    Raises:
      ValueError: there are no values.

    Example:
      >>> from music_jax.evaluation.metrics.statistics import mean_interval
      >>> mean, half = mean_interval([0.9, 0.92, 0.94])
      >>> f"{mean:.3f} ± {half:.3f}"
      '0.920 ± 0.050'
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"expected values [draws], at least one; got shape {x.shape}")
    if len(x) == 1:
        return Interval(float(x[0]), float("nan"))
    quantile = scipy.special.stdtrit(len(x) - 1, (1 + confidence) / 2)
    return Interval(float(x.mean()), float(quantile * x.std(ddof=1) / np.sqrt(len(x))))
