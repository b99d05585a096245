"""Nearest neighbors, and classification by their weighted vote (Wu et al, arXiv 1805.01978)."""

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
    """Predicts labels by a vote of the nearest training samples.

    Features are normalized to unit length; each of the `k` neighbors with the largest cosine
    similarity `s` votes for its label with weight `exp(s / temperature)`. Of equal similarities the
    earlier training sample is the nearer one, and of equal votes the lower label wins: neither
    depends on the labels of the test samples.

    Args:
      train_features: [train, features].
      train_labels: integers [train].
      test_features: [test, features].
      num_classes: number of labels.
      k: neighbors that vote; all training samples if there are fewer.
      temperature: of the weights.
      block_size: as in `nearest_neighbors`.

    Returns:
      int32 [test].

    Raises:
      ValueError: features and labels do not fit together.
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

    Only a block of the bank is on the device at a time, and of it no more than `block_size *
    bank_block_size` similarities, so that the bank may be as large as the host's memory holds.
    The blocks are of nearly equal size: a block of one row is multiplied in another order, and its
    similarities would differ from those of equal rows in other blocks.

    Args:
      bank: [bank, features].
      queries: [queries, features].
      k: how many to find; the whole bank if it is smaller.
      block_size: queries that are compared at once.
      bank_block_size: samples of the bank that they are compared with at once.

    Returns:
      Similarities, float32 [queries, k], from the largest on, and the neighbors' rows in the bank,
      int32 [queries, k]; of equal similarities the earlier row comes first.

    Raises:
      ValueError: the features differ in size, or the bank is empty.
    """
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(
            "expected features of one size; got "
            f"{bank.shape[1]} (training) and {queries.shape[1]} (test)"
        )
    if not bank.shape[0]:
        raise ValueError("expected at least one sample to be near to; got none")
    num_queries = queries.shape[0]
    padding = -num_queries % block_size
    unit = np.pad(unit_length(queries), ((0, padding), (0, 0)))
    blocks = jnp.asarray(unit.reshape(-1, block_size, unit.shape[1]))
    found: tuple[jax.Array, jax.Array] | None = None
    num_blocks = -(-bank.shape[0] // bank_block_size)
    bounds = [i * bank.shape[0] // num_blocks for i in range(num_blocks + 1)]
    for start, end in itertools.pairwise(bounds):
        part = jnp.asarray(unit_length(bank[start:end]))
        similarities, rows = _nearest(blocks, part, min(k, part.shape[0]))
        rows = rows + start
        if found is not None:
            similarities = jnp.concatenate([found[0], similarities], axis=-1)
            rows = jnp.concatenate([found[1], rows], axis=-1)
            similarities, order = jax.lax.top_k(similarities, min(k, similarities.shape[-1]))
            rows = jnp.take_along_axis(rows, order, axis=-1)
        found = similarities, rows
    assert found is not None
    size = found[0].shape[-1]
    return (
        np.asarray(found[0]).reshape(-1, size)[:num_queries],
        np.asarray(found[1]).reshape(-1, size)[:num_queries],
    )


@functools.partial(jax.jit, static_argnames="k")
def _nearest(blocks: jax.Array, bank: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Similarities and rows [blocks, block, k] of the blocks [blocks, block, features]."""
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
      num_classes: Number of labels.
      temperature: Temperature of the weights.

    Returns:
      int32 [queries]; the lowest label of those with equal votes.
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
    """Scales features [samples, features] to length 1, whatever their scale; zeros stay zeros.

    Args:
      features: Finite numbers, [samples, features].
      dtype: Type of the result.
    """
    x = np.asarray(features)
    if x.dtype != np.float64:
        x = x.astype(dtype, copy=False)
    # By the power of two below its largest number first, so that no square overflows or vanishes.
    largest = np.maximum(x.max(axis=1, keepdims=True), -x.min(axis=1, keepdims=True))
    x = x / np.ldexp(np.ones_like(largest), np.frexp(largest)[1] - 1)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return (x / np.where(norms > 0, norms, 1)).astype(dtype, copy=False)
