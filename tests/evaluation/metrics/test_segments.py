"""Segment measures against scikit-learn, and at the objective's own bound."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from music_jax.evaluation.metrics.segments import (
    bound_distances,
    measure_segments,
    mutual_information,
)
from music_jax.objectives import segment_probabilities


def test_mutual_information_of_hard_codes_is_scikit_learns():
    rng = np.random.default_rng(0)
    codes = rng.integers(5, size=(400, 3))
    codes[:, 2] = np.where(rng.random(400) < 0.7, codes[:, 0], codes[:, 2])
    found = mutual_information(np.eye(5, dtype=np.float32)[codes])
    expected = [[mutual_info_score(codes[:, s], codes[:, t]) for t in range(3)] for s in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_soft_assignments_share_what_their_joint_probability_says():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), size=(50, 2)).astype(np.float32)
    joint = np.mean(p[:, 0, :, None] * p[:, 1, None, :], axis=0)
    outer = joint.sum(axis=1)[:, None] * joint.sum(axis=0)[None]
    expected = np.sum(joint * np.log(joint / outer))
    np.testing.assert_allclose(mutual_information(p)[0, 1], expected, atol=1e-5)


def test_measures_of_codes_that_use_all_units_and_of_those_that_use_one():
    codes = np.asarray(list(itertools.product(range(4), repeat=2)))
    codes = np.concatenate([codes, np.full((16, 1), 2)], axis=1)  # the third has collapsed
    found = measure_segments(np.eye(4, dtype=np.float32)[codes])
    np.testing.assert_allclose(found.usage_entropy, [math.log(4), math.log(4), 0], atol=1e-6)
    np.testing.assert_array_equal(found.dead_units, [0, 0, 3])
    np.testing.assert_allclose(found.confidence, 1)
    np.testing.assert_allclose(found.assignment_entropy, 0, atol=1e-6)
    np.testing.assert_allclose(found.mutual_information[0, 1:], 0, atol=1e-6)
    undecided = measure_segments(np.full((8, 2, 4), 0.25, np.float32))
    np.testing.assert_allclose(undecided.confidence, 0.25)
    np.testing.assert_allclose(undecided.information, 0, atol=1e-6)
    with pytest.raises(ValueError, match="expected probabilities"):
        measure_segments(np.ones((3, 4)))


def test_the_bound_is_at_distance_zero_and_a_collapse_above_it():
    codes = np.asarray(list(itertools.product(range(3), repeat=4)))  # independent, uniform
    best = 40 * np.eye(3, dtype=np.float32)[codes].reshape(81, 12)
    np.testing.assert_allclose(bound_distances(best, best, num_segments=4), 0, atol=2e-4)
    alike = np.tile(best[:1], (81, 1))
    found = bound_distances(alike, alike, num_segments=4)
    log_3 = math.log(3)
    np.testing.assert_allclose(found, (log_3, 2 * log_3, 0, 3 * log_3), atol=2e-4)
    p = segment_probabilities(jnp.asarray(best), num_segments=4)
    np.testing.assert_array_equal(np.argmax(p, axis=2), codes)
