"""A single discrete variable, the objective of TWIST."""

import functools
import math

import jax
import jax.numpy as jnp

from music_jax.objectives.global_batch import (
    AxisName,
    accumulation_dtype,
    check_pair,
    global_mean,
    over_global_batch,
)
from music_jax.objectives.probabilities import (
    center_of,
    check_temperature,
    divergence,
    softmax_ratios,
    unit_logits,
)


def discrete_loss(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    sharpness_weight: float | jax.Array = 1.0,
    diversity_weight: float | jax.Array = 1.0,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Computes the TWIST objective of two views' embeddings: one segment of all units.

    .. math::

      \frac{1}{2 N} \sum_n \left[ KL(p^a_n \| p^b_n) + KL(p^b_n \| p^a_n) \right]
      + \frac{1}{2} \sum_{v \in \{a, b\}} \left[
      \frac{\mu}{N} \sum_n H(p^v_n) - \nu \, H \left( \frac{1}{N} \sum_n p^v_n \right) \right]

    where p is the softmax of an embedding over its K units and H the entropy. Without the first
    term, and with weights of 1, the value is minus the mutual information of sample and unit, as in
    IIC (Ji et al, arXiv 1807.06653), which takes that of the two views' units instead. The value is
    at least :math:`-\log K`, which is reached if every sample has one unit, the same in both views,
    and all units are used equally. The authors' batch normalization before the softmax, and the
    lower temperature of their entropies, are not part of it. See :func:`music_loss` for the use on
    several devices, which exchange 2 K numbers.

    Args:
      embeddings_a: First view, floating array [batch, dim].
      embeddings_b: Second view of the same samples, of the same shape and dtype.
      temperature: Softmax temperature.
      sharpness_weight: Weight :math:`\mu` of the mean entropy.
      diversity_weight: Weight :math:`\nu` of the entropy of the mean.
      axis_name: Axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.

    Returns:
      A scalar, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: If the views differ in shape or dtype or are not floating arrays [batch, dim], or
        the temperature is not a positive finite number.

    Example:
      >>> import jax.numpy as jnp
      >>> from music_jax.objectives import discrete_loss
      >>> z = jnp.array([[20.0, 0], [0, 20]])
      >>> print(f"{discrete_loss(z, z):.4f} {discrete_loss(z, z[::-1]):.4f}")
      -0.6931 19.3069

    Reference:
      Wang et al, `Self-Supervised Learning by Estimating Twin Class Distributions
      <https://arxiv.org/abs/2110.07402>`_, 2021
    """
    check_pair(embeddings_a, embeddings_b)
    check_temperature(temperature)
    dtype = accumulation_dtype(embeddings_a.dtype)
    options = [jnp.asarray(x, dtype) for x in (temperature, sharpness_weight, diversity_weight)]
    return over_global_batch(_discrete, embeddings_a, embeddings_b, *options, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _discrete(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    temperature: jax.Array,
    sharpness_weight: jax.Array,
    diversity_weight: jax.Array,
    *,
    axis_name: AxisName | None,
) -> jax.Array:
    logits_a, logits_b = (
        unit_logits(z, num_segments=1, temperature=temperature)  # [n, 1, K]
        for z in (embeddings_a, embeddings_b)
    )
    center = center_of(logits_a, logits_b, axis_name)
    ratios_a, ratios_b = (softmax_ratios(logits, center) for logits in (logits_a, logits_b))

    def entropy(ratios: jax.Array) -> jax.Array:
        """Averages the entropy over all but the last axis, from the ratios K p - c."""
        return math.log(ratios.shape[-1]) - 1 - jnp.mean(divergence(ratios, center))

    def uncertainty(ratios: jax.Array) -> jax.Array:
        mean_ratios = global_mean(jnp.mean(ratios, axis=0), axis_name)  # [1, K]
        sharpness = global_mean(entropy(ratios), axis_name)
        return sharpness_weight * sharpness - diversity_weight * entropy(mean_ratios)

    # The logits' normalizers cancel, since the differences of a sample's ratios sum to 0.
    consistency = jnp.mean((ratios_a - ratios_b) * (logits_a - logits_b)) / 2
    consistency = global_mean(consistency, axis_name)
    return consistency + (uncertainty(ratios_a) + uncertainty(ratios_b)) / 2
