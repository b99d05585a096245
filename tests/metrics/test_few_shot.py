"""Few-shot classification against scikit-learn, and the draws of its samples."""

import numpy as np
import pytest
import scipy.stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from music_jax.metrics.few_shot import draw_shots, few_shot, mean_interval, stratified_subset


def _digits():
    images, labels = load_digits(return_X_y=True)
    images = np.tile(images, 3).astype(np.float32)  # more features than are drawn
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def test_accuracies_match_logistic_regression_on_the_drawn_samples():
    train, train_labels, test, test_labels = _digits()
    found = few_shot(train, train_labels, test, test_labels, shots=5, draws=4, seed=3)
    unit, unit_test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    expected = []
    for draw in range(4):
        rows = draw_shots(train_labels, 5, seed=3, draw=draw)
        theirs = LogisticRegression(C=50.0, max_iter=5000, tol=1e-6).fit(
            unit[rows].astype(np.float64), train_labels[rows]
        )
        expected.append(theirs.score(unit_test.astype(np.float64), test_labels))
    np.testing.assert_allclose(found, expected, atol=0.005)
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(found), scipy.stats.sem(found))
    np.testing.assert_allclose(
        mean_interval(found), (np.mean(expected), (high - low) / 2), atol=0.005
    )


def test_draws_differ_and_have_the_same_number_of_samples_per_class():
    labels = np.random.default_rng(0).integers(7, size=300) * 2  # with gaps
    labels[:3] = 99  # a class of three
    draws = [draw_shots(labels, 5, seed=1, draw=draw) for draw in range(3)]
    for rows in draws:
        assert len(set(rows)) == len(rows) == 7 * 5 + 3
        values, counts = np.unique(labels[rows], return_counts=True)
        np.testing.assert_array_equal(values, np.unique(labels))
        assert set(counts[:-1]) == {5}
    assert not np.array_equal(draws[0], draws[1])
    np.testing.assert_array_equal(draws[2], draw_shots(labels, 5, seed=1, draw=2))


def test_stratified_subset_has_the_same_fraction_of_each_class():
    labels = np.repeat([0, 1, 2], [1000, 200, 10])
    rows = stratified_subset(labels, 0.01, seed=0)
    np.testing.assert_array_equal(np.bincount(labels[rows]), [10, 2, 1])
    np.testing.assert_array_equal(stratified_subset(labels, 1.0, seed=0), np.arange(1210))


def test_a_single_value_has_no_interval():
    np.testing.assert_array_equal(mean_interval([0.5]), (0.5, np.nan))
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
