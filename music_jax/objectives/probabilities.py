"""From embeddings to the probabilities of each segment's units."""

import jax
import jax.numpy as jnp

from music_jax.objectives.checks import (
    check_embeddings,
    check_pair,
    check_segments,
    check_temperature,
)
from music_jax.objectives.global_batch import accumulation_dtype

MIN_PROBABILITY = 1e-8


def segment_probabilities(
    embeddings: jax.Array, *, num_segments: int, temperature: float | jax.Array = 1.0
) -> jax.Array:
    r"""Probability of each unit of each segment.

    .. math::

      p_{nsk} = \frac{\exp(z_{nsk} / \tau)}{\sum_{k'} \exp(z_{nsk'} / \tau)}

    Args:
      embeddings: [batch, dim] floating array, dim = num_segments * units.
      num_segments: number of segments S into which the embedding is cut.
      temperature: the softmax's temperature.

    Returns:
      [batch, num_segments, units], where each unit axis sums to 1; float32, or float64 for float64.

    Raises:
      ValueError: if an argument is not as described.

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


def unit_logits(
    embeddings: jax.Array, *, num_segments: int, temperature: float | jax.Array
) -> jax.Array:
    """What the softmax is taken of, the largest of each segment being 0: [batch, segments, units].

    Args:
      embeddings: [batch, dim] floating array, dim = num_segments * units.
      num_segments: number of segments.
      temperature: the softmax's temperature.

    Returns:
      float32, or float64 for float64.
    """
    batch, dim = embeddings.shape
    dtype = accumulation_dtype(embeddings.dtype)
    z = jnp.asarray(embeddings, dtype).reshape(
        batch, num_segments, dim // num_segments
    )  # [N, S, K]
    # The largest is taken off before the division, so that no finite input over a small temperature
    # overflows.
    z = z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    return z / jnp.asarray(temperature, dtype)


def segment_codes(embeddings: jax.Array, *, num_segments: int) -> jax.Array:
    """The most probable unit of each segment: a sample's code, one symbol a segment.

    Args:
      embeddings: [batch, dim] floating array, dim = num_segments * units.
      num_segments: number of segments S into which the embedding is cut.

    Returns:
      [batch, num_segments] int32 array of numbers in [0, units).

    Raises:
      ValueError: if an argument is not as described.

    Example:
      >>> import jax.numpy as jnp
      >>> from music_jax.objectives import segment_codes
      >>> segment_codes(jnp.array([[0.1, 2.0, 5.0, 3.0]]), num_segments=2).tolist()
      [[1, 0]]
    """
    check_embeddings(embeddings)
    check_segments(embeddings.shape[1], num_segments)
    batch, dim = embeddings.shape
    z = embeddings.reshape(batch, num_segments, dim // num_segments)  # [N, S, K]
    return jnp.argmax(z, axis=-1).astype(jnp.int32)


def clamp(p: jax.Array) -> jax.Array:
    """Raises probabilities to at least 1e-8; they are not renormalized."""
    # Not jnp.maximum, which halves the gradient where both are equal.
    return jnp.where(p >= MIN_PROBABILITY, p, jnp.asarray(MIN_PROBABILITY, p.dtype))


def joint_probability(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    num_segments: int,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    r"""Joint probability of the units of the two views, for looking at and not for training.

    .. math::

      P_{ij} = \frac{1}{N} \sum_n p^a_{ni} \, p^b_{nj}

    with the probabilities clamped below at 1e-8, as the objective sees them. :func:`music_loss`
    computes the same without ever holding this matrix.

    Args:
      embeddings_a: [batch, dim] floating array, the first view.
      embeddings_b: [batch, dim] floating array, the second view.
      num_segments: number of segments S into which the embedding is cut.
      temperature: the softmax's temperature.

    Returns:
      [dim, dim]; rows are the units of the first view, columns those of the second.

    Raises:
      ValueError: if an argument is not as described.

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
