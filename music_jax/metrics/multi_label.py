"""Loss and average precision for images of several classes, some of which may be unknown.

Labels are integers [samples, classes]: 1 if the sample has the class, 0 if not, negative if it is
unknown.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def sigmoid_losses(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the binary cross-entropy of each sample, summed over the classes that are known.

    Args:
      scores: Logits, [..., classes].
      labels: Labels, of the same rank.
    """
    losses = optax.losses.sigmoid_binary_cross_entropy(scores, labels == 1)
    return jnp.sum(jnp.where(labels >= 0, losses, 0), axis=-1)


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    r"""Returns the average precision of each class; see `mean_average_precision`.

    .. math::

      AP = \sum_n (R_n - R_{n-1}) P_n

    with the precision P and the recall R at each threshold n. The samples of equal scores share a
    threshold, so that constant scores give the share of positive samples. Samples whose class is
    unknown take no part. This is `sklearn.metrics.average_precision_score` of the known samples.

    Args:
      scores: Scores, finite numbers [samples, classes].
      labels: Labels, [samples, classes].

    Returns:
      float64 [classes], in [0, 1]; NaN for a class without a positive sample.

    Raises:
      ValueError: The shapes differ.
    """
    if scores.shape != labels.shape or scores.ndim != 2:
        raise ValueError(
            f"expected scores and labels [samples, classes]; got {scores.shape} and {labels.shape}"
        )
    columns = zip(scores.T, labels.T, strict=True)
    return np.asarray([_average_precision(*column) for column in columns])


def _average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    known = np.flatnonzero(labels >= 0)
    order = known[np.argsort(-scores[known], kind="stable")]
    ranked = scores[order]
    is_last = np.append(ranked[1:] != ranked[:-1], True)[: len(order)]  # of equal scores
    found = np.cumsum(labels[order] == 1)[is_last]
    if not len(found) or not found[-1]:
        return np.nan
    precision = found / (np.flatnonzero(is_last) + 1)
    return float(np.sum(np.diff(found, prepend=0) * precision) / found[-1])


def mean_average_precision(precisions: np.ndarray) -> float:
    """Returns the mean of the average precisions that are not NaN; 0 if there are none."""
    found = precisions[~np.isnan(precisions)]
    return float(np.mean(found)) if len(found) else 0.0
