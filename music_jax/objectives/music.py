"""The MUSIC objective: entropy of each segment, joint entropy of two segments, and invariance."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from music_jax.objectives.cross_segment import cross_segment_entropy
from music_jax.objectives.global_batch import (
    AxisName,
    accumulation_dtype,
    check_pair,
    global_mean,
    over_global_batch,
    subtract_mean,
)
from music_jax.objectives.probabilities import (
    center_of,
    check_segments,
    check_temperature,
    divergence,
    log_ratio,
    unit_logits,
    unit_ratios,
)


class MusicTerms(NamedTuple):
    """The unweighted terms of the objective; lower is better for each.

    Attributes:
      diagonal: Negative entropy of each segment's units where the two views agree; at least -log K,
        or -2/e for K = 2.
      cross_segment: Negative joint entropy of two different segments; at least -2 log K.
      invariance: Negative log probability that the two views of a sample agree; at least 0.
    """

    diagonal: jax.Array
    cross_segment: jax.Array
    invariance: jax.Array


def music_terms(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    num_segments: int,
    temperature: float | jax.Array = 1.0,
    center: bool = False,
    axis_name: AxisName | None = None,
    product_dtype: Any = None,
) -> MusicTerms:
    r"""Computes the three terms of the MUSIC objective, unweighted.

    See :func:`music_loss` for the formulas and the use on several devices.

    Args:
      embeddings_a: First view, floating array [batch, dim], where dim = num_segments * units.
      embeddings_b: Second view of the same samples, of the same shape and dtype.
      num_segments: Number of segments S, at least 2.
      temperature: Softmax temperature.
      center: Whether to subtract each view's mean over the global batch first.
      axis_name: Axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.
      product_dtype: Dtype of the operands of the matrix products.

    Returns:
      MusicTerms of scalars, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: See :func:`music_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from music_jax.objectives import music_terms
      >>> codes = jnp.array([[9.0, 0, 9, 0], [9, 0, 0, 9], [0, 9, 9, 0], [0, 9, 0, 9]])
      >>> terms = music_terms(codes, codes, num_segments=2, temperature=0.1)
      >>> [round(float(term), 4) for term in terms[:2]]
      [-0.6931, -1.3863]
    """
    check_pair(embeddings_a, embeddings_b)
    check_segments(embeddings_a.shape[1], num_segments, at_least=2)
    check_temperature(temperature)
    function = functools.partial(
        _terms,
        num_segments=int(num_segments),
        centered=center,
        product_dtype=_product_dtype(embeddings_a.dtype, product_dtype),
    )
    temperature = jnp.asarray(temperature, accumulation_dtype(embeddings_a.dtype))
    return over_global_batch(function, embeddings_a, embeddings_b, temperature, axis_name=axis_name)


def music_loss(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    num_segments: int,
    temperature: float | jax.Array = 1.0,
    diagonal_weight: float | jax.Array = 1.0,
    cross_segment_weight: float | jax.Array = 1.0,
    invariance_weight: float | jax.Array = 1.0,
    center: bool = False,
    axis_name: AxisName | None = None,
    product_dtype: Any = None,
) -> jax.Array:
    r"""Computes the MUSIC objective of two views' embeddings.

    An embedding is cut into S segments of K units. A softmax over each segment gives probabilities
    :math:`p_{nsk}`, clamped below at 1e-8. The joint probability of a unit of one view and a unit
    of the other, over the N samples of the global batch, is

    .. math::

      P_{ij} = \frac{1}{N} \sum_n p^a_{ni} \, p^b_{nj}

    and the objective is

    .. math::

      \frac{1}{S} \sum_i P_{ii} \log P_{ii}
      + \frac{1}{S (S - 1)} \sum_{s(i) \ne s(j)} P_{ij} \log P_{ij}
      - \frac{1}{N S} \sum_{n, s} \log \sum_k p^a_{nsk} \, p^b_{nsk}

    where s(i) is the segment of unit i.

    *Lower bound.* At the default weights, and up to the clamp, the value is at least
    :math:`-3 \log K`: see :func:`music_lower_bound`. "Theory and its limits" in the documentation
    derives it.

    *Collapse.* The bound excludes a collapsed embedding as a minimum, not as a stationary point:
    where the softmax is saturated alike for all samples, the gradient vanishes. With `center`, each
    view's mean over the global batch is subtracted from the embeddings first, after which a segment
    saturates only where samples differ. The bound holds for any embeddings, and so for centered
    ones. At inference, a running mean takes the place of the batch's.

    *Cost.* The value and its gradient take three matrix products of N dim² multiplications. They
    are computed on blocks of rows of the dim x dim matrix P, of 16 MiB, or 256 MiB on GPUs, and on
    several devices each computes a tile of P. Second derivatives are supported as the derivative,
    in either mode, of :func:`jax.grad`; :func:`jax.jvp` of this function raises TypeError.

    *Several devices.* The value and the gradient are those of the global batch

    - under :func:`jax.jit`, on arrays sharded along the batch over a mesh, which is that of the
      arrays or else that of :func:`jax.set_mesh`. The work is split over all axes of the mesh that
      are not mapped already, as far as together they divide the batch;
    - inside :func:`jax.shard_map` with `axis_name`, with the gradient taken outside or inside;
    - inside :func:`jax.pmap` with `axis_name`, with the gradient taken inside, followed by
      :func:`jax.lax.pmean` over the parameters' gradients.

    :func:`jax.vmap` is supported on one device only.

    Args:
      embeddings_a: First view, floating array [batch, dim], where dim = num_segments * units.
        Inside `shard_map` or `pmap`, the samples of the device.
      embeddings_b: Second view of the same samples, of the same shape and dtype.
      num_segments: Number of segments S, at least 2.
      temperature: Softmax temperature.
      diagonal_weight: Weight of the first term.
      cross_segment_weight: Weight of the second term.
      invariance_weight: Weight of the third term.
      center: Whether to subtract each view's mean over the global batch first.
      axis_name: Axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.
      product_dtype: Dtype of the operands of the matrix products, which are also what devices
        exchange. By default that of the embeddings, but float32 for float16 and narrower types,
        which cannot represent 1e-8. `jnp.bfloat16` halves the traffic of float32 embeddings. Sums
        are in float32, or float64 for float64.

    Returns:
      A scalar, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: If the views differ in shape or dtype or are not floating arrays [batch, dim], dim
        is not a multiple of `num_segments`, there are fewer than two segments, the temperature is
        not a positive finite number, or `product_dtype` cannot represent 1e-8.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from music_jax.objectives import music_loss, music_lower_bound
      >>> codes = jnp.array([[9.0, 0, 9, 0], [9, 0, 0, 9], [0, 9, 9, 0], [0, 9, 0, 9]])
      >>> loss, gradient = jax.value_and_grad(music_loss)(
      ...     codes, codes, num_segments=2, temperature=0.1)
      >>> print(f"{loss:.4f} {music_lower_bound(2):.4f} {gradient.shape}")
      -2.0794 -2.0794 (4, 4)

    Reference:
      Niu & Wang, `Self-Supervised Representation Learning With MUlti-Segmental Informational Coding
      <https://arxiv.org/abs/2206.06461>`_, 2022
    """
    terms = music_terms(
        embeddings_a,
        embeddings_b,
        num_segments=num_segments,
        temperature=temperature,
        center=center,
        axis_name=axis_name,
        product_dtype=product_dtype,
    )
    return (
        diagonal_weight * terms.diagonal
        + cross_segment_weight * terms.cross_segment
        + invariance_weight * terms.invariance
    )


def music_lower_bound(units_per_segment: int) -> float:
    """Returns the lower bound of `music_loss` at its default weights, -3 log K.

    Args:
      units_per_segment: Number of units K of each segment.

    Returns:
      -3 log K.

    Raises:
      ValueError: If there is not at least one unit.

    Example:
      >>> from music_jax.objectives import music_lower_bound
      >>> round(music_lower_bound(80), 4)
      -13.1461
    """
    if units_per_segment < 1:
        raise ValueError(f"units_per_segment: expected at least 1, got {units_per_segment}")
    return -3.0 * math.log(units_per_segment)


def _product_dtype(dtype: Any, product_dtype: Any) -> jnp.dtype:
    allowed = (jnp.bfloat16, jnp.float32, jnp.float64)
    if product_dtype is None:
        return jax.dtypes.canonicalize_dtype(dtype if dtype in allowed else jnp.float32)
    product_dtype = jnp.dtype(product_dtype)
    if product_dtype not in allowed:
        raise ValueError(
            f"product_dtype: expected bfloat16, float32 or float64, got {product_dtype}; other "
            "dtypes cannot represent the smallest probability, 1e-8"
        )
    return product_dtype


@functools.partial(
    jax.jit, static_argnames=("num_segments", "centered", "product_dtype", "axis_name")
)
def _terms(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    temperature: jax.Array,
    *,
    num_segments: int,
    centered: bool,
    product_dtype: jnp.dtype,
    axis_name: AxisName | None,
) -> MusicTerms:
    if centered:
        embeddings_a, embeddings_b = (
            subtract_mean(z, axis_name) for z in (embeddings_a, embeddings_b)
        )
    logits_a, logits_b = (
        unit_logits(z, num_segments=num_segments, temperature=temperature)  # [n, S, K]
        for z in (embeddings_a, embeddings_b)
    )
    center = center_of(logits_a, logits_b, axis_name, product_dtype)
    (ra, added_a), (rb, added_b) = (unit_ratios(z, center) for z in (logits_a, logits_b))
    cross_segment = cross_segment_entropy(
        (ra, rb), (added_a, added_b), center, axis_name=axis_name, product_dtype=product_dtype
    )
    # The other two terms need only the diagonal of P and the agreement of each sample's views.
    units = ra.shape[-1]
    products = ra * rb  # [n, S, K]
    # K times the sum over k of p^a p^b, minus c, since the centered ratios of a segment sum to 0.
    agreement = jnp.mean(products, axis=-1)  # [n, S]
    log_agreement = log_ratio(agreement, center)
    mean_agreement = global_mean(jnp.mean(agreement), axis_name) + center
    # J_ii - c, where J_ii = P_ii K²
    diagonal = global_mean(jnp.mean(products + center * (ra + rb), axis=0), axis_name)  # [S, K]
    entropy = jnp.sum(divergence(diagonal, center)) / (num_segments * units**2)
    log_units = math.log(units)
    return MusicTerms(
        diagonal=entropy + (1 - 2 * log_units) / units * mean_agreement,
        cross_segment=cross_segment,
        invariance=log_units - global_mean(jnp.mean(log_agreement), axis_name),
    )
