"""Metrics of extreme features, against scikit-learn and the formulas in float64.

The features are constant (a collapsed network), duplicates, zero vectors, and of scales from 1e-30
to 1e30; the labels are of one class; there are two samples.
"""

import ml_dtypes
import numpy as np
import pytest
import scipy.special
from scipy.spatial.distance import pdist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    adjusted_rand_score,
    average_precision_score,
    mutual_info_score,
    normalized_mutual_info_score,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from music_jax.metrics.few_shot import draw_shots, few_shot, mean_interval
from music_jax.metrics.knn import (
    average_precisions,
    knn_predict,
    nearest_neighbors,
    unit_length,
)
from music_jax.metrics.label_free import alignment, alpha_req, lidar, rankme, uniformity
from music_jax.metrics.linear_probe import ranks
from music_jax.metrics.scaling import fit_scaling
from music_jax.metrics.segments import (
    agreement_between_segments,
    cluster_scores,
    joint_clusters,
    measure_segments,
    mutual_information,
)

SCALES = (1e-30, 1e-8, 1.0, 1e8, 1e30)
KINDS = ("distinct", "duplicates", "constant", "zeros", "some zeros")


def _prototypes(kind, scale, samples=300, size=16, seed=0):
    """Distinct rows, float32, and which of them each sample is: a tie is then a tie exactly."""
    rng = np.random.default_rng(seed)
    count = {"distinct": samples, "duplicates": 12, "constant": 1, "zeros": 1, "some zeros": 6}
    rows = (scale * rng.normal(size=(count[kind], size))).astype(np.float32)
    if "zeros" in kind:
        rows[0] = 0
    chosen = np.arange(samples) % len(rows)
    return rows, rng.permutation(chosen)


def _unit(x):
    """Unit length in float64, whatever the scale; zeros stay zeros."""
    x = np.asarray(x, np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)


def _similarities(kind, scale):
    """A bank, queries, and the cosine similarities of all pairs in float64."""
    rows, chosen = _prototypes(kind, scale)
    queries = (scale * np.random.default_rng(1).normal(size=(40, 16))).astype(np.float32)
    queries[:3] = 0 if "zeros" in kind else rows[0]
    # Each sample at its own scale: a power of two, by which nothing is rounded.
    powers = 2.0 ** np.random.default_rng(2).integers(-9, 10, (300, 1))
    bank = rows[chosen] * powers.astype(np.float32)
    return bank, queries, (_unit(queries) @ _unit(rows).T)[:, chosen]


@pytest.mark.parametrize("scale", SCALES)
def test_unit_length_does_not_depend_on_the_scale(scale):
    x = (scale * np.random.default_rng(0).normal(size=(50, 7))).astype(np.float32)
    x[3] = 0
    np.testing.assert_allclose(unit_length(x), _unit(x), rtol=1e-6)
    np.testing.assert_array_equal(unit_length(x[3:4]), np.zeros((1, 7)))
    found = unit_length(x.astype(np.float64), np.float64)
    np.testing.assert_allclose(found, _unit(x), rtol=1e-14)
    low = x.astype(ml_dtypes.bfloat16)
    np.testing.assert_allclose(unit_length(low), _unit(low), rtol=1e-6)
    assert unit_length(low).dtype == np.float32


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_neighbors_are_ranked_by_similarity_then_by_row(kind, scale):
    bank, queries, similarities = _similarities(kind, scale)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :50]
    for bank_block_size in (299, 65_536):  # 299: if the blocks were not even, the last had one row
        found, rows = nearest_neighbors(bank, queries, k=50, bank_block_size=bank_block_size)
        np.testing.assert_array_equal(rows, order)
        np.testing.assert_allclose(found, np.take_along_axis(similarities, order, 1), atol=5e-7)


@pytest.mark.parametrize("temperature", [1e-3, 0.07, 100.0])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_vote_matches_the_formula(kind, scale, temperature):
    bank, queries, similarities = _similarities(kind, scale)
    labels = np.random.default_rng(3).integers(5, size=300)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :20]
    exponents = np.take_along_axis(similarities, order, 1) / temperature
    weights = np.exp(exponents - scipy.special.logsumexp(exponents, axis=1, keepdims=True))
    votes = np.stack([np.sum(weights * (labels[order] == c), axis=1) for c in range(5)], axis=1)
    votes = np.round(votes, 9)  # equal counts of equal weights are equal votes
    found = knn_predict(bank, labels, queries, num_classes=5, k=20, temperature=temperature)
    np.testing.assert_array_equal(found, votes.argmax(axis=1))


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-12, 1e-310])
def test_with_a_small_temperature_the_nearest_neighbor_decides(temperature):
    bank, queries, _ = _similarities("distinct", 1.0)
    labels = np.random.default_rng(3).integers(1, 9, size=300)  # class 0 is nobody's
    nearest = KNeighborsClassifier(1, metric="cosine").fit(bank, labels).predict(queries)
    found = knn_predict(bank, labels, queries, num_classes=9, k=20, temperature=temperature)
    np.testing.assert_array_equal(found, nearest)
    far = np.tile([[-1.0, 3.0]], (3, 1))  # and where all neighbors are equally far away, all vote
    found = knn_predict(
        far, np.asarray([2, 4, 4]), np.eye(2)[:1], num_classes=9, temperature=temperature
    )
    np.testing.assert_array_equal(found, [4])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_average_precision_matches_scikit_learn(kind, scale):
    bank, queries, similarities = _similarities(kind, scale)
    rng = np.random.default_rng(3)
    labels, wanted = rng.integers(4, size=300), rng.integers(4, size=40)
    expected = [
        average_precision_score(labels == label, row)
        for row, label in zip(similarities, wanted, strict=True)
    ]
    found = average_precisions(bank, labels, queries, wanted)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    alone = average_precisions(bank, labels, queries[:1], wanted[:1])
    np.testing.assert_allclose(alone, expected[:1], rtol=1e-6)
    if kind in ("constant", "zeros"):  # and the order of the gallery does not help
        ordered = np.sort(labels)
        found = average_precisions(bank, ordered, queries[:3], np.zeros(3, int))
        np.testing.assert_allclose(found, np.mean(labels == 0), rtol=1e-6)


def test_average_precision_of_one_class_two_samples_and_none():
    eye = np.eye(2, dtype=np.float32)
    one = np.zeros(2, int)
    np.testing.assert_allclose(average_precisions(eye, one, eye, one), 1)
    # The right sample is second, and then level with the wrong one.
    np.testing.assert_allclose(
        average_precisions(eye, np.asarray([0, 1]), eye[:1], np.asarray([1])), 0.5
    )
    level = np.ones((2, 2), np.float32)
    np.testing.assert_allclose(
        average_precisions(level, np.asarray([0, 1]), eye, np.asarray([0, 1])), 0.5
    )
    assert average_precisions(eye, one, eye[:0], one[:0]).shape == (0,)
    assert np.all(np.isnan(average_precisions(eye[:0], one[:0], eye, one)))


@pytest.mark.parametrize(
    ("clusters", "labels"),
    [
        (np.zeros(6, int), np.arange(6) % 2),  # one cluster
        (np.arange(6), np.arange(6) % 2),  # each its own
        (np.arange(6) % 3, np.zeros(6, int)),  # one class
        (np.zeros(6, int), np.zeros(6, int)),
        (np.asarray([0, 1]), np.asarray([5, 9])),
        (np.asarray([0, 0]), np.asarray([5, 9])),
        (np.asarray([3]), np.asarray([7])),
        # 5 samples in the largest classes of the clusters, 4 in the largest clusters of the classes
        (np.asarray([0, 0, 0, 1, 1, 2]), np.asarray([0, 0, 1, 0, 0, 1])),
    ],
)
def test_cluster_scores_match_scikit_learn_and_counting(clusters, labels):
    found = cluster_scores(clusters, labels)
    np.testing.assert_allclose(found.nmi, normalized_mutual_info_score(labels, clusters))
    np.testing.assert_allclose(found.adjusted_rand, adjusted_rand_score(labels, clusters))
    largest = [np.unique(labels[clusters == c], return_counts=True)[1].max() for c in set(clusters)]
    assert found.purity == sum(largest) / len(labels)
    assert found.clusters == len(set(clusters))


def test_constant_codes_give_one_cluster():
    alike = np.full((9, 4, 3), 1 / 3, np.float32)
    clusters = joint_clusters(alike, num_clusters=3)
    assert len(set(clusters)) == 1
    np.testing.assert_array_equal(agreement_between_segments(alike.argmax(axis=2)), np.zeros(4))
    two = np.asarray([[0, 0, 1], [1, 0, 0]])
    expected = [
        np.mean([normalized_mutual_info_score(two[:, i], two[:, j]) for j in range(3) if j != i])
        for i in range(3)
    ]
    np.testing.assert_allclose(agreement_between_segments(two), expected)


def _exp_entropy(values):
    p = values / values.sum() + 1e-7
    return np.exp(-np.sum(p * np.log(p)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zeros"])
def test_rankme_matches_the_formula_of_the_paper(kind, scale):
    for size in (16, 256):
        rows, chosen = _prototypes(kind, scale, size=size)
        if kind == "some zeros" and size == 256:
            rows *= np.logspace(-8, 0, size, dtype=np.float32)
        x = rows[chosen].astype(np.float64)
        expected = _exp_entropy(np.linalg.svd(x / scale, compute_uv=False))
        np.testing.assert_allclose(rankme(rows[chosen]), expected, rtol=1e-6)
    assert np.isnan(rankme(np.zeros((5, 3), np.float32)))
    np.testing.assert_allclose(rankme(np.asarray([[scale, 0], [0, -scale]])), 2, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("shape", [(60, 5, 12), (9, 3, 40), (2, 2, 3)])
def test_lidar_matches_the_formula_of_the_paper(shape, scale):
    rng = np.random.default_rng(0)
    views = rng.normal(size=(shape[0], 1, shape[2])) + 0.2 * rng.normal(size=shape)
    views = (scale * views).astype(np.float32)
    z = views.astype(np.float64)
    means = z.mean(axis=1)
    about = (z - means[:, None]).reshape(-1, shape[2]) / np.sqrt(shape[0] * shape[1])
    _, singular, directions = np.linalg.svd(about)
    variances = np.zeros(shape[2])
    variances[: len(singular)] = singular**2
    whitened = (means - means.mean(axis=0)) @ directions.T / np.sqrt(variances + 1e-4)
    eigenvalues = np.zeros(shape[2])
    squares = np.linalg.svd(whitened, compute_uv=False) ** 2
    eigenvalues[: len(squares)] = squares
    np.testing.assert_allclose(lidar(views), _exp_entropy(eigenvalues), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_lidar_and_alpha_req_of_constant_features_are_nan(value):
    assert np.isnan(lidar(np.full((7, 3, 5), value, np.float32)))
    assert np.isnan(alpha_req(np.full((7, 5), value, np.float32), first=1))
    assert np.isnan(alpha_req(np.asarray([[0.1, 0.2], [0.3, 0.1]]), first=1))  # one eigenvalue


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_alpha_req_is_the_weighted_fit_of_an_arbitrary_spectrum(scale):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 60)) * np.exp(-0.05 * np.arange(60)) + 0.3
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1][5:50]
    # Weighted least squares by its definition: Σ w (y - c + α x)² is least, w = 1 / rank.
    places = np.arange(6, 51)
    logs, weights = np.log(places), 1 / places
    matrix = np.stack([np.ones(45), -logs], axis=1)
    normal = matrix.T @ (weights[:, None] * matrix)
    _, alpha = np.linalg.solve(normal, matrix.T @ (weights * np.log(eigenvalues)))
    np.testing.assert_allclose(alpha_req(scale * x), alpha, rtol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_uniformity_and_alignment_match_the_formulas_of_the_paper(kind, scale):
    rows, chosen = _prototypes(kind, scale)
    unit = _unit(rows)[chosen]
    expected = np.log(np.mean(np.exp(-2 * pdist(unit, "sqeuclidean"))))
    for block_size in (7, 1024):
        found = uniformity(rows[chosen], block_size=block_size)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    other = np.random.default_rng(7).permutation(chosen)
    expected = np.mean(np.sum((unit - _unit(rows)[other]) ** 2, axis=1))
    np.testing.assert_allclose(alignment(rows[chosen], rows[other]), expected, atol=1e-12)


def test_uniformity_of_two_opposite_samples():
    for value in (1e-8, 1.0, 1e8):
        np.testing.assert_allclose(uniformity(np.float32([[value, 0], [-value, 0]])), -8, rtol=1e-6)
    np.testing.assert_allclose(uniformity(np.float32([[1, 2], [1, 2]])), 0, atol=1e-6)
    np.testing.assert_allclose(uniformity(np.float32([[0, 0], [1, 0]])), -2, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_standardize_matches_scikit_learn_at_extreme_scales(scale):
    rng = np.random.default_rng(5)
    columns = scale * np.logspace(-8, 8, 9) if scale == 1 else scale
    train, test = ((rng.normal(size=(n, 9)) * columns).astype(np.float32) for n in (300, 40))
    train[:, 4] = scale  # constant in training, but not after it
    train[:150], test[20:] = train[150:], test[:20]
    theirs = StandardScaler().fit(train.astype(np.float64))
    found = fit_scaling("standardize", lambda: train)
    np.testing.assert_allclose(found(test), theirs.transform(test), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found(train)[:, 4], 0)
    alike = np.full((5, 3), 0.1 * scale, np.float32)
    np.testing.assert_array_equal(fit_scaling("standardize", lambda: alike)(alike), 0)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_whiten_matches_the_formula_at_any_scale(scale):
    rng = np.random.default_rng(6)
    # Of rank 5 in 8 dimensions, one direction a thousand times as large, and a constant feature.
    x = rng.normal(size=(300, 5)) * (1000, 1, 1, 1, 0.1) @ rng.normal(size=(5, 8))
    x[:, 3] = 2
    train = (scale * x).astype(np.float32)
    exact = train.astype(np.float64)
    covariance = np.cov(exact.T, bias=True)
    variances, directions = np.linalg.eigh(covariance + 0.1 * np.trace(covariance) / 8 * np.eye(8))
    expected = (exact - exact.mean(axis=0)) @ (directions * variances**-0.5) @ directions.T
    found = fit_scaling("whiten", lambda: train)(train)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    alike = np.full((5, 3), 0.1 * scale, np.float32)
    np.testing.assert_array_equal(fit_scaling("whiten", lambda: alike)(alike), 0)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_few_shot_does_not_depend_on_the_scale(scale):
    rows, chosen = _prototypes("duplicates", 1.0)
    x = rows[chosen] + np.random.default_rng(8).normal(size=(300, 16)).astype(np.float32)
    labels = chosen % 4
    train, test = (x[:200], labels[:200]), (x[200:], labels[200:])
    power = np.float32(2.0 ** round(np.log2(scale)))  # by which nothing is rounded
    expected = few_shot(*train, *test, shots=3, draws=3, seed=1)
    found = few_shot(power * train[0], train[1], power * test[0], test[1], shots=3, draws=3, seed=1)
    np.testing.assert_array_equal(found, expected)
    shots = draw_shots(train[1], 3, seed=1)
    theirs = LogisticRegression(C=len(shots), max_iter=5000, tol=1e-8)
    theirs.fit(_unit(x)[:200][shots], train[1][shots])
    assert expected[0] == theirs.score(_unit(x)[200:], test[1])


def test_few_shot_with_a_single_class_predicts_that_class():
    x, seen = np.random.default_rng(0).normal(size=(8, 3)), []
    found = few_shot(
        x,
        np.full(8, 2),
        x,
        np.asarray([2, 2, 2, 2, 2, 1, 0, 3]),
        shots=1,
        draws=2,
        after_draw=lambda: seen.append(1),
    )
    np.testing.assert_array_equal(found, [5 / 8, 5 / 8])
    assert len(seen) == 2


def test_ranks_count_ties_and_nan_against_the_label():
    scores = np.asarray([[3, 1, 2.0], [2, 2, 1], [0, 0, 0], [np.nan, 1, 0], [np.inf, 1, np.inf]])
    for label, expected in enumerate(([0, 1, 2, 2, 1], [2, 1, 2, 1, 2], [1, 2, 2, 2, 1])):
        np.testing.assert_array_equal(ranks(scores, np.full(5, label)), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_segments_of_a_collapsed_network_share_no_information(dtype):
    alike = np.tile(np.asarray([0.5, 0.25, 0.25], dtype), (301, 4, 1))
    found = measure_segments(alike)
    np.testing.assert_allclose(found.mutual_information, 0, atol=1e-12)
    np.testing.assert_allclose(found.usage, np.tile([0.5, 0.25, 0.25], (4, 1)))
    np.testing.assert_allclose(found.usage_entropy, 1.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(found.assignment_entropy, 1.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(found.confidence, 0.5)
    np.testing.assert_array_equal(found.dead_units, 2)


def test_mutual_information_of_duplicates_and_two_samples():
    rng = np.random.default_rng(9)
    codes = rng.integers(4, size=(12, 3))[rng.integers(12, size=5000)]
    for some in (codes, codes[:2], codes[:1]):
        found = mutual_information(np.eye(4, dtype=np.float32)[some])
        expected = [[mutual_info_score(a, b) for a in some.T] for b in some.T]
        np.testing.assert_allclose(found, expected, atol=1e-7)


def test_interval_of_equal_values_has_zero_width():
    assert mean_interval([0.1, 0.1, 0.1]) == pytest.approx((0.1, 0), abs=1e-15)
    # t of one degree of freedom is 12.706: 0.1 / sqrt(2) * 12.706 / sqrt(2).
    np.testing.assert_allclose(mean_interval([0.4, 0.5]), (0.45, 0.05 * 12.7062047), rtol=1e-8)
