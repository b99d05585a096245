"""The MUSIC objective: entropy of each segment, joint entropy of two segments, and invariance."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from music_jax.objectives.checks import check_pair, check_segments, check_temperature
from music_jax.objectives.cross_segment import cross_segment_entropy
from music_jax.objectives.global_batch import (
    AxisName,
    accumulation_dtype,
    global_mean,
    over_global_batch,
)
from music_jax.objectives.probabilities import unit_logits
from music_jax.objectives.ratios import center_of, divergence, log_ratio, unit_ratios


class MusicTerms(NamedTuple):
    """The objective's three terms, unweighted; each is smaller the better.

    Attributes:
      diagonal: negative entropy of each segment's units, the two views agreeing; at least -log K,
        or -2/e for K = 2.
      cross_segment: negative joint entropy of two different segments; at least -2 log K.
      invariance: minus the log probability that the two views of a sample agree; at least 0.
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
    axis_name: AxisName | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    product_dtype: Any = None,
    precision: Any = None,
) -> MusicTerms:
    r"""The three terms of the MUSIC objective, unweighted.

    See :func:`music_loss`, whose arguments these are.

    Args:
      embeddings_a: [batch, dim] floating array, the first view; dim = num_segments * units.
      embeddings_b: [batch, dim] array, the second view of the same samples.
      num_segments: number of segments S, at least 2.
      temperature: the softmax's temperature.
      axis_name: axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.
      mesh: mesh of the batch, under `jit`.
      product_dtype: dtype of the matrix products' operands.
      precision: `precision` of the matrix products.

    Returns:
      MusicTerms of scalars, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: if an argument is not as described.

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
        num_segments=num_segments,
        product_dtype=_product_dtype(embeddings_a.dtype, product_dtype),
        precision=precision,
    )
    temperature = jnp.asarray(temperature, accumulation_dtype(embeddings_a.dtype))
    return over_global_batch(
        function, embeddings_a, embeddings_b, temperature, axis_name=axis_name, mesh=mesh
    )


def music_loss(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    num_segments: int,
    temperature: float | jax.Array = 1.0,
    diagonal_weight: float | jax.Array = 1.0,
    cross_segment_weight: float | jax.Array = 1.0,
    invariance_weight: float | jax.Array = 1.0,
    axis_name: AxisName | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    product_dtype: Any = None,
    precision: Any = None,
) -> jax.Array:
    r"""The MUSIC objective of two views' embeddings.

    An embedding is cut into S segments of K units. A softmax over each segment gives
    probabilities :math:`p_{nsk}`, clamped below at 1e-8; over the N samples of the global batch
    they give the joint probability of a unit of one view and a unit of the other,

    .. math::

      P_{ij} = \frac{1}{N} \sum_n p^a_{ni} \, p^b_{nj}

    and the objective is

    .. math::

      \frac{1}{S} \sum_i P_{ii} \log P_{ii}
      + \frac{1}{S (S - 1)} \sum_{s(i) \ne s(j)} P_{ij} \log P_{ij}
      - \frac{1}{N S} \sum_{n, s} \log \sum_k p^a_{nsk} \, p^b_{nsk}

    where s(i) is unit i's segment.

    *Lower bound.* At the default weights, and but for the clamp's 1e-8, the value is at least
    :math:`-3 \log K`. Take one segment, and let q in (0, 1] be the sum of its K diagonal elements
    of P. By the log-sum inequality its part of the diagonal term is at least q log(q / K). The
    mean over n of :math:`\sum_k p^a_{nsk} p^b_{nsk}` is q, so by Jensen's inequality its part of
    the invariance term is at least -log q. The sum of both, (q - 1) log q - q log K, falls in q:
    its derivative, log q + 1 - 1/q - log K, is at most -log K <= 0 as log q <= 0 and 1/q >= 1; so
    it is at least its value at q = 1, -log K. And a pair of segments has K² joint probabilities
    that sum to 1, whose negative entropy is at least -2 log K. Both are reached together where
    every segment is one-hot and alike in both views, uniform over its units, and the segments are
    independent in pairs. See :func:`music_lower_bound`.

    The D x D matrix P is never held. The value and its gradient take three matrix products of
    N D² multiplications, a block of rows at a time, and on several devices each takes a tile of P.
    Second derivatives are right, taken as the derivative, in either mode, of `jax.grad`. `jax.jvp`
    of this function itself raises JAX's TypeError on forward mode.

    *Several devices.* The value and the gradient are those of the global batch

    - under `jax.jit`, on arrays sharded along the batch over a mesh. The mesh is found by itself:
      it is that of the arrays, or that of `jax.set_mesh`, or the argument `mesh`;
    - inside `jax.shard_map`, with `axis_name`, the gradient taken outside;
    - inside `jax.pmap`, with `axis_name`, the gradient taken inside and then `jax.lax.pmean` over
      the parameters' gradients.

    `jax.vmap` of the function is for one device: JAX cannot map the grouped exchange between
    several.

    Args:
      embeddings_a: [batch, dim] floating array, the first view; dim = num_segments * units. Inside
        `shard_map` or `pmap`, the device's samples.
      embeddings_b: [batch, dim] array of the same dtype, the second view of the same samples.
      num_segments: number of segments S, at least 2.
      temperature: the softmax's temperature, positive.
      diagonal_weight: weight of the first term.
      cross_segment_weight: weight of the second.
      invariance_weight: weight of the third.
      axis_name: axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.
      mesh: mesh over which the batch is sharded, under `jit`, where neither the arrays nor
        `jax.set_mesh` tell it. The work is split over all its axes that are not mapped already, as
        far as together they divide the batch.
      product_dtype: dtype of the matrix products' operands, and of what is sent between devices;
        sums are in float32, or float64 for float64. By default that of the embeddings, but float32
        for float16, which cannot hold 1e-8. `jnp.bfloat16` halves what float32 embeddings send.
      precision: `precision` of the matrix products, as `jax.lax.dot_general` takes it.

    Returns:
      A scalar, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: if the views differ in shape or dtype, are not [batch, dim] or not floating, if
        dim is not a multiple of num_segments, if there are fewer than two segments, or if the
        temperature is not positive.

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
        axis_name=axis_name,
        mesh=mesh,
        product_dtype=product_dtype,
        precision=precision,
    )
    return (
        diagonal_weight * terms.diagonal
        + cross_segment_weight * terms.cross_segment
        + invariance_weight * terms.invariance
    )


def music_lower_bound(units_per_segment: int) -> float:
    """The least value of `music_loss` at its default weights, -3 log K.

    Args:
      units_per_segment: number of units K of each segment.

    Returns:
      -3 log K.

    Raises:
      ValueError: if there is not at least one unit.

    Example:
      >>> from music_jax.objectives import music_lower_bound
      >>> round(music_lower_bound(80), 4)
      -13.1461
    """
    if units_per_segment < 1:
        raise ValueError(f"units_per_segment: expected at least 1, got {units_per_segment}")
    return -3.0 * math.log(units_per_segment)


def _product_dtype(dtype: Any, product_dtype: Any) -> jnp.dtype:
    if product_dtype is None:
        return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)
    product_dtype = jnp.dtype(product_dtype)
    if product_dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise ValueError(
            f"product_dtype: expected bfloat16, float32 or float64, got {product_dtype}; other "
            "dtypes cannot hold the least probability, 1e-8"
        )
    return product_dtype


@functools.partial(
    jax.jit, static_argnames=("num_segments", "product_dtype", "precision", "axis_name")
)
def _terms(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    temperature: jax.Array,
    *,
    num_segments: int,
    product_dtype: jnp.dtype,
    precision: Any,
    axis_name: AxisName | None,
) -> MusicTerms:
    logits_a, logits_b = (
        unit_logits(z, num_segments=num_segments, temperature=temperature)  # [n, S, K]
        for z in (embeddings_a, embeddings_b)
    )
    center = center_of(logits_a, logits_b, axis_name)
    (ra, added_a), (rb, added_b) = (unit_ratios(z, center) for z in (logits_a, logits_b))
    cross_segment = cross_segment_entropy(
        ra,
        rb,
        added_a,
        added_b,
        center,
        axis_name=axis_name,
        product_dtype=product_dtype,
        precision=precision,
    )
    # The diagonal of P and the agreement of a sample's views need no matrix product.
    units = ra.shape[-1]
    products = ra * rb  # [n, S, K]
    # K times the sum over k of p^a p^b, less c: a segment's ratios sum to 0 if they are centerd.
    agreement = jnp.mean(products, axis=-1)  # [n, S]
    log_agreement = log_ratio(agreement, center)
    mean_agreement = global_mean(jnp.mean(agreement), axis_name) + center
    # J_ii = P_ii K², less c
    diagonal = global_mean(jnp.mean(products + center * (ra + rb), axis=0), axis_name)  # [S, K]
    entropy = jnp.sum(divergence(diagonal, center)) / (num_segments * units**2)
    log_units = math.log(units)
    return MusicTerms(
        diagonal=entropy + (1 - 2 * log_units) / units * mean_agreement,
        cross_segment=cross_segment,
        invariance=log_units - global_mean(jnp.mean(log_agreement), axis_name),
    )
