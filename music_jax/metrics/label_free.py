"""Measures of the quality of features that need no labels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # which imports its modules when they are used

from music_jax.metrics.knn import unit_length

_EPSILON = 1e-7  # added by RankMe and LiDAR, to keep the logarithm finite


def rankme(features: np.ndarray) -> float:
    r"""Returns RankMe: the effective rank, a smooth count of the directions that features use.

    .. math::

      \exp(-\sum_k p_k \log p_k), \quad p_k = \frac{\sigma_k}{\sum_j \sigma_j} + 10^{-7}

    with the singular values of the features, which are not centered.

    Args:
      features: Features, [samples, features]; the paper takes 25,600 samples.

    Returns:
      A number between 1 and min(samples, features); NaN if all features are zero.

    Raises:
      ValueError: The shape does not match.

    Reference:
      Garrido et al., `RankMe <https://arxiv.org/abs/2210.02885>`_, 2023
    """
    return _exp_entropy(_singular_values(_checked(features, ndim=2)))


def lidar(views: np.ndarray, *, delta: float = 1e-4) -> float:
    r"""Returns LiDAR: the effective rank of the differences between images, relative to views.

    Each image is a class of its own. :math:`\Sigma_b` is the covariance of the classes' means and
    :math:`\Sigma_w` that of the views about the mean of their class, plus :math:`\delta I`. Then

    .. math::

      \exp(-\sum_i p_i \log p_i), \quad p_i = \frac{\lambda_i}{\sum_j \lambda_j} + 10^{-7}

    over the eigenvalues of :math:`\Sigma_w^{-1/2} \Sigma_b \Sigma_w^{-1/2}`.

    Args:
      views: Features of several views of each image, [images, views, features]; the paper takes at
        least 1,000 images and 10 to 50 views.
      delta: Number added to the diagonal of the covariance within classes.

    Returns:
      A number between 1 and min(images - 1, features); NaN if all images have the same mean.

    Raises:
      ValueError: The shape does not match.

    Reference:
      Thilak et al., `LiDAR <https://arxiv.org/abs/2312.04000>`_, 2023
    """
    views = _checked(views, ndim=3)
    images, num_views, size = views.shape
    views = views - views[0, 0]  # so that constant features are exactly zero
    means = views.mean(axis=1)  # [images, features]
    within = (views - means[:, None]).reshape(-1, size)
    between = (means - means.mean(axis=0)) / np.sqrt(images)  # its Gram matrix is Σ_b
    # Rᵀ R = Σ_w. Unlike a Cholesky decomposition of Σ_w, this keeps δ beside large features.
    stacked = np.concatenate([within / np.sqrt(images * num_views), np.sqrt(delta) * np.eye(size)])
    factor = np.linalg.qr(stacked, mode="r")  # [features, features]
    # R⁻ᵀ Σ_b R⁻¹ has the same eigenvalues: the squares of R⁻ᵀ betweenᵀ's singular values.
    whitened = scipy.linalg.solve_triangular(factor, between.T, trans="T")
    eigenvalues = np.zeros(size)
    found = _singular_values(whitened) ** 2
    eigenvalues[: len(found)] = found
    return _exp_entropy(eigenvalues)


def alpha_req(features: np.ndarray, *, first: int = 6, last: int = 50) -> float:
    r"""Returns α-ReQ: the exponent of the power law by which the covariance's spectrum decays.

    α is the slope in :math:`\log \lambda_i = c - \alpha \log i`, fitted by least squares with the
    weights 1/i. The paper finds the best representations near α = 1.

    Args:
      features: Features, [samples, features].
      first: Rank of the first fitted eigenvalue, from 1.
      last: Rank of the last one, at most the numerical rank.

    Returns:
      α; NaN if fewer than two eigenvalues from `first` on are positive.

    Raises:
      ValueError: The shape does not match.

    Reference:
      Agrawal et al., `α-ReQ <https://openreview.net/forum?id=ii9X4vtZGTZ>`_, 2022; the weights are
      those of Stringer et al., `High-dimensional geometry of population responses in visual cortex
      <https://doi.org/10.1038/s41586-019-1346-5>`_, 2019
    """
    features = _checked(features, ndim=2)
    features = features - features[0]  # so that constant features are exactly zero
    singular = _singular_values(features - features.mean(axis=0))
    floor = singular[0] * max(features.shape) * np.finfo(np.float32).eps
    eigenvalues = singular[singular > floor] ** 2 / len(features)
    ranks = np.arange(first, min(last, len(eigenvalues)) + 1)
    if len(ranks) < 2:
        return float("nan")
    # polyfit's weights multiply the residuals, not their squares.
    slope, _ = np.polyfit(np.log(ranks), np.log(eigenvalues[ranks - 1]), 1, w=ranks**-0.5)
    return float(-slope)


def alignment(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Returns the mean squared distance between two views, after scaling to unit length.

    Args:
      features_a: Features of one view of each image, [images, features].
      features_b: Features of another view of each image, [images, features].

    Returns:
      A number in [0, 4]; smaller is better.

    Raises:
      ValueError: The shapes differ or are not [images, features].

    Reference:
      Wang & Isola, `Understanding Contrastive Representation Learning through Alignment and
      Uniformity on the Hypersphere <https://arxiv.org/abs/2005.10242>`_, 2020
    """
    a, b = (unit_length(_checked(x, ndim=2), np.float64) for x in (features_a, features_b))
    if a.shape != b.shape:
        raise ValueError(f"expected two views of one shape; got {a.shape} and {b.shape}")
    return float(np.mean(np.sum((a - b) ** 2, axis=1)))


def uniformity(features: np.ndarray, *, t: float = 2.0, block_size: int = 1024) -> float:
    r"""Returns the log of the mean Gaussian potential of all pairs, after scaling to unit length.

    .. math::

      \log \frac{1}{N (N - 1)} \sum_{i \neq j} \exp(-t \lVert z_i - z_j \rVert^2)

    Args:
      features: Features of two or more samples, [samples, features].
      t: Factor of the squared distance.
      block_size: Number of samples compared with all others at once.

    Returns:
      A number in [-4 t, 0]; smaller (more uniform) is better.

    Raises:
      ValueError: The shape does not match.

    Reference:
      See `alignment`.
    """
    unit = unit_length(_checked(features, ndim=2), np.float64).astype(np.float32)
    count = len(unit)
    if count < 2:
        raise ValueError(f"expected two samples or more; got {count}")
    on_device = jnp.asarray(unit)
    total = 0.0
    for start in range(0, count, block_size):
        block = jnp.asarray(unit[start : start + block_size])
        total += np.sum(np.asarray(_potentials(block, start, on_device, t)), dtype=np.float64)
    return float(np.log(total / (count * (count - 1))))


@functools.partial(jax.jit, static_argnames="t")
def _potentials(block: jax.Array, start: int, unit: jax.Array, t: float) -> jax.Array:
    """Returns the sum of exp(-t distance²) over all others for the rows of `unit` from `start`."""
    products = jnp.matmul(block, unit.T, precision=jax.lax.Precision.HIGHEST)
    lengths = jnp.sum(block**2, axis=1)[:, None] + jnp.sum(unit**2, axis=1)[None]  # 0 or 1 each
    potentials = jnp.exp(-t * jnp.maximum(lengths - 2 * products, 0))
    is_self = (start + jnp.arange(len(block)))[:, None] == jnp.arange(len(unit))[None]
    return jnp.sum(jnp.where(is_self, 0, potentials), axis=1)


def _singular_values(x: np.ndarray) -> np.ndarray:
    """Returns the singular values in descending order, float64.

    They are the roots of the eigenvalues of the smaller Gram matrix, which is several times faster
    than a decomposition of the matrix itself. By rounding, zero eigenvalues become about 20 eps
    of the largest, so singular values below 1e-7 of the largest are 0.
    """
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    eigenvalues = scipy.linalg.eigvalsh(gram)[::-1]
    rounding = 64 * np.finfo(np.float64).eps * eigenvalues[0]
    return np.sqrt(np.where(eigenvalues > rounding, eigenvalues, 0.0))


def _exp_entropy(values: np.ndarray) -> float:
    total = np.sum(values)
    if not total > 0:
        return float("nan")
    p = values / total + _EPSILON
    return float(np.exp(-np.sum(p * np.log(p))))


def _checked(features: np.ndarray, *, ndim: int) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != ndim or 0 in features.shape:
        axes = "[samples, features]" if ndim == 2 else "[images, views, features]"
        raise ValueError(f"expected features {axes}, none of them empty; got {features.shape}")
    return features
