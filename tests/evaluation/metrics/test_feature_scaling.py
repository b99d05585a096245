"""The maps of features that a linear probe may be put behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sklearn.preprocessing import StandardScaler

from music_jax.evaluation.metrics import feature_scaling
from music_jax.evaluation.metrics.feature_scaling import FEATURE_SCALINGS, fit_scaling
from music_jax.evaluation.metrics.linear_probe import ProbeRecipe, linear_probe


def _features(count, seed=0):
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(count, 12)) @ np.random.default_rng(9).normal(size=(12, 12))
    return (mixed + 5).astype(np.float32)


def test_standardize_is_that_of_scikit_learn():
    train, test = _features(300), _features(50, seed=1)
    found = fit_scaling("standardize", lambda: train)(test)
    np.testing.assert_allclose(found, StandardScaler().fit(train).transform(test), atol=1e-4)


@pytest.mark.parametrize("block", [7, 1000])
def test_whiten_is_the_inverse_root_of_the_ridged_covariance(monkeypatch, block):
    monkeypatch.setattr(feature_scaling, "_BLOCK", block)
    train, test = _features(300), _features(50, seed=1)
    covariance = np.cov(train.astype(np.float64).T, bias=True)
    ridged = covariance + 0.1 * np.trace(covariance) / 12 * np.eye(12)
    expected = (test - train.mean(axis=0)) @ np.linalg.inv(scipy.linalg.sqrtm(ridged)).real
    np.testing.assert_allclose(fit_scaling("whiten", lambda: train)(test), expected, atol=1e-4)


@pytest.mark.parametrize("name", FEATURE_SCALINGS)
def test_arrays_of_jax_are_scaled_as_those_of_numpy(name):
    train, test = _features(300), _features(50, seed=1)
    scale = fit_scaling(name, lambda: train)
    np.testing.assert_allclose(scale(jnp.asarray(test)), scale(test), atol=1e-5)
    np.testing.assert_allclose(jax.jit(scale)(test), scale(test), atol=1e-5)


@pytest.mark.parametrize("name", FEATURE_SCALINGS)
def test_features_that_are_constant_or_more_than_samples_stay_finite(name):
    train = np.concatenate([_features(8), np.full((8, 3), 7, np.float32)], axis=1)
    assert np.all(np.isfinite(fit_scaling(name, lambda: train)(train)))
    constant = np.ones((5, 4), np.float32)
    assert np.all(np.isfinite(fit_scaling(name, lambda: constant)(constant)))


def test_whitening_finds_in_few_epochs_what_tells_classes_apart_beside_larger_variation():
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
