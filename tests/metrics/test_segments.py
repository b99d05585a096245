"""Metrics of segments against scikit-learn, brute force, and planted clusters."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, mutual_info_score, normalized_mutual_info_score

from music_jax.metrics.segments import (
    agreement_between_segments,
    cluster_scores,
    gap_to_bound,
    joint_clusters,
    measure_segments,
    mutual_information,
)
from music_jax.objectives import segment_probabilities


def test_mutual_information_of_hard_codes_matches_scikit_learn():
    rng = np.random.default_rng(0)
    codes = rng.integers(5, size=(400, 3))
    codes[:, 2] = np.where(rng.random(400) < 0.7, codes[:, 0], codes[:, 2])
    found = mutual_information(np.eye(5, dtype=np.float32)[codes])
    expected = [[mutual_info_score(codes[:, s], codes[:, t]) for t in range(3)] for s in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_mutual_information_of_soft_assignments_matches_the_definition():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), size=(50, 2)).astype(np.float32)
    joint = np.mean(p[:, 0, :, None] * p[:, 1, None, :], axis=0)
    outer = joint.sum(axis=1)[:, None] * joint.sum(axis=0)[None]
    expected = np.sum(joint * np.log(joint / outer))
    np.testing.assert_allclose(mutual_information(p)[0, 1], expected, atol=1e-5)


def test_measures_of_uniform_collapsed_and_undecided_segments():
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


def test_gap_to_bound_is_zero_at_the_optimum_and_positive_after_collapse():
    codes = np.asarray(list(itertools.product(range(3), repeat=4)))  # independent, uniform
    best = 40 * np.eye(3, dtype=np.float32)[codes].reshape(81, 12)
    found = gap_to_bound(best, best, num_segments=4)
    np.testing.assert_allclose([*found.values()], 0, atol=2e-4)
    alike = np.tile(best[:1], (81, 1))
    found = gap_to_bound(alike, alike, num_segments=4)
    log_3 = math.log(3)
    np.testing.assert_allclose([*found.values()], (log_3, 2 * log_3, 0, 3 * log_3), atol=2e-4)
    p = segment_probabilities(jnp.asarray(best), num_segments=4)
    np.testing.assert_array_equal(np.argmax(p, axis=2), codes)


def _planted(samples=400, classes=4, segments=6, units=5, noise=0.25, seed=0):
    """Labels, and segments that each rename them and are wrong at times."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=samples)
    codes = np.stack([rng.permutation(units)[labels] for _ in range(segments)], axis=1)
    wrong = rng.random(codes.shape) < noise
    codes = np.where(wrong, rng.integers(units, size=codes.shape), codes)
    return labels, codes, 0.9 * np.eye(units)[codes] + 0.1 / units


@pytest.mark.parametrize("num_clusters", [3, 4, 6])
def test_cluster_scores_match_scikit_learn_and_the_best_matching(num_clusters):
    rng = np.random.default_rng(1)
    labels = rng.integers(4, size=200)
    clusters = np.where(rng.random(200) < 0.6, labels, rng.integers(9, size=200)) % num_clusters
    found = cluster_scores(clusters, labels)
    np.testing.assert_allclose(found.nmi, normalized_mutual_info_score(labels, clusters))
    np.testing.assert_allclose(found.adjusted_rand, adjusted_rand_score(labels, clusters))
    table = np.zeros((6, 6), int)
    np.add.at(table, (clusters, labels), 1)
    best = max(
        sum(table[i, match[i]] for i in range(6)) for match in itertools.permutations(range(6))
    )
    assert found.accuracy == best / 200
    assert found.clusters == num_clusters


def test_cluster_scores_of_permuted_labels_and_of_one_cluster():
    labels = np.arange(60) % 3
    perfect = cluster_scores(2 - labels, labels)
    assert perfect[:4] == pytest.approx((1, 1, 1, 1))
    assert cluster_scores(np.zeros(60, int), labels)[:3] == pytest.approx((0, 0, 1 / 3))
    with pytest.raises(ValueError, match="a label for each sample"):
        cluster_scores(labels[:-1], labels)


def test_clusters_of_the_joint_code_beat_single_segments():
    labels, codes, probabilities = _planted()
    single = max(cluster_scores(codes[:, s], labels).accuracy for s in range(6))
    joint = cluster_scores(joint_clusters(probabilities, num_clusters=4), labels).accuracy
    assert joint > 0.97 > 0.9 > single


def test_the_segment_without_errors_agrees_most_with_the_others():
    labels, codes, _ = _planted()
    codes[:, 3] = labels
    assert np.argmax(agreement_between_segments(codes)) == 3


def test_agreement_matches_the_mean_of_scikit_learn():
    _, codes, _ = _planted(units=7)
    codes[:, 1] = codes[:, 4] = 2  # neither of the two splits the samples

    def shared(a, b):  # scikit-learn gives two constant segments 1
        return 0.0 if len({*a}) == len({*b}) == 1 else normalized_mutual_info_score(a, b)

    expected = [
        np.mean([shared(a, b) for j, b in enumerate(codes.T) if j != i])
        for i, a in enumerate(codes.T)
    ]
    np.testing.assert_allclose(agreement_between_segments(codes), expected, rtol=1e-9)
    np.testing.assert_array_equal(agreement_between_segments(codes[:, :1]), [0])
