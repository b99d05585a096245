"""Retrieval: how high the samples of a query's class stand among all, by similarity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from music_jax.evaluation.knn import unit_length

_SIMILARITIES = 2**24  # on the device at once


def average_precisions(
    gallery_features: np.ndarray,
    gallery_labels: np.ndarray,
    query_features: np.ndarray,
    query_labels: np.ndarray,
) -> np.ndarray:
    """Average precision of each query: a gallery sample of the query's label is relevant.

    The whole gallery is ranked by cosine similarity. The mean over the queries is the mAP.

    Args:
      gallery_features: [gallery, features].
      gallery_labels: integers [gallery].
      query_features: [queries, features].
      query_labels: integers [queries].

    Returns:
      float64 [queries], in [0, 1]; NaN where the gallery has no sample of the label.

    Raises:
      ValueError: features and labels do not fit together.
    """
    for name, features, labels in (
        ("gallery", gallery_features, gallery_labels),
        ("queries", query_features, query_labels),
    ):
        if len(features) != len(labels):
            raise ValueError(f"{name}: got {len(features)} features but {len(labels)} labels")
    if gallery_features.shape[1] != query_features.shape[1]:
        raise ValueError(
            f"expected features of one size; got {gallery_features.shape[1]} (gallery) and "
            f"{query_features.shape[1]} (queries)"
        )
    count = len(query_labels)
    block_size = min(count, max(1, _SIMILARITIES // len(gallery_labels)))
    padding = -count % block_size
    queries = np.pad(unit_length(query_features), ((0, padding), (0, 0)))
    labels = np.pad(np.asarray(query_labels, np.int32), (0, padding))
    precisions = _average_precisions(
        jnp.asarray(unit_length(gallery_features)),
        jnp.asarray(gallery_labels, jnp.int32),
        jnp.asarray(queries),
        jnp.asarray(labels),
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
    def of_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        features, wanted = block
        similarities = jnp.matmul(features, gallery.T, precision=jax.lax.Precision.HIGHEST)
        order = jnp.argsort(-similarities, axis=1)  # [block, gallery]
        relevant = (gallery_labels[order] == wanted[:, None]).astype(jnp.float32)
        rank = jnp.arange(1, gallery.shape[0] + 1, dtype=jnp.float32)
        precision = jnp.cumsum(relevant, axis=1) / rank[None]
        return jnp.sum(precision * relevant, axis=1) / jnp.sum(relevant, axis=1)

    blocks = queries.reshape(-1, block_size, queries.shape[1]), labels.reshape(-1, block_size)
    return jax.lax.map(of_block, blocks).reshape(-1)
