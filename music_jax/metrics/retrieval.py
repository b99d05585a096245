"""Retrieval: how highly a search ranks the samples of a query's class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from music_jax.metrics.knn import unit_length

_SIMILARITIES = 2**24  # on the device at once


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
