"""Nearest neighbors, and classification by their weighted vote (Wu et al., arXiv 1805.01978)."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BANK_BLOCK = 65_536  # training samples on the device at once


def knn_predict(
    train_features: np.ndarray | jax.Array,
    train_labels: np.ndarray | jax.Array,
    test_features: np.ndarray | jax.Array,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    block_size: int = 256,
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
      k: Number of neighbors that vote; all training samples if there are fewer.
      temperature: Temperature of the weights.
      block_size: Number of queries compared at once.

    Returns:
      Predicted labels, int32 [test].

    Raises:
      ValueError: The shapes do not match.
    """
    if train_features.shape[0] != train_labels.shape[0]:
        raise ValueError(
            f"expected one label for each of {train_features.shape[0]} training features; got "
            f"{train_labels.shape[0]}"
        )
    similarities, nearest = nearest_neighbors(
        train_features, test_features, k=k, block_size=block_size
    )
    return weighted_vote(
        similarities,
        np.asarray(train_labels)[nearest],
        num_classes=num_classes,
        temperature=temperature,
    )


def nearest_neighbors(
    bank: np.ndarray | jax.Array,
    queries: np.ndarray | jax.Array,
    *,
    k: int,
    block_size: int = 256,
    bank_block_size: int = _BANK_BLOCK,
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
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(
            "expected features of one size; got "
            f"{bank.shape[1]} (training) and {queries.shape[1]} (test)"
        )
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


def weighted_vote(
    similarities: np.ndarray, labels: np.ndarray, *, num_classes: int, temperature: float = 0.07
) -> np.ndarray:
    """Returns the label with the most votes, each weighing `exp(similarity / temperature)`.

    Args:
      similarities: Cosine similarities of the neighbors, float [queries, k].
      labels: Labels of the neighbors, integers [queries, k].
      num_classes: Number of classes.
      temperature: Temperature of the weights.

    Returns:
      Predicted labels, int32 [queries]; the lowest label of those with equal votes.
    """
    exact = similarities.astype(np.float64)
    # Only ratios of weights matter. With the nearest neighbor's weight at 1, no temperature makes
    # all weights 0.
    with np.errstate(over="ignore"):  # to minus infinity, whose weight is 0
        weights = np.exp((exact - exact.max(axis=1, keepdims=True)) / temperature)
    votes = np.zeros((len(labels), num_classes))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weights)
    return np.argmax(votes, axis=1).astype(np.int32)


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
