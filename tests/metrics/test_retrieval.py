"""Average precision against scikit-learn's."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from music_jax.metrics import retrieval


@pytest.mark.parametrize("similarities", [10, 10_000, 2**24])  # 10: fewer than the gallery has
def test_average_precisions_match_scikit_learn(similarities, monkeypatch):
    monkeypatch.setattr(retrieval, "_SIMILARITIES", similarities)
    images, labels = load_digits(return_X_y=True)
    images = (images + np.random.default_rng(0).normal(size=images.shape)).astype(np.float32)
    gallery, queries = images[:1000], images[1000:1107]
    found = retrieval.average_precisions(gallery, labels[:1000], queries, labels[1000:1107])
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery)]
    scores = unit[0].astype(np.float64) @ unit[1].T
    expected = [
        average_precision_score(labels[:1000] == label, row)
        for row, label in zip(scores, labels[1000:1107], strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_average_precision_is_nan_for_labels_missing_in_the_gallery():
    eye = np.eye(3, dtype=np.float32)
    found = retrieval.average_precisions(eye, np.asarray([0, 1, 1]), eye, np.asarray([0, 1, 7]))
    np.testing.assert_allclose(found[0], 1)
    assert np.isnan(found[2])
    with pytest.raises(ValueError, match="gallery: got 3 features but 2 labels"):
        retrieval.average_precisions(eye, np.asarray([0, 1]), eye, np.asarray([0, 1, 7]))
    for sizes in ((3, 4), (4, 3)):
        gallery, queries = (np.ones((3, size), np.float32) for size in sizes)
        with pytest.raises(ValueError, match=r"features of one size; got \d \(gallery\)"):
            retrieval.average_precisions(gallery, np.arange(3), queries, np.arange(3))
