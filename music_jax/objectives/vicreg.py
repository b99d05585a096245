"""The VICReg objective, as a baseline."""

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
    global_sum,
    over_global_batch,
)
from music_jax.objectives.gram import squared_norm_of_product

# Under the square root, so that its slope at no variance is finite.
EPSILON = 1e-4


def vicreg_loss(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    similarity_weight: float | jax.Array = 25.0,
    variance_weight: float | jax.Array = 25.0,
    covariance_weight: float | jax.Array = 1.0,
    axis_name: AxisName | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> jax.Array:
    r"""The VICReg objective of two views' embeddings.

    .. math::

      \frac{\lambda}{N D} \sum_{n, i} (z^a_{ni} - z^b_{ni})^2
      + \sum_{v \in \{a, b\}} \left[
      \frac{\mu}{2 D} \sum_i \max\left(0, 1 - \sqrt{C^v_{ii} + 10^{-4}}\right)
      + \frac{\nu}{D} \sum_{i \ne j} (C^v_{ij})^2 \right]

    where C is a view's covariance over the global batch, over N - 1.

    Where the batch is smaller than the embedding, no D x D matrix is built: the sum of the squared
    elements of C is that of the centerd embeddings' [N, N] Gram matrix, over (N - 1)². The three
    ways of calling on several devices are those of :func:`music_loss`.

    Args:
      embeddings_a: [batch, dim] floating array, the first view.
      embeddings_b: [batch, dim] array of the same dtype, the second view of the same samples.
      similarity_weight: weight of the squared distance of the views.
      variance_weight: weight of the variance term.
      covariance_weight: weight of the covariance term.
      axis_name: axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.
      mesh: mesh of the batch, under `jit`.

    Returns:
      A scalar, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: if the views differ in shape or dtype, are not [batch, dim] or not floating, or if
        the global batch is a single sample.

    Example:
      >>> import jax.numpy as jnp
      >>> from music_jax.objectives import vicreg_loss
      >>> z = jnp.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
      >>> print(f"{vicreg_loss(z, 2 * z):.3f} {vicreg_loss(z, 0 * z):.3f}")
      25.000 37.375

    Reference:
      Bardes et al, `VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised
      Learning <https://arxiv.org/abs/2105.04906>`_, 2022
    """
    check_pair(embeddings_a, embeddings_b)
    dtype = accumulation_dtype(embeddings_a.dtype)
    weights = (similarity_weight, variance_weight, covariance_weight)
    return over_global_batch(
        _vicreg,
        embeddings_a,
        embeddings_b,
        *(jnp.asarray(weight, dtype) for weight in weights),
        axis_name=axis_name,
        mesh=mesh,
    )


@functools.partial(jax.jit, static_argnames="axis_name")
def _vicreg(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    similarity_weight: jax.Array,
    variance_weight: jax.Array,
    covariance_weight: jax.Array,
    *,
    axis_name: AxisName | None,
) -> jax.Array:
    batch = embeddings_a.shape[0] * axis_size(axis_name)
    check_batch(batch, "vicreg_loss")
    dtype = accumulation_dtype(embeddings_a.dtype)
    views = [jnp.asarray(z, dtype) for z in (embeddings_a, embeddings_b)]
    similarity = global_mean(jnp.mean((views[0] - views[1]) ** 2), axis_name)
    spreads = [_variance_and_covariance(z, batch, axis_name) for z in views]
    return (
        similarity_weight * similarity
        + variance_weight * sum(variance for variance, _ in spreads) / 2
        + covariance_weight * sum(covariance for _, covariance in spreads)
    )


def _variance_and_covariance(
    z: jax.Array, batch: int, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array]:
    """One view's mean hinge on the standard deviations, and its squared covariances over D."""
    z = z - global_mean(jnp.mean(z, axis=0, keepdims=True), axis_name)
    variance = global_sum(jnp.sum(z**2, axis=0), axis_name) / (batch - 1)  # [D]
    squares = squared_norm_of_product(z, z, axis_name=axis_name) / (batch - 1) ** 2
    hinge = jnp.mean(jax.nn.relu(1 - jnp.sqrt(variance + EPSILON)))
    return hinge, (squares - jnp.sum(variance**2)) / z.shape[1]
