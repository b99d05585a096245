"""Label-free measures against their papers' formulas in plain numpy, and scipy."""

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from music_jax.metrics.label_free import alignment, alpha_req, lidar, rankme, uniformity


def _features(samples=300, size=40, seed=0):
    rng = np.random.default_rng(seed)
    scales = np.arange(1, size + 1) ** -0.7
    return (rng.normal(size=(samples, size)) * scales + 0.3).astype(np.float32)


def _views(images, views, size, seed=0):
    rng = np.random.default_rng(seed)
    of_image = rng.normal(size=(images, 1, size)) * np.arange(1, size + 1) ** -0.5
    return (of_image + 0.2 * rng.normal(size=(images, views, size))).astype(np.float32)


def test_rankme_matches_the_formula_of_the_paper():
    z = _features().astype(np.float64)
    sigma = np.sqrt(np.maximum(np.linalg.eigvalsh(z.T @ z), 0))
    p = sigma / sigma.sum() + 1e-7
    np.testing.assert_allclose(rankme(z), np.exp(-np.sum(p * np.log(p))), rtol=1e-9)


def test_rankme_counts_equally_used_directions():
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(50, 50)))[0]
    np.testing.assert_allclose(rankme(basis[:, :7] @ basis[:7]), 7, rtol=1e-4)
    assert np.isnan(rankme(np.zeros((5, 3))))


@pytest.mark.parametrize(("images", "views", "size"), [(60, 5, 12), (9, 3, 20)])
def test_lidar_matches_the_formula_of_the_paper(images, views, size):
    z = _views(images, views, size).astype(np.float64)
    between, within = np.zeros((size, size)), 1e-4 * np.eye(size)
    of_all = z.mean(axis=(0, 1))
    for image in z:
        mean = image.mean(axis=0)
        between += np.outer(mean - of_all, mean - of_all) / images
        for view in image:
            within += np.outer(view - mean, view - mean) / (images * views)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.maximum(np.linalg.eigvalsh(root @ between @ root), 0)
    p = eigenvalues / eigenvalues.sum() + 1e-7
    np.testing.assert_allclose(lidar(z), np.exp(-np.sum(p * np.log(p))), rtol=1e-6)


def test_alpha_req_of_a_power_law_is_its_exponent():
    rng = np.random.default_rng(2)
    size = 80
    left = rng.normal(size=(500, size))
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    right = np.linalg.qr(rng.normal(size=(size, size)))[0]
    features = left * np.arange(1, size + 1) ** (-1.3 / 2) @ right.T + 5.0
    np.testing.assert_allclose(alpha_req(features), 1.3, rtol=1e-6)
    assert np.isnan(alpha_req(features[:, :1]))


def test_uniformity_and_alignment_match_wang_and_isola():
    z = _features()
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    expected = np.log(np.mean(np.exp(-2 * pdist(unit.astype(np.float64), "sqeuclidean"))))
    for block_size in (64, 1024):
        np.testing.assert_allclose(uniformity(3 * z, block_size=block_size), expected, rtol=1e-5)
    other = np.roll(unit, 1, axis=0)
    expected = np.mean(np.linalg.norm(unit - other, axis=1) ** 2)
    np.testing.assert_allclose(alignment(2 * z, 5 * other), expected, rtol=1e-5)


def test_unexpected_shapes_are_errors():
    for measure in (rankme, alpha_req, uniformity):
        with pytest.raises(ValueError, match=r"expected features \[samples, features\]"):
            measure(np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"\[images, views, features\]"):
        lidar(np.ones((2, 3)))
    with pytest.raises(ValueError, match="views of one shape"):
        alignment(np.ones((2, 3)), np.ones((2, 4)))
