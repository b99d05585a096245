"""Probabilities as ratios to the uniform distribution, exact near to it.

Near to a uniform segment, as at the start of training, what the objective and its gradient depend
on is how far K p is from 1: a small difference, of which p itself, rounded, has kept few digits.
There the objective works with K p - 1 ("centerd"), and elsewhere with K p, since a small p has its
digits only so. Which of the two is one choice for the global batch: a number, the center c, which
is 1 or 0, has been taken off all ratios.
"""

import jax
import jax.numpy as jnp

from music_jax.objectives.global_batch import AxisName, global_max
from music_jax.objectives.probabilities import MIN_PROBABILITY

# The largest difference of two logits of a segment that counts as near to uniform.
_NEAR = 1 / 32


def center_of(logits_a: jax.Array, logits_b: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """1 if all segments of all samples of both views are near to uniform, else 0.

    Args:
      logits_a: [local batch, num_segments, units], the largest of each segment being 0.
      logits_b: those of the second view.
      axis_name: axis, or axes, over which the batch is split.

    Returns:
      A scalar of the logits' dtype, the same on every device.
    """
    least = jax.lax.stop_gradient(jnp.minimum(jnp.min(logits_a), jnp.min(logits_b)))
    return (global_max(-least, axis_name) < _NEAR).astype(logits_a.dtype)


def unit_ratios(logits: jax.Array, center: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K p - c, with p clamped below at 1e-8, and what the clamp has added to the sums of p.

    Args:
      logits: [batch, num_segments, units], the largest of each segment being 0.
      center: c, by `center_of`.

    Returns:
      The ratios, [batch, num_segments, units], and what the clamp has added to the sum of each
      segment's p, [batch, num_segments].
    """
    units = logits.shape[-1]
    ratios = _softmax_ratios(logits, center)
    least = units * MIN_PROBABILITY - center
    # Not jnp.maximum, which halves the gradient where both are equal.
    kept = ratios >= least
    added = jnp.sum(jnp.where(kept, 0, least - ratios), axis=-1) / units
    return jnp.where(kept, ratios, least), added


@jax.custom_jvp
def _softmax_ratios(logits: jax.Array, center: jax.Array) -> jax.Array:
    """K softmax(logits) - c."""
    units = logits.shape[-1]

    def centerd(logits: jax.Array) -> jax.Array:
        less = jnp.expm1(logits)
        total = jnp.sum(less, axis=-1, keepdims=True)
        return (units * less - total) / (units + total)

    def plain(logits: jax.Array) -> jax.Array:
        return units * jax.nn.softmax(logits, axis=-1)

    return jax.lax.cond(center > 0, centerd, plain, logits)


@_softmax_ratios.defjvp
def _softmax_ratios_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    ratios = _softmax_ratios(*primals)
    whole, tangent = ratios + primals[1], tangents[0]  # K p
    return ratios, whole * (tangent - jnp.mean(whole * tangent, axis=-1, keepdims=True))


@jax.custom_jvp
def log_ratio(ratio: jax.Array, center: jax.Array) -> jax.Array:
    """log(ratio + c)."""
    near_one = jnp.log1p(jnp.maximum(ratio, -0.5))
    return jnp.where(center > 0, near_one, jnp.log(_whole(ratio, center)))


@log_ratio.defjvp
def _log_ratio_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return log_ratio(*primals), tangents[0] / _whole(*primals)


def _whole(ratio: jax.Array, center: jax.Array) -> jax.Array:
    return jnp.maximum(ratio + center, 1e-30)


@jax.custom_jvp
def divergence(ratio: jax.Array, center: jax.Array) -> jax.Array:
    """J log J - J, of J = ratio + c."""
    return (ratio + center) * (log_ratio(ratio, center) - 1)


@divergence.defjvp
def _divergence_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # Put together by the chain rule, log J - 1 + 1 would lose what is small in it.
    return divergence(*primals), log_ratio(*primals) * tangents[0]
