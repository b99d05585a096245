"""What the segments of a MUSIC embedding do: how they use their units, and what they share."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from music_jax.objectives import music_terms


class SegmentMeasures(NamedTuple):
    """Measures of the segments' probabilities; entropies and information in nats.

    Attributes:
      usage_entropy: of each segment's mean probabilities, [segments]; at most log K.
      usage: each unit's mean probability, [segments, units].
      dead_units: how many units of each segment are the most probable one for no sample,
        int [segments].
      confidence: mean over the samples of the largest probability, [segments]; 1/K to 1.
      assignment_entropy: mean over the samples of their probabilities' entropy, [segments].
      information: of the samples about the unit, usage_entropy - assignment_entropy, [segments].
      mutual_information: between two segments, [segments, segments]; see `mutual_information`.
    """

    usage_entropy: np.ndarray
    usage: np.ndarray
    dead_units: np.ndarray
    confidence: np.ndarray
    assignment_entropy: np.ndarray
    information: np.ndarray
    mutual_information: np.ndarray


def measure_segments(probabilities: np.ndarray) -> SegmentMeasures:
    """All measures that need one view of each sample and no label.

    Args:
      probabilities: [samples, segments, units], as `music_jax.objectives.segment_probabilities`.

    Returns:
      The measures.

    Raises:
      ValueError: the probabilities are not as described.
    """
    p = _checked(probabilities)
    usage = p.mean(axis=0, dtype=np.float64)
    usage /= usage.sum(axis=-1, keepdims=True)
    units = p.shape[2]
    chosen = p.argmax(axis=2)  # [samples, segments]
    used = np.stack([np.bincount(codes, minlength=units) for codes in chosen.T])
    usage_entropy = _entropy(usage)
    assignment_entropy = _entropy(p).mean(axis=0, dtype=np.float64)
    return SegmentMeasures(
        usage_entropy=usage_entropy,
        usage=usage,
        dead_units=np.sum(used == 0, axis=1),
        confidence=p.max(axis=2).mean(axis=0, dtype=np.float64),
        assignment_entropy=assignment_entropy,
        information=usage_entropy - assignment_entropy,
        mutual_information=mutual_information(p),
    )


def mutual_information(probabilities: np.ndarray) -> np.ndarray:
    r"""Mutual information between the units of each two segments, in nats.

    .. math::

      I_{st} = \sum_{kl} P_{kl} \log \frac{P_{kl}}{P_k P_l}, \quad
      P_{kl} = \frac{1}{N} \sum_n p_{nsk} \, p_{ntl}

    Independent segments have 0, but for a bias of about (K - 1)² / 2N that is left in. On the
    diagonal, the two units are drawn independently given the sample.

    Args:
      probabilities: [samples, segments, units]; for hard assignments, one-hot.

    Returns:
      float64 [segments, segments], symmetric.

    Raises:
      ValueError: the probabilities are not as described.
    """
    p = _checked(probabilities)
    samples, segments, units = p.shape
    flat = jnp.asarray(p.reshape(samples, segments * units))
    information = np.empty((segments, segments))
    for s in range(segments):  # a segment's rows of P at a time: [units, segments * units]
        rows = np.asarray(_product(flat[:, s * units : (s + 1) * units], flat), np.float64)
        joint = rows.reshape(units, segments, units)
        joint /= joint.sum(axis=(0, 2), keepdims=True)
        # By the marginals of the same sums, rounding leaves no information where there is none.
        independent = joint.sum(axis=2, keepdims=True) * joint.sum(axis=0, keepdims=True)
        ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
        information[s] = np.sum(joint * np.log(ratio), axis=(0, 2))
    return np.maximum((information + information.T) / 2, 0.0)


@jax.jit
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST) / a.shape[0]


class BoundDistances(NamedTuple):
    """How far each term of the objective is above its least value, in nats.

    Attributes:
      diagonal: above -log K.
      cross_segment: above -2 log K.
      invariance: above 0.
      total: above -3 log K, of the three at weight 1.
    """

    diagonal: float
    cross_segment: float
    invariance: float
    total: float


def bound_distances(
    embeddings_a: np.ndarray,
    embeddings_b: np.ndarray,
    *,
    num_segments: int,
    temperature: float = 1.0,
) -> BoundDistances:
    """The objective's distance to its bound, term by term, all samples being one batch.

    With two units a segment, `diagonal` alone may be below 0, but never its sum with `invariance`.

    Args:
      embeddings_a: [samples, dim], the first view.
      embeddings_b: [samples, dim], the second view of the same samples.
      num_segments: number of segments S.
      temperature: the softmax's temperature.

    Returns:
      The distances.

    Raises:
      ValueError: as `music_jax.objectives.music_terms`.
    """
    terms = music_terms(
        jnp.asarray(embeddings_a),
        jnp.asarray(embeddings_b),
        num_segments=num_segments,
        temperature=temperature,
    )
    log_units = math.log(embeddings_a.shape[1] // num_segments)
    distances = (
        float(terms.diagonal) + log_units,
        float(terms.cross_segment) + 2 * log_units,
        float(terms.invariance),
    )
    return BoundDistances(*distances, sum(distances))


def _entropy(p: np.ndarray) -> np.ndarray:
    """Of the last axis."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def _checked(probabilities: np.ndarray) -> np.ndarray:
    p = np.asarray(probabilities)
    if p.ndim != 3 or 0 in p.shape:
        raise ValueError(f"expected probabilities [samples, segments, units]; got {p.shape}")
    return p if p.dtype == np.float64 else p.astype(np.float32)
