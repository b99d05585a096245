"""Metrics by cosine similarity: classification by the nearest neighbors, and retrieval."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SIMILARITIES = 2**24  # of queries and a gallery, on the device at once


def knn_predict(
    train_features: np.ndarray | jax.Array,
    train_labels: np.ndarray | jax.Array,
    test_features: np.ndarray | jax.Array,
    *,
    num_classes: int,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Predicts labels by a weighted vote of the nearest training samples.

    Features are normalized to unit length. Each of the `k` neighbors with the largest cosine
    similarity `s` votes for its label with weight `exp(s / temperature)`. Of equal similarities the
    earlier training sample counts as nearer, and of equal votes the lower label wins: neither
    depends on the labels of the test samples.

    Args:
      train_features: Training features, [train, features].
      train_labels: Training labels, integers [train].
      test_features: Test features, [test, features].
      num_classes: Number of classes.
      k: Number of neighbors that vote, all training samples if there are fewer; or several such
        numbers, for which the neighbors are searched once.
      temperature: Temperature of the weights.

    Returns:
      Predicted labels, int32 [test], or [len(k), test] for several numbers of neighbors.

    Raises:
      ValueError: The shapes do not match, or there are no training samples.

    Reference:
      Wu et al., `Unsupervised Feature Learning via Non-Parametric Instance-level Discrimination
      <https://arxiv.org/abs/1805.01978>`_, 2018
    """
    check_samples(training=(train_features, train_labels))
    nearest, weights = _weighted_neighbors(train_features, test_features, np.max(k), temperature)
    labels = np.asarray(train_labels)[nearest]

    def vote(k: int) -> np.ndarray:
        votes = np.zeros((len(labels), num_classes))
        np.add.at(votes, (np.arange(len(labels))[:, None], labels[:, :k]), weights[:, :k])
        return np.argmax(votes, axis=1).astype(np.int32)

    return np.stack([vote(number) for number in k]) if isinstance(k, Sequence) else vote(k)


def knn_scores(
    train_features: np.ndarray | jax.Array,
    train_labels: np.ndarray,
    test_features: np.ndarray | jax.Array,
    *,
    k: Sequence[int],
    temperature: float = 0.07,
) -> np.ndarray:
    """Scores each class by the nearest training samples, where samples have several classes.

    The score is the share of the class in the weights of the neighbors for which it is known; 0 if
    there are none. Neighbors and weights are those of `knn_predict`.

    Args:
      train_features: Training features, [train, features].
      train_labels: Training labels, [train, classes]; see `music_jax.metrics.multi_label`.
      test_features: Test features, [test, features].
      k: Numbers of neighbors.
      temperature: Temperature of the weights.

    Returns:
      float64 [len(k), test, classes], in [0, 1].

    Raises:
      ValueError: The shapes do not match, or there are no training samples.
    """
    check_samples(training=(train_features, train_labels))
    nearest, weights = _weighted_neighbors(train_features, test_features, max(k), temperature)
    last = np.minimum(k, nearest.shape[1]) - 1
    scores = np.zeros((len(k), nearest.shape[0], train_labels.shape[1]))
    for column, of_train in enumerate(train_labels.T):
        labels = of_train[nearest]  # [test, neighbors]
        positive, known = (
            np.cumsum(weights * which, axis=1)[:, last].T for which in (labels == 1, labels >= 0)
        )
        scores[..., column] = np.divide(positive, known, where=known > 0, out=np.zeros(known.shape))
    return scores


def _weighted_neighbors(
    train_features: np.ndarray | jax.Array,
    test_features: np.ndarray | jax.Array,
    k: int,
    temperature: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of the nearest training samples and their weights, [test, k] both."""
    similarities, nearest = nearest_neighbors(train_features, test_features, k=k)
    # Only ratios of weights matter. With the nearest neighbor's weight at 1, no temperature makes
    # all weights 0.
    exact = similarities.astype(np.float64)
    with np.errstate(over="ignore"):  # to minus infinity, whose weight is 0
        weights = np.exp((exact - exact.max(axis=1, keepdims=True)) / temperature)
    return nearest, weights


def nearest_neighbors(
    bank: np.ndarray | jax.Array,
    queries: np.ndarray | jax.Array,
    *,
    k: int,
    block_size: int = 256,
    bank_block_size: int = 65_536,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the samples of a bank with the largest cosine similarity to each query.

    The bank is moved to the device one block at a time, so that it may be as large as the memory of
    the host. The blocks have nearly equal sizes: the product with a block of a single row would be
    computed in another order, and equal rows in different blocks would get different similarities.

    Args:
      bank: Features to search, [bank, features].
      queries: Features to search for, [queries, features].
      k: Number of neighbors; the size of the bank if that is smaller.
      block_size: Number of queries compared at once.
      bank_block_size: Number of samples of the bank compared at once.

    Returns:
      Similarities in descending order, float32 [queries, k], and the neighbors' rows in the bank,
      int32 [queries, k]. Of equal similarities the earlier row comes first.

    Raises:
      ValueError: The sizes of the features differ, or the bank is empty.
    """
    _check_sizes(bank=bank, queries=queries)
    if not bank.shape[0]:
        raise ValueError("expected at least one training sample; got none")
    num_queries = queries.shape[0]
    unit = np.pad(unit_length(queries), ((0, -num_queries % block_size), (0, 0)))
    blocks = jnp.asarray(unit.reshape(-1, block_size, unit.shape[1]))
    num_blocks = -(-bank.shape[0] // bank_block_size)
    bounds = [i * bank.shape[0] // num_blocks for i in range(num_blocks + 1)]
    similarities = jnp.zeros((*blocks.shape[:2], 0))
    rows = jnp.zeros((*blocks.shape[:2], 0), jnp.int32)
    for start, end in itertools.pairwise(bounds):
        part = jnp.asarray(unit_length(bank[start:end]))
        found, found_rows = _nearest(blocks, part, min(k, part.shape[0]))
        similarities = jnp.concatenate([similarities, found], axis=-1)
        rows = jnp.concatenate([rows, found_rows + start], axis=-1)
        similarities, order = jax.lax.top_k(similarities, min(k, similarities.shape[-1]))
        rows = jnp.take_along_axis(rows, order, axis=-1)
    similarities, rows = (x.reshape(-1, x.shape[-1])[:num_queries] for x in (similarities, rows))
    return np.asarray(similarities), np.asarray(rows)


@functools.partial(jax.jit, static_argnames="k")
def _nearest(blocks: jax.Array, bank: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns similarities and rows, [blocks, block, k], for blocks [blocks, block, features]."""
    return jax.lax.map(
        lambda block: jax.lax.top_k(
            jnp.matmul(block, bank.T, precision=jax.lax.Precision.HIGHEST), k
        ),
        blocks,
    )


def average_precisions(
    gallery_features: np.ndarray,
    gallery_labels: np.ndarray,
    query_features: np.ndarray,
    query_labels: np.ndarray,
) -> np.ndarray:
    r"""Returns the average precision of each query; their mean is the mAP.

    .. math::

      AP = \frac{1}{R} \sum_{i: \text{relevant}} \frac{\text{relevant up to rank}_i}{\text{rank}_i}

    The gallery is ranked by cosine similarity; its R samples of the query's label are
    relevant. Samples of equal similarity share the rank of the last of them, as in scikit-learn's
    `average_precision_score`, so that constant features give the share of relevant samples.

    Args:
      gallery_features: Features to search, [gallery, features].
      gallery_labels: Labels of the gallery, integers [gallery].
      query_features: Features to search for, [queries, features].
      query_labels: Labels of the queries, integers [queries].

    Returns:
      float64 [queries], in [0, 1]; NaN if the gallery has no sample of the label.

    Raises:
      ValueError: The shapes do not match.
    """
    check_samples(
        gallery=(gallery_features, gallery_labels), queries=(query_features, query_labels)
    )
    count = len(query_labels)
    if not count or not len(gallery_labels):
        return np.full(count, np.nan)
    block_size = min(count, max(1, _SIMILARITIES // len(gallery_labels)))
    padding = -count % block_size
    precisions = _average_precisions(
        jnp.asarray(unit_length(gallery_features)),
        jnp.asarray(gallery_labels, jnp.int32),
        jnp.asarray(np.pad(unit_length(query_features), ((0, padding), (0, 0)))),
        jnp.asarray(np.pad(np.asarray(query_labels, np.int32), (0, padding))),
        block_size,
    )
    return np.asarray(precisions, np.float64)[:count]


@functools.partial(jax.jit, static_argnames="block_size")
def _average_precisions(
    gallery: jax.Array,
    gallery_labels: jax.Array,
    queries: jax.Array,
    labels: jax.Array,
    block_size: int,
) -> jax.Array:
    def precisions(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        features, wanted = block
        similarities = jnp.matmul(features, gallery.T, precision=jax.lax.Precision.HIGHEST)
        order = jnp.argsort(-similarities, axis=1)  # [block, gallery]
        relevant = (gallery_labels[order] == wanted[:, None]).astype(jnp.float32)
        ranked = jnp.take_along_axis(similarities, order, axis=1)
        # Position of the last sample of the same similarity, [block, gallery].
        positions = jnp.broadcast_to(jnp.arange(ranked.shape[1])[None], ranked.shape)
        differs = ranked[:, :-1] != ranked[:, 1:]
        is_last = jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
        ends = jnp.where(is_last, positions, positions.shape[1])
        last = jax.lax.cummin(ends, axis=1, reverse=True)
        found = jnp.take_along_axis(jnp.cumsum(relevant, axis=1), last, axis=1)
        precision = found / (last + 1).astype(jnp.float32)
        return jnp.sum(precision * relevant, axis=1) / jnp.sum(relevant, axis=1)

    blocks = queries.reshape(-1, block_size, queries.shape[1]), labels.reshape(-1, block_size)
    return jax.lax.map(precisions, blocks).reshape(-1)


def unit_length(features: np.ndarray | jax.Array, dtype: Any = np.float32) -> np.ndarray:
    """Scales each row to unit length, whatever its magnitude; rows of zeros stay zero.

    Args:
      features: Finite numbers, [samples, features].
      dtype: Type of the result.
    """
    x = np.asarray(features)
    if x.dtype != np.float64:
        x = x.astype(dtype, copy=False)
    # Divide by a power of two near the largest number first: no square overflows or vanishes.
    largest = np.maximum(x.max(axis=1, keepdims=True), -x.min(axis=1, keepdims=True))
    x = x / np.ldexp(np.ones_like(largest), np.frexp(largest)[1] - 1)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return (x / np.where(norms > 0, norms, 1)).astype(dtype, copy=False)


def check_samples(**sets: tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]) -> None:
    """Raises ValueError unless sets of samples have as many labels as features, all of one size."""
    for name, (features, labels) in sets.items():
        if len(features) != len(labels):
            raise ValueError(
                f"expected a label for each sample; got {len(features)} {name} features but "
                f"{len(labels)} labels"
            )
    _check_sizes(**{name: features for name, (features, _) in sets.items()})


def _check_sizes(**features: np.ndarray | jax.Array) -> None:
    sizes = {name: x.shape[1] for name, x in features.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"expected features of one size; got {sizes}")
