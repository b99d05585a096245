"""Cluster scores against scikit-learn and by trying all matches; clusters that were planted."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from music_jax.evaluation.metrics.clustering import (
    agreement_between_segments,
    cluster_scores,
    joint_clusters,
)


def _planted(samples=400, classes=4, segments=6, units=5, noise=0.25, seed=0):
    """Labels, and segments that each rename them and are wrong at times."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=samples)
    codes = np.stack([rng.permutation(units)[labels] for _ in range(segments)], axis=1)
    wrong = rng.random(codes.shape) < noise
    codes = np.where(wrong, rng.integers(units, size=codes.shape), codes)
    return labels, codes, 0.9 * np.eye(units)[codes] + 0.1 / units


@pytest.mark.parametrize("num_clusters", [3, 4, 6])
def test_scores_are_scikit_learns_and_the_best_match(num_clusters):
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


def test_renamed_labels_are_perfect_and_one_cluster_is_worth_nothing():
    labels = np.arange(60) % 3
    perfect = cluster_scores(2 - labels, labels)
    assert perfect[:4] == pytest.approx((1, 1, 1, 1))
    assert cluster_scores(np.zeros(60, int), labels)[:3] == pytest.approx((0, 0, 1 / 3))
    with pytest.raises(ValueError, match="a label for each sample"):
        cluster_scores(labels[:-1], labels)


def test_the_joint_code_finds_what_no_segment_tells_alone():
    labels, codes, probabilities = _planted()
    single = max(cluster_scores(codes[:, s], labels).accuracy for s in range(6))
    joint = cluster_scores(joint_clusters(probabilities, num_clusters=4), labels).accuracy
    assert joint > 0.97 > 0.9 > single


def test_the_segment_most_agreed_upon_is_the_one_without_errors():
    labels, codes, _ = _planted()
    codes[:, 3] = labels
    assert np.argmax(agreement_between_segments(codes)) == 3


def test_agreement_is_the_mean_of_scikit_learns():
    _, codes, _ = _planted(units=7)
    codes[:, 1] = codes[:, 4] = 2  # neither of the two splits the samples
    expected = [
        np.mean([normalized_mutual_info_score(a, b) for j, b in enumerate(codes.T) if j != i])
        for i, a in enumerate(codes.T)
    ]
    np.testing.assert_allclose(agreement_between_segments(codes), expected, rtol=1e-9)
    np.testing.assert_array_equal(agreement_between_segments(codes[:, :1]), [0])
