"""The linear probe against scikit-learn's logistic regression and SGD in plain numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.preprocessing import StandardScaler

from music_jax.errors import DivergedError
from music_jax.metrics import scaling
from music_jax.metrics.linear_probe import (
    Heads,
    ProbeRecipe,
    accuracies,
    fit,
    linear_probe,
    logits,
    num_steps,
    shuffled_batches,
    split_for_validation,
)
from music_jax.metrics.scaling import FEATURE_SCALINGS, fit_scaling


def _digits():
    images, labels = load_digits(return_X_y=True)
    features = ((images - images.mean(0)) / (images.std(0) + 1e-6)).astype(np.float32)
    labels = labels.astype(np.int32)
    return features[:1200], labels[:1200], features[1200:], labels[1200:]


def _fit(recipe, features, labels, seed=0):
    return fit(
        shuffled_batches(features, labels, recipe, seed),
        recipe,
        num_features=features.shape[1],
        num_classes=10,
        steps_per_epoch=len(labels) // recipe.batch_size,
        seed=seed,
    )


def test_accuracy_matches_logistic_regression():
    train, train_labels, test, test_labels = _digits()
    decay = 1e-2  # of half the squared kernel, added to the mean loss: C is 1 / (decay * samples)
    recipe = ProbeRecipe(50, 200, (0.1, 0.3), weight_decay=decay)
    found = linear_probe(train, train_labels, test, test_labels, recipe, num_classes=10)
    theirs = LogisticRegression(C=1 / (decay * 1200), max_iter=5000).fit(train, train_labels)
    assert abs(found.top1 - theirs.score(test, test_labels)) <= 0.005
    assert np.mean(found.predictions == theirs.predict(test)) >= 0.99
    sure = theirs.predict_proba(test).max(axis=1)
    assert np.corrcoef(found.confidences, sure)[0, 1] > 0.95
    assert found.top1 == np.mean(found.predictions == test_labels)


def test_the_learning_rate_is_selected_without_test_samples():
    train, train_labels, test, test_labels = _digits()
    recipe = ProbeRecipe(5, 100, (1e-6, 0.1))
    for labels in (test_labels, 9 - test_labels):
        steps = itertools.count()
        found = linear_probe(
            train,
            train_labels,
            test,
            labels,
            recipe,
            num_classes=10,
            feature_scaling="standardize",
            after_step=steps.__next__,
        )
        assert found.base_learning_rate == 0.1
        assert next(steps) == num_steps(recipe, len(train), 0.1)


def test_features_are_scaled_by_the_statistics_of_the_training_samples():
    train, train_labels, test, test_labels = _digits()
    train, test = 3 * train + 1, 5 * test - 2
    recipe = ProbeRecipe(2, 100, (0.03, 0.1))
    mean, std = train.mean(0), train.std(0)
    std[std == 0] = 1  # as StandardScaler does
    raw, scaled = (
        linear_probe(a, train_labels, b, test_labels, recipe, num_classes=10, feature_scaling=name)
        for a, b, name in (
            (train, test, "standardize"),
            ((train - mean) / std, (test - mean) / std, "none"),
        )
    )
    assert raw.top1 == pytest.approx(scaled.top1, abs=0.002)
    assert np.mean(raw.predictions == scaled.predictions) > 0.995


def test_learning_rates_do_not_influence_each_other():
    train, labels, _, _ = _digits()
    rates = (0.01, 0.3)
    both = _fit(ProbeRecipe(3, 100, rates, weight_decay=0.01), train, labels)
    for i, rate in enumerate(rates):
        alone = _fit(ProbeRecipe(3, 100, (rate,), weight_decay=0.01), train, labels)
        np.testing.assert_allclose(both.kernel[i], alone.kernel[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(both.bias[i], alone.bias[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("drop_epochs", [(), (1, 2)])
def test_steps_match_sgd_with_momentum_and_decay_in_plain_numpy(drop_epochs):
    train, labels, _, _ = _digits()
    recipe = ProbeRecipe(3, 400, (0.2,), 0.9, 0.05, drop_epochs)
    batches = [
        (np.asarray(x, np.float64), np.asarray(y))
        for x, y in shuffled_batches(train, labels, recipe, seed=1)
    ]
    assert len(batches) == 9
    start = fit(iter(()), recipe, num_features=64, num_classes=10, steps_per_epoch=3, seed=1)
    w, b = np.asarray(start.kernel[0], np.float64), np.zeros(10)
    assert abs(w.std() - 0.01) < 0.001
    m_w, m_b = np.zeros_like(w), np.zeros_like(b)
    for step, (x, y) in enumerate(batches):
        if drop_epochs:
            rate = 0.2 * 400 / 256 * 0.1 ** sum(step >= 3 * epoch for epoch in drop_epochs)
        else:
            rate = 0.2 * 400 / 256 * 0.5 * (1 + np.cos(np.pi * step / 9))
        scores = np.exp(x @ w + b)
        error = scores / scores.sum(1, keepdims=True) - np.eye(10)[y]
        m_w = 0.9 * m_w + x.T @ error / 400 + 0.05 * w
        m_b = 0.9 * m_b + error.mean(0) + 0.05 * b
        w, b = w - rate * m_w, b - rate * m_b
    found = _fit(recipe, train, labels, seed=1)
    np.testing.assert_allclose(found.kernel[0], w, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(found.bias[0], b, rtol=2e-3, atol=2e-5)


def test_top_k_accuracies_match_scikit_learn():
    train, labels, test, test_labels = _digits()
    heads = _fit(ProbeRecipe(1, 100, (0.001, 0.1)), train, labels)
    found = accuracies(heads, test, test_labels)
    scores = np.asarray(logits(heads, test))
    for i in range(2):
        for j, k in enumerate((1, 5)):
            expected = top_k_accuracy_score(test_labels, scores[i], k=k)
            np.testing.assert_allclose(found[i, j], expected)


def test_the_accuracy_of_non_finite_scores_is_nan():
    kernel = np.stack([np.eye(4, dtype=np.float32)] * 3)
    kernel[0, 2, 1], kernel[1, 0, 0] = np.nan, np.inf
    heads = Heads(kernel, np.zeros((3, 4), np.float32))
    found = accuracies(heads, np.eye(4, dtype=np.float32)[:3], np.asarray([0, 1, 0]))
    np.testing.assert_array_equal(found, [[np.nan] * 2, [np.nan] * 2, [2 / 3, 1.0]])


def test_scores_of_which_no_classifier_is_finite_are_an_error():
    kernel = np.full((3, 2, 2), np.nan, np.float32)
    heads = Heads(kernel, np.zeros((3, 2), np.float32))
    with pytest.raises(DivergedError, match="lower its learning rates"):
        accuracies(heads, np.eye(2, dtype=np.float32), np.asarray([0, 1]))


def test_constant_scores_are_never_right():
    heads = Heads(np.zeros((1, 4, 10), np.float32), np.zeros((1, 10), np.float32))
    features = np.ones((7, 4), np.float32)
    np.testing.assert_array_equal(accuracies(heads, features, np.arange(7)), [[0.0, 0.0]])


def test_each_epoch_takes_each_sample_once_in_a_new_order():
    recipe = ProbeRecipe(2, 5, (0.1,))
    features = np.arange(20, dtype=np.float32)[:, None]
    labels = np.arange(20, dtype=np.int32)
    epochs = np.asarray([y for _, y in shuffled_batches(features, labels, recipe, 0)])
    first, second = epochs[:4].ravel(), epochs[4:].ravel()
    assert sorted(first) == sorted(second) == list(range(20))
    assert np.any(first != second)


@pytest.mark.parametrize(
    ("count", "fraction", "size"), [(40, 0.1, 4), (40, 0.3, 12), (5, 0.01, 1), (2, 1.0, 1)]
)
def test_split_for_validation_divides_the_samples(count, fraction, size):
    rest, held_out = split_for_validation(count, fraction, seed=3)
    assert len(held_out) == size
    assert sorted([*rest, *held_out]) == list(range(count))
    assert np.all(np.diff(rest) > 0)
    assert np.all(np.diff(held_out) > 0)


def _correlated(count, seed=0):
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(count, 12)) @ np.random.default_rng(9).normal(size=(12, 12))
    return (mixed + 5).astype(np.float32)


def test_standardize_matches_scikit_learn():
    train, test = _correlated(300), _correlated(50, seed=1)
    found = fit_scaling("standardize", lambda: train)(test)
    np.testing.assert_allclose(found, StandardScaler().fit(train).transform(test), atol=1e-4)


@pytest.mark.parametrize("block", [7, 1000])
def test_whiten_applies_the_inverse_root_of_the_ridged_covariance(monkeypatch, block):
    monkeypatch.setattr(scaling, "_BLOCK", block)
    train, test = _correlated(300), _correlated(50, seed=1)
    covariance = np.cov(train.astype(np.float64).T, bias=True)
    ridged = covariance + 0.1 * np.trace(covariance) / 12 * np.eye(12)
    expected = (test - train.mean(axis=0)) @ np.linalg.inv(scipy.linalg.sqrtm(ridged)).real
    np.testing.assert_allclose(fit_scaling("whiten", lambda: train)(test), expected, atol=1e-4)


@pytest.mark.parametrize("name", FEATURE_SCALINGS)
def test_jax_and_numpy_arrays_are_scaled_alike(name):
    train, test = _correlated(300), _correlated(50, seed=1)
    scale = fit_scaling(name, lambda: train)
    np.testing.assert_allclose(scale(jnp.asarray(test)), scale(test), atol=1e-5)
    np.testing.assert_allclose(jax.jit(scale)(test), scale(test), atol=1e-5)


@pytest.mark.parametrize("name", FEATURE_SCALINGS)
def test_the_classifier_of_unscaled_features_includes_the_scaling(name):
    train, test = _correlated(300), _correlated(50, seed=1)
    labels = np.arange(300) % 3
    found = linear_probe(
        *(train, labels, test, labels[:50]),
        ProbeRecipe(2, 50, (0.1,)),
        num_classes=3,
        feature_scaling=name,
    )
    kernel, bias = found.classifier()
    scores = found.scale(test) @ np.asarray(found.heads.kernel[0]) + np.asarray(found.heads.bias[0])
    np.testing.assert_allclose(test @ kernel + bias, scores, atol=1e-4 * np.abs(scores).max())
    np.testing.assert_array_equal((test @ kernel + bias).argmax(1), found.predictions)


@pytest.mark.parametrize("name", FEATURE_SCALINGS)
def test_scaling_stays_finite_for_constant_or_too_many_features(name):
    train = np.concatenate([_correlated(8), np.full((8, 3), 7, np.float32)], axis=1)
    assert np.all(np.isfinite(fit_scaling(name, lambda: train)(train)))
    constant = np.ones((5, 4), np.float32)
    assert np.all(np.isfinite(fit_scaling(name, lambda: constant)(constant)))


def test_whitening_reveals_small_class_differences_in_few_epochs():
    def split(seed):
        draw = np.random.default_rng(seed)
        labels = draw.integers(0, 2, 600)
        nuisance = 6 * draw.normal(size=(600, 1))
        signal = 2.0 * labels[:, None] - 1 + 0.2 * draw.normal(size=(600, 1))
        both = np.concatenate([nuisance + signal, nuisance - signal], axis=1)
        return both.astype(np.float32), labels

    def top1(name):
        recipe = ProbeRecipe(num_epochs=3, batch_size=100, base_learning_rates=(0.3,))
        return linear_probe(*split(0), *split(1), recipe, num_classes=2, feature_scaling=name).top1

    assert top1("whiten") >= 0.99 > 0.8 > top1("standardize")
