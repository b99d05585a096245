"""Weighted kNN against scikit-learn's."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from music_jax.metrics.knn import knn_predict, nearest_neighbors, unit_length


def _digits():
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    images = (images + rng.normal(0, 4, images.shape)).astype(np.float32)  # so that votes differ
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


@pytest.mark.parametrize(
    ("k", "temperature"), [(1, 0.07), (10, 0.07), (20, 0.07), (200, 0.07), (200, 0.5)]
)
def test_predictions_match_scikit_learn(k, temperature):
    train, train_labels, test, _ = _digits()
    theirs = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    ).fit(train, train_labels)
    expected = theirs.predict(test)
    found = knn_predict(
        train, train_labels, test, num_classes=10, k=k, temperature=temperature, block_size=100
    )
    assert np.mean(np.asarray(found) == expected) >= 0.998


def test_predictions_do_not_depend_on_the_block_size():
    train, train_labels, test, _ = _digits()
    found = [
        np.asarray(knn_predict(train, train_labels, test, num_classes=10, block_size=size))
        for size in (64, 597, 1000)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_neighbors_do_not_depend_on_the_bank_block_size():
    train, _, test, _ = _digits()
    whole = nearest_neighbors(train, test, k=30)
    blocks = nearest_neighbors(train, test, k=30, bank_block_size=97)
    np.testing.assert_allclose(blocks[0], whole[0], atol=1e-6)
    theirs = NearestNeighbors(n_neighbors=30, metric="cosine", algorithm="brute").fit(train)
    distances, rows = theirs.kneighbors(test)
    np.testing.assert_allclose(1 - whole[0], distances, atol=1e-6)
    assert np.mean(whole[1] == rows) > 0.98
    assert np.mean(blocks[1] == rows) > 0.98


@pytest.mark.parametrize(("block_size", "bank_block_size"), [(5, 9), (64, 9), (64, 100)])
def test_a_bank_smaller_than_k_is_ranked_completely(block_size, bank_block_size):
    train, _, test, _ = _digits()
    sizes = {"block_size": block_size, "bank_block_size": bank_block_size}
    similarities, rows = nearest_neighbors(train[:23], test[:7], k=40, **sizes)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (test[:7], train[:23])]
    expected = unit[0] @ unit[1].T
    np.testing.assert_array_equal(rows, np.argsort(-expected, axis=1))
    np.testing.assert_allclose(similarities, -np.sort(-expected, axis=1), atol=1e-6)


def test_float64_features_are_scaled_before_rounding():
    found = unit_length(np.asarray([[3e200, -4e200], [5e-200, 12e-200]]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[3 / 5, -4 / 5], [5 / 13, 12 / 13]], rtol=1e-6)


def test_nearer_neighbors_outvote_more_distant_ones():
    train = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    labels = jnp.asarray([0, 1, 1])
    test = jnp.asarray([[1.0, 0.1]])
    near = knn_predict(train, labels, test, num_classes=2, k=3, temperature=0.07)
    level = knn_predict(train, labels, test, num_classes=2, k=3, temperature=100.0)
    assert (int(near[0]), int(level[0])) == (0, 1)


def test_fewer_training_samples_than_k_all_vote():
    train, labels = jnp.eye(3), jnp.asarray([0, 1, 2])
    np.testing.assert_array_equal(knn_predict(train, labels, train, num_classes=3, k=20), labels)


def test_mismatched_shapes_are_errors():
    with pytest.raises(ValueError, match="one label for each of 3"):
        knn_predict(jnp.eye(3), jnp.asarray([0, 1]), jnp.eye(3), num_classes=2)
    with pytest.raises(ValueError, match="one size"):
        knn_predict(jnp.eye(3), jnp.asarray([0, 1, 1]), jnp.ones((2, 4)), num_classes=2)
