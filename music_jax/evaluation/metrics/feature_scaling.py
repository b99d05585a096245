"""How features are scaled for a linear classifier: a fixed affine map, learned without labels."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

Features = Any  # an array of NumPy or of JAX

FEATURE_SCALINGS = ("none", "standardize", "whiten")
_WHITENING_FLOOR = 0.1  # of the mean variance, added to every direction's
_BLOCK = 8192  # samples that are summed at once, in float64


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """An affine map of features; a linear classifier behind it is one of the features themselves.

    Attributes:
      mean: [features], is subtracted.
      scale: [features], is multiplied with, or [features, features], from the right.
    """

    mean: np.ndarray
    scale: np.ndarray

    def __call__(self, features: Features) -> Features:
        """Features [samples, features] of NumPy or of JAX, scaled."""
        centerd = features - self.mean[None]
        if self.scale.ndim == 1:
            return centerd * self.scale[None]
        if isinstance(centerd, np.ndarray):
            return centerd @ self.scale
        return jnp.matmul(centerd, self.scale, precision="highest")  # not in bfloat16, as on TPUs


def fit_scaling(name: str, features: Callable[[], np.ndarray]) -> Callable[[Features], Features]:
    """Learns a scaling from training features; neither depends on the features' scale.

    `standardize` gives each feature the mean 0 and the deviation 1; like scikit-learn's
    `StandardScaler`, it leaves the scale of a constant feature. `whiten` also takes away what they
    share: the symmetric inverse root of their covariance, a tenth of the mean variance being
    added to the variance of every direction, so that directions that hold next to nothing are not
    blown up (ZCA: Kessy, Lewin & Strimmer, arXiv 1512.00809; the ridge is ours). It makes the
    classifier's problem well conditioned, so that SGD solves it in few epochs.

    Args:
      name: one of `FEATURE_SCALINGS`; `none` is the identity.
      features: gives float32 [samples, features]; is not called for `none`.

    Returns:
      The map.

    Raises:
      ValueError: there is no such scaling.
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
        scale = 1 / np.where(constant, 1, np.sqrt(variances))
    else:
        covariance = sum(block.T @ block for block in centered) / len(train)
        variances, directions = np.linalg.eigh(covariance)
        floor = _WHITENING_FLOOR * np.trace(covariance) / len(mean)
        roots = np.sqrt(np.maximum(variances, 0) + floor)
        scale = (directions / np.where(roots > 0, roots, 1)) @ directions.T
    return Scaling(mean.astype(np.float32), scale.astype(np.float32))
