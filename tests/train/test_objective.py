"""The objectives as a config names them, each field with a value of its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

from music_jax.objectives import music_terms
from music_jax.train.objective import OBJECTIVES

# No two fields have the same value, and none its default.
_CONFIG = config_dict.ConfigDict(
    {
        "num_segments": 3,
        "units_per_segment": 4,
        "temperature": 0.7,
        "diagonal_weight": 1.5,
        "cross_segment_weight": 0.6,
        "invariance_weight": 2.5,
        "off_diagonal_weight": 0.03,
        "similarity_weight": 11.0,
        "variance_weight": 13.0,
        "covariance_weight": 5.0,
        "contrast_temperature": 0.35,
    }
)


def _music(a, b):
    terms = music_terms(jnp.asarray(a), jnp.asarray(b), num_segments=3, temperature=0.7)
    return 1.5 * terms.diagonal + 0.6 * terms.cross_segment + 2.5 * terms.invariance


def _barlow_twins(a, b):
    a, b = ((x - x.mean(0)) / x.std(0) for x in (a, b))
    c = a.T @ b / len(a)
    on = np.diag(c)
    return np.sum((1 - on) ** 2) + 0.03 * (np.sum(c**2) - np.sum(on**2))


def _vicreg(a, b):
    loss = 11 * np.mean((a - b) ** 2)
    for z in (a, b):
        covariances = np.cov(z.T)
        variances = np.diag(covariances)
        loss += 13 * np.mean(np.maximum(0, 1 - np.sqrt(variances + 1e-4))) / 2
        loss += 5 * (np.sum(covariances**2) - np.sum(variances**2)) / z.shape[1]
    return loss


def _simclr(a, b):
    z = np.concatenate([a, b])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    weights = np.exp(z @ z.T / 0.35) * (1 - np.eye(len(z)))
    pairs = np.roll(np.arange(len(z)), len(a))
    return -np.mean(np.log(weights[np.arange(len(z)), pairs] / weights.sum(axis=1)))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_each_field_is_used_for_what_it_is_called(name):
    a, b = 0.6 * np.random.default_rng(0).normal(size=(2, 10, 12))
    expected = {
        "music": _music,
        "barlow_twins": _barlow_twins,
        "vicreg": _vicreg,
        "simclr": _simclr,
    }[name](a.astype(np.float32), b.astype(np.float32))
    loss, metrics = OBJECTIVES[name](_CONFIG)(
        jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    )
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    assert set(metrics) == (
        {"diagonal", "cross_segment", "invariance"} if name == "music" else set()
    )
