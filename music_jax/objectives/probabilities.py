"""Probabilities of each segment's units, and their ratios to the uniform distribution.

Near the uniform distribution, as at initialization, the MUSIC objective and its gradient depend on
how far K p is from 1. Rounding p leaves few digits of this difference, so the objective uses the
centered ratio K p - 1 there. Elsewhere it uses K p, which keeps the digits of a small p. The same
choice is made for the whole global batch: all ratios are K p - c, where the center c is 1 or 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from music_jax.objectives.global_batch import (
    AxisName,
    Pair,
    accumulation_dtype,
    check_embeddings,
    check_pair,
)

MIN_PROBABILITY = 1e-8

# Largest difference between the logits of a segment that counts as nearly uniform. bfloat16 has so
# few digits that a larger one is better; up to ln(2) / 2, J is above 1/2, a bound of `log_ratio`.
_NEARLY_UNIFORM = 1 / 32
_NEARLY_UNIFORM_BFLOAT16 = 1 / 3


def check_segments(dim: int, num_segments: int, *, at_least: int = 1) -> None:
    """Raises ValueError unless `dim` units form `num_segments` segments of equal size."""
    if isinstance(num_segments, bool) or not isinstance(num_segments, (int, np.integer)):
        raise ValueError(f"num_segments: expected an int, got {num_segments!r}")
    if num_segments < at_least:
        why = "; the cross-segment term needs two different segments" if at_least > 1 else ""
        raise ValueError(f"num_segments: expected at least {at_least}, got {num_segments}{why}")
    if dim % num_segments:
        raise ValueError(
            f"expected dim to be a multiple of num_segments, got dim {dim} and num_segments "
            f"{num_segments} (remainder {dim % num_segments}); choose dim = num_segments * units"
        )


def check_temperature(temperature: float | jax.Array) -> None:
    """Raises ValueError for an array, and for a known number that is not positive and finite."""
    check_positive(temperature, "temperature")


def check_positive(value: float | jax.Array, name: str) -> None:
    """Raises ValueError for an array, and for a known number that is not positive and finite.

    The value of a JAX array is not read, since it may be traced.
    """
    known = isinstance(value, (int, float, np.generic))
    if jnp.ndim(value) or (known and not 0 < value < float("inf")):
        raise ValueError(f"{name}: expected a positive finite number, got {value}")


def segment_probabilities(
    embeddings: jax.Array, *, num_segments: int, temperature: float | jax.Array = 1.0
) -> jax.Array:
    r"""Computes the probability of each unit of each segment.

    .. math::

      p_{nsk} = \frac{\exp(z_{nsk} / \tau)}{\sum_{k'} \exp(z_{nsk'} / \tau)}

    Args:
      embeddings: Floating array [batch, dim], where dim = num_segments * units.
      num_segments: Number of segments S.
      temperature: Softmax temperature :math:`\tau`.

    Returns:
      Probabilities [batch, num_segments, units], float32, or float64 for float64 embeddings. Each
      unit axis sums to 1.

    Raises:
      ValueError: If the embeddings are not a floating array [batch, dim], dim is not a multiple of
        `num_segments`, or the temperature is not a positive finite number.

    Example:
      >>> import jax.numpy as jnp
      >>> from music_jax.objectives import segment_probabilities
      >>> segment_probabilities(jnp.zeros((1, 4)), num_segments=2).tolist()
      [[[0.5, 0.5], [0.5, 0.5]]]

    Reference:
      Niu & Wang, `Self-Supervised Representation Learning With MUlti-Segmental Informational Coding
      <https://arxiv.org/abs/2206.06461>`_, 2022
    """
    check_embeddings(embeddings)
    check_segments(embeddings.shape[1], num_segments)
    check_temperature(temperature)
    logits = unit_logits(embeddings, num_segments=num_segments, temperature=temperature)
    return jax.nn.softmax(logits, axis=-1)


def segment_codes(embeddings: jax.Array, *, num_segments: int) -> jax.Array:
    """Returns the most probable unit of each segment.

    Args:
      embeddings: Floating array [batch, dim], where dim = num_segments * units.
      num_segments: Number of segments S.

    Returns:
      Indices [batch, num_segments] in [0, units), int32.

    Raises:
      ValueError: See :func:`segment_probabilities`.

    Example:
      >>> import jax.numpy as jnp
      >>> from music_jax.objectives import segment_codes
      >>> segment_codes(jnp.array([[0.1, 2.0, 5.0, 3.0]]), num_segments=2).tolist()
      [[1, 0]]
    """
    check_embeddings(embeddings)
    check_segments(embeddings.shape[1], num_segments)
    z = embeddings.reshape(len(embeddings), num_segments, -1)  # [N, S, K]
    return jnp.argmax(z, axis=-1).astype(jnp.int32)


def joint_probability(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    num_segments: int,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    r"""Computes the joint probability of the units of two views, for inspection.

    .. math::

      P_{ij} = \frac{1}{N} \sum_n p^a_{ni} \, p^b_{nj}

    Probabilities are clamped below at 1e-8, as in the objective. For training,
    :func:`music_loss` computes its terms without this matrix.

    Args:
      embeddings_a: First view, floating array [batch, dim], where dim = num_segments * units.
      embeddings_b: Second view of the same samples, of the same shape and dtype.
      num_segments: Number of segments S.
      temperature: Softmax temperature.

    Returns:
      Joint probabilities [dim, dim]; rows are units of the first view, columns of the second.

    Raises:
      ValueError: If the views differ in shape or dtype; see also :func:`segment_probabilities`.

    Example:
      >>> import jax.numpy as jnp
      >>> from music_jax.objectives import joint_probability
      >>> joint_probability(jnp.zeros((3, 4)), jnp.zeros((3, 4)), num_segments=2)[0].tolist()
      [0.25, 0.25, 0.25, 0.25]
    """
    check_pair(embeddings_a, embeddings_b)
    batch, dim = embeddings_a.shape
    pa, pb = (
        clamp(segment_probabilities(z, num_segments=num_segments, temperature=temperature))
        for z in (embeddings_a, embeddings_b)
    )
    return pa.reshape(batch, dim).T @ pb.reshape(batch, dim) / batch  # [D, D]


def unit_logits(
    embeddings: jax.Array, *, num_segments: int, temperature: float | jax.Array
) -> jax.Array:
    """Returns the logits, [batch, num_segments, units]; the largest of each segment is 0."""
    dtype = accumulation_dtype(embeddings.dtype)
    z = jnp.asarray(embeddings, dtype).reshape(len(embeddings), num_segments, -1)  # [N, S, K]
    # The shift comes before the division, so that no finite input overflows at a low temperature.
    z = z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    return z / jnp.asarray(temperature, dtype)


def clamp(p: jax.Array) -> jax.Array:
    """Raises probabilities to at least 1e-8, without renormalization."""
    # Not jnp.maximum, which halves the gradient at equality.
    return jnp.where(p >= MIN_PROBABILITY, p, jnp.asarray(MIN_PROBABILITY, p.dtype))


def center_of(
    logits_a: jax.Array,
    logits_b: jax.Array,
    axis_name: AxisName | None,
    product_dtype: Any = jnp.float32,
) -> jax.Array:
    """Returns c: 1 if all segments of the global batch are nearly uniform, else 0.

    Args:
      logits_a: Logits of the first view, [local batch, num_segments, units], by `unit_logits`.
      logits_b: Logits of the second view.
      axis_name: Axis, or axes, over which the batch is split.
      product_dtype: Dtype of the ratios in matrix products.

    Returns:
      A scalar of the logits' dtype, the same on every device.
    """
    least = jax.lax.stop_gradient(jnp.minimum(jnp.min(logits_a), jnp.min(logits_b)))
    spread = -least if axis_name is None else jax.lax.pmax(-least, axis_name)
    few_digits = product_dtype == jnp.bfloat16
    limit = _NEARLY_UNIFORM_BFLOAT16 if few_digits else _NEARLY_UNIFORM
    return (spread < limit).astype(logits_a.dtype)


def unit_ratios(logits: jax.Array, center: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes K p - c, with p clamped below at 1e-8.

    Args:
      logits: Logits [batch, num_segments, units], by `unit_logits`.
      center: Center c, by `center_of`.

    Returns:
      The ratios [batch, num_segments, units], and the amount that the clamp adds to the sum
      of each segment's probabilities, [batch, num_segments].
    """
    units = logits.shape[-1]
    ratios = softmax_ratios(logits, center)
    least = units * MIN_PROBABILITY - center
    # Not jnp.maximum, which halves the gradient at equality.
    kept = ratios >= least
    added = jnp.sum(jnp.where(kept, 0, least - ratios), axis=-1) / units
    return jnp.where(kept, ratios, least), added


@jax.custom_jvp
def softmax_ratios(logits: jax.Array, center: jax.Array) -> jax.Array:
    """Computes K softmax(logits) - c."""
    units = logits.shape[-1]

    def centered(logits: jax.Array) -> jax.Array:
        less = jnp.expm1(logits)
        total = jnp.sum(less, axis=-1, keepdims=True)
        return (units * less - total) / (units + total)

    def plain(logits: jax.Array) -> jax.Array:
        return units * jax.nn.softmax(logits, axis=-1)

    return jax.lax.cond(center > 0, centered, plain, logits)


@softmax_ratios.defjvp
def _softmax_ratios_jvp(primals: Pair, tangents: Pair) -> Pair:
    ratios = softmax_ratios(*primals)
    whole, tangent = ratios + primals[1], tangents[0]  # K p
    return ratios, whole * (tangent - jnp.mean(whole * tangent, axis=-1, keepdims=True))


@jax.custom_jvp
def log_ratio(ratio: jax.Array, center: jax.Array) -> jax.Array:
    """Computes log(ratio + c)."""
    near_one = jnp.log1p(jnp.maximum(ratio, -0.5))
    return jnp.where(center > 0, near_one, jnp.log(_whole(ratio, center)))


@log_ratio.defjvp
def _log_ratio_jvp(primals: Pair, tangents: Pair) -> Pair:
    return log_ratio(*primals), tangents[0] / _whole(*primals)


def _whole(ratio: jax.Array, center: jax.Array) -> jax.Array:
    return jnp.maximum(ratio + center, 1e-30)


@jax.custom_jvp
def divergence(ratio: jax.Array, center: jax.Array) -> jax.Array:
    """Computes J log J - J for J = ratio + c."""
    return (ratio + center) * (log_ratio(ratio, center) - 1)


@divergence.defjvp
def _divergence_jvp(primals: Pair, tangents: Pair) -> Pair:
    # The chain rule would give log J - 1 + 1, which loses the digits of a small log J.
    return divergence(*primals), log_ratio(*primals) * tangents[0]
