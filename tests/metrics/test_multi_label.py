"""Images of several classes: average precision, probe and neighbors against scikit-learn."""

import numpy as np
import pytest
import scipy.special
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from music_jax.errors import DivergedError
from music_jax.metrics.knn import knn_scores
from music_jax.metrics.linear_probe import (
    Heads,
    ProbeRecipe,
    class_precisions,
    fit,
    linear_probe,
    shuffled_batches,
)
from music_jax.metrics.multi_label import average_precisions, mean_average_precision


def _theirs(scores, labels):
    found = []
    for column, truth in zip(scores.T, labels.T, strict=True):
        known = truth >= 0
        if np.any(truth == 1):
            found.append(average_precision_score(truth[known] == 1, column[known]))
        else:
            found.append(np.nan)
    return np.asarray(found)


@pytest.mark.parametrize("levels", [2, 10, 10**6])
def test_average_precision_is_that_of_scikit_learn_with_ties_and_unknown_labels(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(levels, size=(300, 7)).astype(np.float32)
    labels = rng.choice([-1, 0, 1], size=scores.shape, p=[0.3, 0.6, 0.1]).astype(np.int8)
    labels[:, 4] = np.minimum(labels[:, 4], 0)  # no positive sample
    labels[:, 5] = -1
    labels[:, 6] = 1
    found = average_precisions(scores, labels)
    np.testing.assert_allclose(found, _theirs(scores, labels), rtol=1e-12)
    assert np.flatnonzero(np.isnan(found)).tolist() == [4, 5]
    whole = np.abs(labels[:, :4])
    macro = average_precision_score(whole, scores[:, :4], average="macro")
    assert mean_average_precision(average_precisions(scores[:, :4], whole)) == pytest.approx(macro)
    assert mean_average_precision(found) == pytest.approx(np.nanmean(found))
    constant = average_precisions(np.zeros_like(scores), labels)
    np.testing.assert_allclose(constant[0], np.mean(labels[labels[:, 0] >= 0, 0]))


def test_shapes_that_differ_are_an_error():
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(3,\)"):
        average_precisions(np.zeros((3, 2)), np.zeros(3, int))


def _samples(count=400, classes=3):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((count, 12)).astype(np.float32)
    directions = rng.standard_normal((12, classes))
    labels = (features @ directions + rng.standard_normal((count, classes)) > 1).astype(np.int8)
    labels[rng.random(labels.shape) < 0.2] = -1
    return features, labels


def test_the_probe_is_sgd_on_the_binary_cross_entropy_of_the_known_labels():
    features, labels = _samples()
    recipe = ProbeRecipe(2, 50, (0.3, 2.0), weight_decay=1e-2)
    shared = {"num_features": 12, "num_classes": 3, "steps_per_epoch": 8, "seed": 5}
    found = fit(shuffled_batches(features, labels, recipe, 5), recipe, **shared)
    assert isinstance(found, Heads)
    start = fit(iter(()), recipe, **shared)
    for r, rate in enumerate(recipe.base_learning_rates):
        w, b = np.asarray(start.kernel[r], np.float64), np.zeros(3)
        vw, vb = 0, 0
        for step, (x, y) in enumerate(shuffled_batches(features, labels, recipe, 5)):
            x, y = np.asarray(x, np.float64), np.asarray(y)
            error = np.where(y >= 0, scipy.special.expit(x @ w + b) - (y == 1), 0) / 50
            vw = 0.9 * vw + x.T @ error + 1e-2 * w
            vb = 0.9 * vb + error.sum(axis=0) + 1e-2 * b
            scale = rate * 50 / 256 * (1 + np.cos(np.pi * step / 16)) / 2
            w, b = w - scale * vw, b - scale * vb
        np.testing.assert_allclose(found.kernel[r], w, atol=1e-5)
        np.testing.assert_allclose(found.bias[r], b, atol=1e-5)


def test_the_probe_reports_average_precisions_and_selects_its_rate_by_their_mean():
    features, labels = _samples(900)
    recipe = ProbeRecipe(10, 50, (1e-9, 0.5))
    parts = features[:600], labels[:600], features[600:], labels[600:]
    found = linear_probe(*parts, recipe, num_classes=3)
    assert found.base_learning_rate == 0.5
    assert np.isnan(found.top1)
    chance = average_precisions(np.zeros((300, 3)), labels[600:])
    assert np.all(found.average_precisions > chance + 0.3)
    diverged = Heads(np.stack([np.full((12, 3), np.inf), np.eye(12, 3)]), np.zeros((2, 3)))
    none, some = class_precisions(diverged, parts[2], parts[3])
    assert none is None
    assert some.shape == (3,)
    with pytest.raises(DivergedError):
        class_precisions(Heads(diverged.kernel[:1], diverged.bias[:1]), parts[2], parts[3])
    right = found.predictions == labels[600:]
    assert right[labels[600:] >= 0].mean() > 0.8


def test_neighbors_vote_for_each_class_as_in_scikit_learn():
    features, labels = _samples()
    train, test = features[:300], features[300:]
    ks = [1, 20, 1000]
    known = np.abs(labels)[:300]
    found = knn_scores(train, known, test, k=ks, temperature=0.2)
    for k, scores in zip(ks, found, strict=True):
        theirs = KNeighborsClassifier(
            min(k, 300),
            metric="cosine",
            algorithm="brute",
            weights=lambda distances: np.exp((1 - distances) / 0.2),
        )
        expected = theirs.fit(train, known).predict_proba(test)
        np.testing.assert_allclose(scores, np.stack([p[:, 1] for p in expected], 1), atol=1e-5)
    # Neighbors whose class is unknown do not vote.
    column = knn_scores(train, labels[:300], test, k=[1000], temperature=0.2)[0, :, 1]
    rows = np.flatnonzero(labels[:300, 1] >= 0)
    expected = knn_scores(train[rows], labels[:300][rows], test, k=[1000], temperature=0.2)
    np.testing.assert_allclose(column, expected[0, :, 1], atol=1e-6)
    assert not np.any(knn_scores(train, np.full((300, 2), -1, np.int8), test, k=[5]))
