"""The comparison of runs: differences of accuracies with intervals that cover."""

import types

import numpy as np
import pytest

from music_jax.evaluation.results import Predictions
from music_jax.report import comparison


def _run(correct, *, first=0):
    """Returns a run whose probe is right about some images, bool [images]."""
    labels = np.zeros(len(correct), np.int64)
    indices = np.arange(first, first + len(correct))
    found = Predictions(indices, labels, np.where(correct, 0, 1), 5)
    linear = {"top1": float(np.mean(correct)), "num_test": len(correct)}
    return types.SimpleNamespace(name="run", predictions=found, results={"linear": linear})


def test_the_interval_is_paired_only_for_the_same_images():
    right = np.arange(100) % 10 > 0
    worse = right & (np.arange(100) % 20 != 1)
    paired = comparison.difference(_run(right), _run(worse))
    assert paired.paired
    assert paired.value == pytest.approx(0.05)
    # Agresti & Min by hand: b = 5.5, c = 0.5, n = 102.
    error = 1.959964 * np.sqrt(5.5 + 0.5 - 5.0**2 / 102) / 102
    assert (paired.low, paired.high) == pytest.approx((5 / 102 - error, 5 / 102 + error))
    other = comparison.difference(_run(right), _run(worse, first=1))
    assert not other.paired
    assert other.value == paired.value
    # Agresti & Caffo by hand: 91 and 86 of 102.
    p, q = 91 / 102, 86 / 102
    error = 1.959964 * np.sqrt((p * (1 - p) + q * (1 - q)) / 102)
    assert (other.low, other.high) == pytest.approx((p - q - error, p - q + error))
    without = types.SimpleNamespace(predictions=None, results={"linear": {"top1": 0.5}})
    assert comparison.difference(_run(right), without) is None


def test_the_intervals_cover_the_true_difference():
    """95 % intervals cover at least 93 % of the time for accuracies near 1 and few images."""
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(1000):
        hard = rng.random(150) < 0.06  # images that are wrong with 1/2 in one run, 1/3 in the other
        a = ~(hard & (rng.random(150) < 1 / 2))
        b = ~(hard & (rng.random(150) < 1 / 3))
        for i, first in enumerate((0, 1)):
            found = comparison.difference(_run(a), _run(b, first=first))
            covered[i] += found.low <= -0.01 <= found.high
    assert np.all(covered >= 930)
