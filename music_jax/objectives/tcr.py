"""The total coding rate, the objective of EMP-SSL."""

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
)
from music_jax.objectives.probabilities import check_positive

# Least squared norm, below which an embedding counts as zero: PyTorch's 1e-12 for the norm.
_LEAST_SQUARE = 1e-24


def tcr_loss(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    similarity_weight: float | jax.Array = 200.0,
    epsilon_squared: float | jax.Array = 0.2,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Computes the EMP-SSL objective, total coding rate and similarity, of two views' embeddings.

    .. math::

      - \frac{1}{2} \sum_{v \in \{a, b\}} \left[
      \frac{1}{2} \log \det \left( I + \frac{D}{N \epsilon^2} \hat Z_v^T \hat Z_v \right)
      + \frac{\lambda}{N} \sum_n \cos(\hat z^v_n, \hat z^a_n + \hat z^b_n) \right]

    where a hat scales each embedding to unit length, as the authors' network does. If the batch is
    smaller than the embedding, the determinant is that of the [N, N] matrix with
    :math:`\hat Z_v \hat Z_v^T`, which is equal. Every device computes it by a Cholesky
    decomposition of the whole matrix. See :func:`music_loss` for the use on several devices.

    Args:
      embeddings_a: First view, floating array [batch, dim].
      embeddings_b: Second view of the same samples, of the same shape and dtype.
      similarity_weight: Weight :math:`\lambda` of the cosine similarity.
      epsilon_squared: Squared distortion :math:`\epsilon^2` of the coding rate.
      axis_name: Axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.

    Returns:
      A scalar, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: If the views differ in shape or dtype or are not floating arrays [batch, dim], or
        `epsilon_squared` is not a positive finite number.

    Example:
      >>> import jax.numpy as jnp
      >>> from music_jax.objectives import tcr_loss
      >>> z = jnp.array([[1.0, 0], [0, 1]])
      >>> print(f"{tcr_loss(z, z):.4f} {tcr_loss(z, z[::-1]):.4f}")
      -201.7918 -143.2131

    Reference:
      Tong et al, `EMP-SSL: Towards Self-Supervised Learning in One Training Epoch
      <https://arxiv.org/abs/2304.03977>`_, 2023
    """
    check_pair(embeddings_a, embeddings_b)
    check_positive(epsilon_squared, "epsilon_squared")
    dtype = accumulation_dtype(embeddings_a.dtype)
    options = [jnp.asarray(x, dtype) for x in (similarity_weight, epsilon_squared)]
    return over_global_batch(_tcr, embeddings_a, embeddings_b, *options, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _tcr(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    similarity_weight: jax.Array,
    epsilon_squared: jax.Array,
    *,
    axis_name: AxisName | None,
) -> jax.Array:
    def normalize(z: jax.Array) -> jax.Array:
        z = jnp.asarray(z, accumulation_dtype(z.dtype))
        squares = jnp.sum(z**2, axis=1, keepdims=True)
        return z * jax.lax.rsqrt(jnp.maximum(squares, _LEAST_SQUARE))

    batch, dim = embeddings_a.shape[0] * axis_size(axis_name), embeddings_a.shape[1]

    def gram(z: jax.Array) -> jax.Array:
        if batch >= dim:
            return global_sum(z.T @ z, axis_name)  # [D, D]
        return all_samples(z @ all_samples(z, axis_name).T, axis_name)  # [N, N]

    a, b = normalize(embeddings_a), normalize(embeddings_b)
    # One decomposition of both matrices: it takes long to compile.
    grams = jnp.stack([gram(a), gram(b)])
    rates = _half_log_det(dim / (batch * epsilon_squared) * grams)
    if batch < dim:  # equal on all devices already, but each contributes to the gradient
        rates = global_mean(rates, axis_name)
    center = normalize(a + b)
    similarity = global_mean(jnp.mean(jnp.sum((a + b) * center, axis=1)), axis_name) / 2
    return -rates / 2 - similarity_weight * similarity


@jax.custom_vjp
def _half_log_det(x: jax.Array) -> jax.Array:
    """Sums log det(I + x) / 2 over positive semidefinite matrices [matrices, size, size].

    The gradient is half the inverse. Differentiating the decomposition instead takes several times
    as long to compile for TPU.
    """
    return _half_log_det_forward(x)[0]


def _half_log_det_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    identity = jnp.broadcast_to(jnp.eye(x.shape[1], dtype=x.dtype), x.shape)
    factors = jnp.linalg.cholesky(identity + x)
    value = jnp.sum(jnp.log(jnp.diagonal(factors, axis1=1, axis2=2)))
    return value, jax.scipy.linalg.solve_triangular(factors, identity, lower=True)


def _half_log_det_backward(inverse: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (cotangent / 2 * (inverse.swapaxes(1, 2) @ inverse),)


_half_log_det.defvjp(_half_log_det_forward, _half_log_det_backward)
