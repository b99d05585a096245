"""Clusters straight from the segments of a MUSIC embedding, with nothing trained.

scikit-learn takes seconds to import, so only what needs it does.
"""

import warnings
from typing import NamedTuple

import numpy as np


class ClusterScores(NamedTuple):
    """How far a clustering agrees with labels.

    Attributes:
      nmi: normalized mutual information, by the arithmetic mean of the entropies; in [0, 1].
      adjusted_rand: 0 in the mean for random clusters, 1 for the labels themselves.
      accuracy: of the best one-to-one match of clusters and labels (the Hungarian method); samples
        of the clusters that are left over count as wrong.
      purity: of the best label for each cluster.
      clusters: how many clusters have a sample.
    """

    nmi: float
    adjusted_rand: float
    accuracy: float
    purity: float
    clusters: int


def cluster_scores(clusters: np.ndarray, labels: np.ndarray) -> ClusterScores:
    """Compares a clustering with labels.

    Args:
      clusters: integers [samples].
      labels: integers [samples].

    Returns:
      The scores.

    Raises:
      ValueError: there are not as many clusters as labels, or none.
    """
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
    """Mean normalized mutual information of each segment with the others.

    Args:
      codes: the most probable unit of each segment, integers [samples, segments].

    Returns:
      float64 [segments]. The segment where it is largest is the partition most agreed upon (Strehl
      & Ghosh, Cluster Ensembles, JMLR 2002).
    """
    from scipy.special import entr

    samples, segments = codes.shape
    codes = np.asarray(codes, np.int64)
    units = int(codes.max()) + 1

    def entropy(counted: np.ndarray, groups: int) -> np.ndarray:
        counts = np.bincount(counted.ravel(), minlength=groups * units**2)
        return entr(counts.reshape(groups, -1) / samples).sum(axis=1)

    offsets = np.arange(segments) * units**2
    single = entropy(codes + offsets, segments)
    nmi = np.zeros((segments, segments))
    for s in range(1, segments):
        joint = entropy(codes[:, :s] * units + codes[:, s, None] + offsets[:s], s)
        total = single[:s] + single[s]
        with np.errstate(invalid="ignore"):
            found = np.where(total > 0, 2 * (total - joint) / total, 1.0)  # 1: neither is split
        nmi[s, :s] = nmi[:s, s] = np.clip(found, 0, 1)
    return nmi.sum(axis=1) / max(segments - 1, 1)


def joint_clusters(
    probabilities: np.ndarray, *, num_clusters: int, num_starts: int = 10, seed: int = 0
) -> np.ndarray:
    """Clusters by the joint code: all segments' probabilities side by side.

    k-means on the square roots of the probabilities, whose Euclidean distance is that of Hellinger
    between the segments' distributions.

    Args:
      probabilities: [samples, segments, units].
      num_clusters: how many clusters.
      num_starts: the best of so many random starts is taken, by k-means' own criterion.
      seed: of the starts.

    Returns:
      int32 [samples], in [0, num_clusters); fewer clusters where fewer codes differ.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    roots = np.sqrt(np.asarray(probabilities, np.float32)).reshape(len(probabilities), -1)
    kmeans = KMeans(num_clusters, n_init=num_starts, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer codes than clusters: a result
        return kmeans.fit_predict(roots).astype(np.int32)
