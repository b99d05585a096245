"""Statistics against scipy, R and closed forms."""

import numpy as np
import pytest
import scipy.stats

from music_jax.claims.statistics import (
    crossed_bootstrap,
    equivalence,
    holm,
    paired_difference,
)

_A = (0.884, 0.889, 0.886, 0.891, 0.880)
_B = (0.881, 0.880, 0.884, 0.885, 0.882)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_a_paired_difference_is_that_of_students_test(confidence):
    found = paired_difference(_A, _B, confidence=confidence)
    expected = scipy.stats.ttest_rel(_A, _B)
    interval = expected.confidence_interval(confidence)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.mean == pytest.approx(0.0036)


@pytest.mark.parametrize("margin", [0.001, 0.005, 0.02])
def test_equivalence_is_the_larger_of_two_one_sided_tests(margin):
    differences = np.subtract(_A, _B)
    expected = max(
        scipy.stats.ttest_1samp(differences, -margin, alternative="greater").pvalue,
        scipy.stats.ttest_1samp(differences, margin, alternative="less").pvalue,
    )
    found = equivalence(_A, _B, margin=margin)
    assert found.p == pytest.approx(expected, rel=1e-9)
    # The 90 % interval lies within the margin exactly if p < 0.05.
    assert (found.p < 0.05) == (-margin < found.low and found.high < margin)


def test_holm_is_that_of_r():
    # p.adjust(c(0.01, 0.04, 0.03, 0.005, 0.8), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005, 0.8]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.8])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_differences_without_variance():
    assert paired_difference([0.5, 0.6], [0.5, 0.6]) is None
    assert paired_difference([0.5, 0.5], [0.25, 0.25]) is None
    assert paired_difference([0.4, 0.9], [0.3, 0.8]) is None  # equal but for their rounding
    assert equivalence([0.5, 0.5], [0.5, 0.5], margin=0.005) is None
    assert paired_difference([0.5], [0.4]) is None
    assert equivalence([0.5], [0.4], margin=0.005) is None
    with pytest.raises(ValueError, match="expected pairs"):
        paired_difference([0.5], [0.4, 0.3])


def test_the_bootstrap_has_the_width_of_images_if_all_seeds_are_alike():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 1, 2000)) < [[[0.9]], [[0.85]]]
    low, high = crossed_bootstrap(np.repeat(a, 4, 0), np.repeat(b, 4, 0), samples=2000)
    difference = a[0].astype(float) - b[0]
    half = 1.96 * difference.std() / np.sqrt(2000)
    assert (low + high) / 2 == pytest.approx(difference.mean(), abs=0.1 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.07)


def test_the_bootstrap_has_the_width_of_seeds_if_all_images_are_alike():
    accuracies = np.array([1, 1, 0, 1, 0, 0, 1, 1], bool)
    a, b = np.repeat(accuracies[:, None], 50, 1), np.zeros((8, 50), bool)
    low, high = crossed_bootstrap(a, b, samples=4000)
    expected = scipy.stats.binom(8, 5 / 8).ppf([0.025, 0.975]) / 8
    assert (low, high) == pytest.approx(tuple(expected))
    with pytest.raises(ValueError, match=r"\[seeds, images\]"):
        crossed_bootstrap(a, b[:4], samples=10)


def test_the_bootstrap_is_wider_than_either_source_alone():
    rng = np.random.default_rng(1)
    easy = rng.normal(scale=0.5, size=(1, 500))  # difficulty of images, and quality of seeds
    a = rng.normal(scale=0.5, size=(6, 1)) + easy + rng.normal(size=(6, 500)) > -1.0
    b = easy + rng.normal(size=(6, 500)) > -1.0
    both = np.subtract(*crossed_bootstrap(a, b, samples=1000)[::-1])
    seeds = a.mean(axis=1) - b.mean(axis=1)
    assert both > 0.95 * 2 * 1.96 * seeds.std() / np.sqrt(6)
    images = (a.astype(float) - b).mean(axis=0)
    assert both > 2 * 1.96 * images.std() / np.sqrt(500)
