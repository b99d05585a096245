"""Metrics of the segments of a MUSIC embedding: usage, shared information, and clusters."""

import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # which imports its modules when they are used

from music_jax.objectives import music_terms


class SegmentMeasures(NamedTuple):
    """Metrics of the probabilities of segments; entropies and information in nats.

    Attributes:
      usage_entropy: Entropy of each segment's mean probabilities, [segments]; at most log K.
      usage: Mean probability of each unit, [segments, units].
      dead_units: Number of units of each segment that are the most probable one for no sample, int
        [segments].
      confidence: Mean over the samples of the largest probability, [segments]; 1/K to 1.
      assignment_entropy: Mean over the samples of their probabilities' entropy, [segments].
      information: Mutual information of sample and unit, usage_entropy - assignment_entropy,
        [segments].
      mutual_information: Mutual information of two segments, [segments, segments].
    """

    usage_entropy: np.ndarray
    usage: np.ndarray
    dead_units: np.ndarray
    confidence: np.ndarray
    assignment_entropy: np.ndarray
    information: np.ndarray
    mutual_information: np.ndarray


def measure_segments(probabilities: np.ndarray) -> SegmentMeasures:
    """Computes all metrics that need one view of each sample and no labels.

    Args:
      probabilities: Output of `music_jax.objectives.segment_probabilities`, [samples, segments,
        units].

    Raises:
      ValueError: The shape does not match.
    """
    p = _checked(probabilities)
    usage = p.mean(axis=0, dtype=np.float64)
    usage /= usage.sum(axis=-1, keepdims=True)
    units = p.shape[2]
    codes = p.argmax(axis=2)  # [samples, segments]
    used = np.stack([np.bincount(code, minlength=units) for code in codes.T])
    usage_entropy = scipy.special.entr(usage).sum(axis=-1)
    assignment_entropy = scipy.special.entr(p).sum(axis=-1).mean(axis=0, dtype=np.float64)
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
    r"""Returns the mutual information between the units of each pair of segments, in nats.

    .. math::

      I_{st} = \sum_{kl} P_{kl} \log \frac{P_{kl}}{P_k P_l}, \quad
      P_{kl} = \frac{1}{N} \sum_n p_{nsk} \, p_{ntl}

    Independent segments have 0, up to a bias of about (K - 1)² / 2N that is not corrected. On the
    diagonal, the two units are drawn independently given the sample.

    Args:
      probabilities: Probabilities, [samples, segments, units]; one-hot for hard assignments.

    Returns:
      float64 [segments, segments], symmetric.

    Raises:
      ValueError: The shape does not match.
    """
    p = _checked(probabilities)
    samples, segments, units = p.shape
    flat = jnp.asarray(p.reshape(samples, segments * units))
    information = np.empty((segments, segments))
    for s in range(segments):  # P's rows of one segment at a time: [units, segments * units]
        rows = np.asarray(_product(flat[:, s * units : (s + 1) * units], flat), np.float64)
        joint = rows.reshape(units, segments, units)
        joint /= joint.sum(axis=(0, 2), keepdims=True)
        # Marginals of the same sums: rounding leaves no information where there is none.
        independent = joint.sum(axis=2, keepdims=True) * joint.sum(axis=0, keepdims=True)
        ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
        information[s] = np.sum(joint * np.log(ratio), axis=(0, 2))
    return np.maximum((information + information.T) / 2, 0.0)


@jax.jit
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST) / a.shape[0]


def gap_to_bound(
    embeddings_a: np.ndarray,
    embeddings_b: np.ndarray,
    *,
    num_segments: int,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Returns the gap between the MUSIC objective and its lower bound, with all samples in a batch.

    With two units per segment, `diagonal` alone may be below 0, but never its sum with
    `invariance`.

    Args:
      embeddings_a: Embeddings of the first view, [samples, dim].
      embeddings_b: Embeddings of the second view of the same samples, [samples, dim].
      num_segments: Number of segments S.
      temperature: Softmax temperature.

    Returns:
      The differences in nats between `diagonal` and -log K, `cross_segment` and -2 log K,
      `invariance` and 0, and their sum `total`, the difference to -3 log K with all weights 1.

    Raises:
      ValueError: See `music_jax.objectives.music_terms`.
    """
    terms = music_terms(
        jnp.asarray(embeddings_a),
        jnp.asarray(embeddings_b),
        num_segments=num_segments,
        temperature=temperature,
    )
    log_units = math.log(embeddings_a.shape[1] // num_segments)
    gaps = {
        "diagonal": float(terms.diagonal) + log_units,
        "cross_segment": float(terms.cross_segment) + 2 * log_units,
        "invariance": float(terms.invariance),
    }
    return gaps | {"total": sum(gaps.values())}


class ClusterScores(NamedTuple):
    """Agreement of a clustering with labels.

    Attributes:
      nmi: Mutual information, normalized by the arithmetic mean of the entropies; in [0, 1].
      adjusted_rand: Adjusted Rand index: 0 on average for random clusters, 1 for the labels.
      accuracy: Accuracy of the best one-to-one match of clusters and labels (the Hungarian method);
        samples of unmatched clusters count as wrong.
      purity: Accuracy of the most frequent label of each cluster.
      clusters: Number of clusters that have a sample.
    """

    nmi: float
    adjusted_rand: float
    accuracy: float
    purity: float
    clusters: int


def cluster_scores(clusters: np.ndarray, labels: np.ndarray) -> ClusterScores:
    """Compares a clustering with labels.

    Args:
      clusters: Clusters, integers [samples].
      labels: Labels, integers [samples].

    Raises:
      ValueError: The lengths differ, or there are no samples.
    """
    # Imported here because scikit-learn takes seconds to import.
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    if len(clusters) != len(labels) or not len(labels):
        raise ValueError(
            f"expected a label for each sample; got {len(clusters)} samples, {len(labels)} labels"
        )
    table = contingency_matrix(labels, clusters)  # [labels, clusters]
    matched = table[linear_sum_assignment(table, maximize=True)].sum()
    return ClusterScores(
        nmi=float(normalized_mutual_info_score(labels, clusters)),
        adjusted_rand=float(adjusted_rand_score(labels, clusters)),
        accuracy=float(matched / len(labels)),
        purity=float(table.max(axis=0).sum() / len(labels)),
        clusters=table.shape[1],
    )


def agreement_between_segments(codes: np.ndarray) -> np.ndarray:
    """Returns the mean normalized mutual information of each segment with the others.

    The segment with the largest value is the partition with which the others agree most (Strehl &
    Ghosh, Cluster Ensembles, JMLR 2002).

    Args:
      codes: Most probable unit of each segment, integers [samples, segments].

    Returns:
      float64 [segments].
    """
    samples, segments = codes.shape
    codes = np.asarray(codes, np.int64)
    units = int(codes.max()) + 1

    def entropy(counted: np.ndarray, groups: int) -> np.ndarray:
        counts = np.bincount(counted.ravel(), minlength=groups * units**2)
        return scipy.special.entr(counts.reshape(groups, -1) / samples).sum(axis=1)

    offsets = np.arange(segments) * units**2
    single = entropy(codes + offsets, segments)
    nmi = np.zeros((segments, segments))
    for s in range(1, segments):
        joint = entropy(codes[:, :s] * units + codes[:, s, None] + offsets[:s], s)
        total = single[:s] + single[s]
        with np.errstate(invalid="ignore"):
            # Constant segments share nothing, whereas scikit-learn counts two of them as equal.
            found = np.where(total > 0, 2 * (total - joint) / total, 0.0)
        nmi[s, :s] = nmi[:s, s] = np.clip(found, 0, 1)
    return nmi.sum(axis=1) / max(segments - 1, 1)


def joint_clusters(probabilities: np.ndarray, *, num_clusters: int, seed: int = 0) -> np.ndarray:
    """Clusters samples by their joint code, the probabilities of all segments side by side.

    This is k-means on the square roots of the probabilities, whose Euclidean distance is the
    Hellinger distance between the segments' distributions.

    Args:
      probabilities: Probabilities, [samples, segments, units].
      num_clusters: Number of clusters.
      seed: Seed of the ten random starts, of which the best by the criterion of k-means is taken.

    Returns:
      int32 [samples], in [0, num_clusters); fewer clusters if fewer codes differ.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    roots = np.sqrt(np.asarray(probabilities, np.float32)).reshape(len(probabilities), -1)
    kmeans = KMeans(num_clusters, n_init=10, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer codes than clusters
        return kmeans.fit_predict(roots).astype(np.int32)


def _checked(probabilities: np.ndarray) -> np.ndarray:
    p = np.asarray(probabilities)
    if p.ndim != 3 or 0 in p.shape:
        raise ValueError(f"expected probabilities [samples, segments, units]; got {p.shape}")
    return p if p.dtype == np.float64 else p.astype(np.float32)
