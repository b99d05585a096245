"""Barlow Twins, VICReg and SimCLR, the objectives that MUSIC is compared with."""

import functools

import jax
import jax.numpy as jnp

from music_jax.objectives.global_batch import (
    AxisName,
    accumulation_dtype,
    all_samples,
    axis_size,
    check_pair,
    global_mean,
    global_sum,
    over_global_batch,
    subtract_mean,
)
from music_jax.objectives.probabilities import check_temperature

# Epsilon of BatchNorm, with which the authors of Barlow Twins standardize.
_BARLOW_TWINS_EPSILON = 1e-5
# Under the square root, where it bounds the gradient at zero variance.
_VICREG_EPSILON = 1e-4
# Under the square root, where it bounds the gradient of a zero embedding.
_SIMCLR_EPSILON = 1e-12


def barlow_twins_loss(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    off_diagonal_weight: float | jax.Array = 0.0051,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Computes the Barlow Twins objective of two views' embeddings.

    .. math::

      \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2, \quad
      C_{ij} = \frac{1}{N} \sum_n \hat z^a_{ni} \, \hat z^b_{nj}

    where a hat standardizes each unit over the global batch, as BatchNorm does (with variance over
    N, plus 1e-5). If the batch is smaller than the embedding, the sum of the squared elements of C
    is computed from the two [N, N] Gram matrices instead of the [dim, dim] matrix C. See
    :func:`music_loss` for the use on several devices.

    Args:
      embeddings_a: First view, floating array [batch, dim].
      embeddings_b: Second view of the same samples, of the same shape and dtype.
      off_diagonal_weight: Weight :math:`\lambda` of the redundancy term.
      axis_name: Axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.

    Returns:
      A scalar, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: If the views differ in shape or dtype or are not floating arrays [batch, dim], or
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
    weight = jnp.asarray(off_diagonal_weight, accumulation_dtype(embeddings_a.dtype))
    return over_global_batch(_barlow_twins, embeddings_a, embeddings_b, weight, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _barlow_twins(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    off_diagonal_weight: jax.Array,
    *,
    axis_name: AxisName | None,
) -> jax.Array:
    batch = _global_batch_size(embeddings_a, axis_name, "barlow_twins_loss")

    def standardize(z: jax.Array) -> jax.Array:
        z = subtract_mean(z, axis_name)
        variance = global_mean(jnp.mean(z**2, axis=0, keepdims=True), axis_name)
        return z * jax.lax.rsqrt(variance + _BARLOW_TWINS_EPSILON)

    za, zb = standardize(embeddings_a), standardize(embeddings_b)
    diagonal = global_mean(jnp.mean(za * zb, axis=0), axis_name)  # [D]
    squares = _squared_norm_of_product(za, zb, axis_name) / batch**2
    off_diagonal = squares - jnp.sum(diagonal**2)
    return jnp.sum((1 - diagonal) ** 2) + off_diagonal_weight * off_diagonal


def vicreg_loss(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    similarity_weight: float | jax.Array = 25.0,
    variance_weight: float | jax.Array = 25.0,
    covariance_weight: float | jax.Array = 1.0,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Computes the VICReg objective of two views' embeddings.

    .. math::

      \frac{\lambda}{N D} \sum_{n, i} (z^a_{ni} - z^b_{ni})^2
      + \sum_{v \in \{a, b\}} \left[
      \frac{\mu}{2 D} \sum_i \max\left(0, 1 - \sqrt{C^v_{ii} + 10^{-4}}\right)
      + \frac{\nu}{D} \sum_{i \ne j} (C^v_{ij})^2 \right]

    where C is the covariance of a view over the global batch, normalized by N - 1. As in the
    authors' code, and unlike the paper, the first term is divided by D and the second one by 2. If
    the batch is smaller than the embedding, the sum of the squared elements of C is computed from
    the [N, N] Gram matrix of the centered embeddings instead of the [dim, dim] matrix C. See
    :func:`music_loss` for the use on several devices.

    Args:
      embeddings_a: First view, floating array [batch, dim].
      embeddings_b: Second view of the same samples, of the same shape and dtype.
      similarity_weight: Weight :math:`\lambda` of the squared distance between the views.
      variance_weight: Weight :math:`\mu` of the variance term.
      covariance_weight: Weight :math:`\nu` of the covariance term.
      axis_name: Axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.

    Returns:
      A scalar, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: If the views differ in shape or dtype or are not floating arrays [batch, dim], or
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
    arrays = [jnp.asarray(weight, dtype) for weight in weights]
    return over_global_batch(_vicreg, embeddings_a, embeddings_b, *arrays, axis_name=axis_name)


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
    batch = _global_batch_size(embeddings_a, axis_name, "vicreg_loss")
    dtype = accumulation_dtype(embeddings_a.dtype)

    def variance_and_covariance(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = subtract_mean(z, axis_name)
        variance = global_sum(jnp.sum(z**2, axis=0), axis_name) / (batch - 1)  # [D]
        squares = _squared_norm_of_product(z, z, axis_name) / (batch - 1) ** 2
        hinge = jnp.mean(jax.nn.relu(1 - jnp.sqrt(variance + _VICREG_EPSILON)))
        return hinge, (squares - jnp.sum(variance**2)) / z.shape[1]

    views = [jnp.asarray(z, dtype) for z in (embeddings_a, embeddings_b)]
    similarity = global_mean(jnp.mean((views[0] - views[1]) ** 2), axis_name)
    spreads = [variance_and_covariance(z) for z in views]
    return (
        similarity_weight * similarity
        + variance_weight * sum(variance for variance, _ in spreads) / 2
        + covariance_weight * sum(covariance for _, covariance in spreads)
    )


def simclr_loss(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    temperature: float | jax.Array = 0.1,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Computes the contrastive objective of SimCLR (NT-Xent) of two views' embeddings.

    .. math::

      -\frac{1}{2N} \sum_{i=1}^{2N} \log
      \frac{\exp(s_{i p(i)} / \tau)}{\sum_{j \ne i} \exp(s_{ij} / \tau)}

    where s is the cosine similarity between the 2N embeddings of both views and p(i) the other view
    of the sample of i. The negatives are those of the global batch.

    The value is that of :func:`optax.losses.ntxent` with one label per sample. It is computed by
    matrix products, while optax holds a [2N, 2N, dim] array, 1.6 GB for N = 256 and dim = 512. On
    several devices, each gathers the embeddings of the others and compares its own samples with
    them. See :func:`music_loss` for the use on several devices.

    Args:
      embeddings_a: First view, floating array [batch, dim].
      embeddings_b: Second view of the same samples, of the same shape and dtype.
      temperature: Softmax temperature :math:`\tau`.
      axis_name: Axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.

    Returns:
      A scalar, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: If the views differ in shape or dtype or are not floating arrays [batch, dim], the
        temperature is not a positive finite number, or the global batch is a single sample.

    Example:
      >>> import jax.numpy as jnp
      >>> from music_jax.objectives import simclr_loss
      >>> z = jnp.array([[1.0, 0], [0, 1]])
      >>> print(f"{simclr_loss(z, z):.4f} {simclr_loss(z, z, temperature=1.0):.4f}")
      0.0001 0.5514

    Reference:
      Chen et al, `A Simple Framework for Contrastive Learning of Visual Representations
      <https://arxiv.org/abs/2002.05709>`_, 2020
    """
    check_pair(embeddings_a, embeddings_b)
    check_temperature(temperature)
    temperature = jnp.asarray(temperature, accumulation_dtype(embeddings_a.dtype))
    return over_global_batch(_simclr, embeddings_a, embeddings_b, temperature, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _simclr(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    temperature: jax.Array,
    *,
    axis_name: AxisName | None,
) -> jax.Array:
    local_batch = embeddings_a.shape[0]
    batch = _global_batch_size(embeddings_a, axis_name, "simclr_loss")

    def normalize(z: jax.Array) -> jax.Array:
        z = jnp.asarray(z, accumulation_dtype(z.dtype))
        squares = jnp.sum(z**2, axis=1, keepdims=True)
        return z * jax.lax.rsqrt(jnp.maximum(squares, _SIMCLR_EPSILON))

    def similarities(own: jax.Array, others: jax.Array) -> jax.Array:
        # The default precision rounds the operands to bfloat16 on TPUs; optax's sum does not.
        return jnp.matmul(own, others.T, precision=jax.lax.Precision.HIGHEST) / temperature

    a, b = normalize(embeddings_a), normalize(embeddings_b)
    all_a, all_b = all_samples(a, axis_name), all_samples(b, axis_name)  # [batch, dim]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * local_batch
    own_rows = first + jnp.arange(local_batch)
    itself = jnp.arange(batch)[None, :] == own_rows[:, None]  # [local batch, batch]
    positive = jnp.sum(a * b, axis=1)
    total = jnp.zeros((), a.dtype)
    for own, same_view, other_view in ((a, all_a, all_b), (b, all_b, all_a)):
        others = jnp.where(itself, -jnp.inf, similarities(own, same_view))
        logits = jnp.concatenate([others, similarities(own, other_view)], axis=1)
        total += jnp.sum(jax.nn.logsumexp(logits, axis=1) - positive / temperature)
    return global_sum(total, axis_name) / (2 * batch)


def _global_batch_size(embeddings: jax.Array, axis_name: AxisName | None, method: str) -> int:
    """Returns the size of the global batch; raises ValueError for a single sample."""
    batch = embeddings.shape[0] * axis_size(axis_name)
    if batch < 2:
        raise ValueError(
            f"{method}: expected a global batch of at least 2 samples, since it normalizes or "
            f"compares over the batch, got {batch}"
        )
    return batch


def _squared_norm_of_product(x: jax.Array, y: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Computes the sum of the squared elements of xᵀ y, the product over the global batch.

    Uses ||xᵀ y||² = <x xᵀ, y yᵀ>: a [dim, dim] matrix or two [N, N] matrices, whichever is smaller.
    """
    batch, dim = x.shape  # [local batch, dim]
    if batch * axis_size(axis_name) >= dim:
        return jnp.sum(global_sum(x.T @ y, axis_name) ** 2)  # [D, D]
    # The device's rows of the Gram matrices: [local batch, N]
    gram_x = x @ all_samples(x, axis_name).T
    gram_y = gram_x if y is x else y @ all_samples(y, axis_name).T
    return global_sum(jnp.sum(gram_x * gram_y), axis_name)
