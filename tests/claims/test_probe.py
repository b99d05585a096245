"""Classifiers against other implementations."""

import numpy as np
import pytest
import scipy.optimize
from skimage.feature import hog

from music_jax.claims import probe
from music_jax.claims.probe import (
    PENALTIES,
    hog_features,
    logistic_probe,
    support_vector_machine,
)


def _samples(count, seed, *, noise=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    centers = np.random.default_rng(9).normal(size=(3, 5))
    features = centers[labels] + noise * rng.normal(size=(count, 5))
    return (10 + 100 * features).astype(np.float32), labels


def _fit(features, labels, penalty):
    """Returns weights [features + 1, classes] of the minimum, by another optimizer."""
    x = np.c_[(features - features.mean(0)) / features.std(0), np.ones(len(features))]

    def loss(flat):
        weights = flat.reshape(x.shape[1], 3)
        logits = x @ weights
        log_p = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
        p = np.exp(log_p)
        p[np.arange(len(x)), labels] -= 1
        gradient = x.T @ p / len(x)
        gradient[:-1] += penalty * weights[:-1]
        value = -log_p[np.arange(len(x)), labels].mean()
        return value + penalty / 2 * np.sum(weights[:-1] ** 2), gradient.ravel()

    start = np.zeros(3 * x.shape[1])
    found = scipy.optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-8})
    return found.x.reshape(x.shape[1], 3)


def test_the_probe_is_the_regression_of_the_best_penalty():
    train, validation, test = (_samples(n, i) for i, n in enumerate((300, 400, 500)))
    features = train[0].astype(np.float64)
    mean, std = features.mean(0), features.std(0)
    scores = {}
    for penalty in PENALTIES:
        weights = _fit(features, train[1], penalty)
        predicted = [
            np.argmax(np.c_[(x - mean) / std, np.ones(len(x))] @ weights, axis=1)
            for x in (validation[0], test[0])
        ]
        scores[penalty] = np.mean(predicted[0] == validation[1]), predicted[1]
    best = max(scores, key=lambda penalty: scores[penalty][0])
    found = logistic_probe(train, validation, test[0])
    assert found.converged
    assert found.penalty == best
    assert found.validation_top1 == pytest.approx(scores[best][0])
    assert np.mean(found.predictions == scores[best][1]) > 0.995
    assert 0.5 < np.mean(found.predictions == test[1]) < 0.99


def test_a_regression_that_needs_more_steps_has_not_converged(monkeypatch):
    monkeypatch.setattr(probe, "_MAX_STEPS", 2)
    assert not logistic_probe(_samples(300, 0), _samples(400, 1)).converged


def test_features_that_are_constant_or_large_do_not_matter():
    (x, y), held_out = _samples(300, 0), _samples(300, 1)
    widened = [np.c_[f, np.full(len(f), 7.0), 1e6 * f[:, :1]] for f in (x, held_out[0])]
    found = logistic_probe((widened[0], y), (widened[1], held_out[1]))
    plain = logistic_probe((x, y), held_out)
    assert found.validation_top1 == pytest.approx(plain.validation_top1, abs=0.02)
    assert found.predictions is None


@pytest.mark.parametrize("side", [28, 30])
def test_hog_is_that_of_scikit_image(side):
    images = np.random.default_rng(0).integers(256, size=(3, side, side, 1), dtype=np.uint8)
    expected = [
        hog(
            image[:, :, 0].astype(float),
            orientations=9,
            pixels_per_cell=(4, 4),
            cells_per_block=(2, 2),
            block_norm="L2-Hys",
        )
        for image in images
    ]
    np.testing.assert_allclose(hog_features(images), expected, atol=1e-5)


def test_a_support_vector_machine_separates_what_a_line_cannot():
    rng = np.random.default_rng(0)
    parts = []
    for count in (500, 200, 300):
        x = rng.normal(size=(count, 2))
        parts.append((x, (x[:, 0] * x[:, 1] > 0).astype(int)))
    train, validation, test = parts
    found = support_vector_machine(train, validation, test[0])
    assert np.mean(found.predictions == test[1]) > 0.95
    assert found.validation_top1 > 0.95
    assert found.penalty in (1.0, 10.0, 100.0)
