"""Scaling of frozen features before a linear classifier."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

FEATURE_SCALINGS = ("none", "standardize", "whiten")

Features = Any  # an array of NumPy or of JAX

_WHITENING_FLOOR = 0.1  # share of the mean variance, added to that of every direction
_BLOCK = 8192  # samples processed at once


def fit_scaling(name: str, features: Callable[[], np.ndarray]) -> Callable[[Features], Features]:
    """Fits an affine map of features, without labels.

    `standardize` gives each feature mean 0 and standard deviation 1; like scikit-learn's
    `StandardScaler`, it does not scale constant features. `whiten` multiplies by the inverse square
    root of the covariance (ZCA: Kessy, Lewin & Strimmer, arXiv 1512.00809), after adding a tenth of
    the mean variance to its diagonal (our addition), so that directions of almost no variance are
    not amplified. The classifier's problem is then well conditioned, and SGD solves it in few
    epochs. Neither depends on the scale of the features.

    Args:
      name: One of `FEATURE_SCALINGS`; `none` is the identity.
      features: Function that returns training features, float32 [samples, features]. It is not
        called for `none`.

    Returns:
      A function from features [samples, features], of NumPy or JAX, to scaled features.

    Raises:
      ValueError: The name is unknown.
    """
    if name not in FEATURE_SCALINGS:
        raise ValueError(f"expected a scaling among {FEATURE_SCALINGS}; got {name!r}")
    if name == "none":
        return lambda unscaled: unscaled
    train = features()
    mean = train.mean(axis=0, dtype=np.float64)
    centered = (train[i : i + _BLOCK] - mean for i in range(0, len(train), _BLOCK))
    if name == "standardize":
        variances = sum(np.sum(block**2, axis=0) for block in centered) / len(train)
        # The variance that rounding leaves to a constant feature, as in scikit-learn.
        eps = np.finfo(np.float64).eps
        constant = variances <= (len(train) * eps * mean) ** 2
        factor = 1 / np.where(constant, 1, np.sqrt(variances))
    else:
        covariance = sum(block.T @ block for block in centered) / len(train)
        variances, directions = np.linalg.eigh(covariance)
        floor = _WHITENING_FLOOR * np.trace(covariance) / len(mean)
        roots = np.sqrt(np.maximum(variances, 0) + floor)
        factor = (directions / np.where(roots > 0, roots, 1)) @ directions.T
    mean, factor = mean.astype(np.float32), factor.astype(np.float32)

    def scale(unscaled: Features) -> Features:
        centered = unscaled - mean[None]
        if factor.ndim == 1:
            return centered * factor[None]
        with jax.default_matmul_precision("highest"):  # not in bfloat16, as on TPUs
            return centered @ factor

    return scale
