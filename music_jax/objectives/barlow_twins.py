"""The Barlow Twins objective, as a baseline."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from music_jax.objectives.checks import check_batch, check_pair
from music_jax.objectives.global_batch import (
    AxisName,
    accumulation_dtype,
    axis_size,
    global_mean,
    over_global_batch,
)
from music_jax.objectives.gram import squared_norm_of_product

# BatchNorm's, which the authors use to standardize.
EPSILON = 1e-5


def barlow_twins_loss(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    off_diagonal_weight: float | jax.Array = 0.0051,
    axis_name: AxisName | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> jax.Array:
    r"""The Barlow Twins objective of two views' embeddings.

    .. math::

      \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2, \quad
      C_{ij} = \frac{1}{N} \sum_n \hat z^a_{ni} \, \hat z^b_{nj}

    where a hat standardizes each unit over the global batch, as BatchNorm without affine does
    (variance over N, plus 1e-5).

    Where the batch is smaller than the embedding, no D x D matrix is built: the sum of the squared
    elements of C is that of the elementwise product of the two views' [N, N] Gram matrices, over
    N². The three ways of calling on several devices are those of :func:`music_loss`.

    Args:
      embeddings_a: [batch, dim] floating array, the first view.
      embeddings_b: [batch, dim] array of the same dtype, the second view of the same samples.
      off_diagonal_weight: weight of the redundancy term.
      axis_name: axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.
      mesh: mesh of the batch, under `jit`.

    Returns:
      A scalar, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: if the views differ in shape or dtype, are not [batch, dim] or not floating, or if
        the global batch is a single sample.

    Example:
      >>> import jax.numpy as jnp
      >>> from music_jax.objectives import barlow_twins_loss
      >>> z = jnp.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
      >>> print(f"{barlow_twins_loss(z, z):.3f} {barlow_twins_loss(z, -z):.3f}")
      0.000 8.000

    Reference:
      Zbontar et al, `Barlow Twins: Self-Supervised Learning via Redundancy Reduction
      <https://arxiv.org/abs/2103.03230>`_, 2021
    """
    check_pair(embeddings_a, embeddings_b)
    off_diagonal_weight = jnp.asarray(off_diagonal_weight, accumulation_dtype(embeddings_a.dtype))
    return over_global_batch(
        _barlow_twins,
        embeddings_a,
        embeddings_b,
        off_diagonal_weight,
        axis_name=axis_name,
        mesh=mesh,
    )


@functools.partial(jax.jit, static_argnames="axis_name")
def _barlow_twins(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    off_diagonal_weight: jax.Array,
    *,
    axis_name: AxisName | None,
) -> jax.Array:
    batch = embeddings_a.shape[0] * axis_size(axis_name)
    check_batch(batch, "barlow_twins_loss")
    za, zb = (_standardize(z, axis_name) for z in (embeddings_a, embeddings_b))
    diagonal = global_mean(jnp.mean(za * zb, axis=0), axis_name)  # [D]
    squares = squared_norm_of_product(za, zb, axis_name=axis_name) / batch**2
    off_diagonal = squares - jnp.sum(diagonal**2)
    return jnp.sum((1 - diagonal) ** 2) + off_diagonal_weight * off_diagonal


def _standardize(z: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Mean 0 and variance 1 of each unit over the global batch."""
    z = jnp.asarray(z, accumulation_dtype(z.dtype))
    z = z - global_mean(jnp.mean(z, axis=0, keepdims=True), axis_name)
    variance = global_mean(jnp.mean(z**2, axis=0, keepdims=True), axis_name)
    return z * jax.lax.rsqrt(variance + EPSILON)
