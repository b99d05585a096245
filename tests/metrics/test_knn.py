"""Weighted kNN and average precision against scikit-learn's."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from music_jax.metrics import knn
from music_jax.metrics.knn import (
    average_precisions,
    knn_predict,
    nearest_neighbors,
    unit_length,
)


def _digits():
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    images = (images + rng.normal(0, 4, images.shape)).astype(np.float32)  # so that votes differ
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_predictions_match_scikit_learn(temperature):
    train, train_labels, test, _ = _digits()
    ks = (1, 10, 20, 200)
    found = knn_predict(train, train_labels, test, num_classes=10, k=ks, temperature=temperature)
    for k, predicted in zip(ks, found, strict=True):
        theirs = KNeighborsClassifier(
            k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / temperature),
        ).fit(train, train_labels)
        assert np.mean(predicted == theirs.predict(test)) >= 0.998
        alone = knn_predict(train, train_labels, test, num_classes=10, k=k, temperature=temperature)
        np.testing.assert_array_equal(alone, predicted)


def test_neighbors_do_not_depend_on_the_block_size():
    train, _, test, _ = _digits()
    found = [nearest_neighbors(train, test, k=20, block_size=size)[1] for size in (64, 597, 1000)]
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
    with pytest.raises(ValueError, match="3 training features but 2 labels"):
        knn_predict(jnp.eye(3), jnp.asarray([0, 1]), jnp.eye(3), num_classes=2)
    with pytest.raises(ValueError, match="one size"):
        knn_predict(jnp.eye(3), jnp.asarray([0, 1, 1]), jnp.ones((2, 4)), num_classes=2)


@pytest.mark.parametrize("similarities", [10, 10_000, 2**24])  # 10: fewer than the gallery has
def test_average_precisions_match_scikit_learn(similarities, monkeypatch):
    monkeypatch.setattr(knn, "_SIMILARITIES", similarities)
    images, labels = load_digits(return_X_y=True)
    images = (images + np.random.default_rng(0).normal(size=images.shape)).astype(np.float32)
    gallery, queries = images[:1000], images[1000:1107]
    found = average_precisions(gallery, labels[:1000], queries, labels[1000:1107])
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery)]
    scores = unit[0].astype(np.float64) @ unit[1].T
    expected = [
        average_precision_score(labels[:1000] == label, row)
        for row, label in zip(scores, labels[1000:1107], strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_average_precision_is_nan_for_labels_missing_in_the_gallery():
    eye = np.eye(3, dtype=np.float32)
    found = average_precisions(eye, np.asarray([0, 1, 1]), eye, np.asarray([0, 1, 7]))
    np.testing.assert_allclose(found[0], 1)
    assert np.isnan(found[2])
    with pytest.raises(ValueError, match="3 gallery features but 2 labels"):
        average_precisions(eye, np.asarray([0, 1]), eye, np.asarray([0, 1, 7]))
    for sizes in ((3, 4), (4, 3)):
        gallery, queries = (np.ones((3, size), np.float32) for size in sizes)
        with pytest.raises(ValueError, match=r"features of one size; got \{'gallery'"):
            average_precisions(gallery, np.arange(3), queries, np.arange(3))
