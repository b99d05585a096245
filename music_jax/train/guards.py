"""Guards that stop a failed training: non-finite losses, loss spikes, collapsed embeddings.

Every step is checked on the device, with a few scalars that are part of the training state. From
the step that trips a guard on, the state rejects every update, so that the host need only check
when it logs.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from music_jax.objectives import segment_probabilities
from music_jax.objectives.global_batch import subtract_mean

Metrics = dict[str, jax.Array]
# Maps the embeddings of the two views, [batch, dim] each, to the loss and further metrics.
Objective = Callable[[jax.Array, jax.Array], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class RandomObjective:
    """An objective that draws random numbers, anew in each step.

    Attributes:
      function: Function like an `Objective`, with a keyword argument `key`.
    """

    function: Callable[..., tuple[jax.Array, Metrics]]


_MIN_DEVIATION = 0.01  # of the loss, as a share of it, for the measure of a spike
_DEAD = 0.01  # share of the average usage, or deviation, below which a unit is dead
_DIRECTIONS = 64  # random, to estimate the effective rank

STATISTICS = ("usage_entropy", "dead_units", "embedding_std", "effective_rank")

# Bit i of `GuardState.reasons` stands for reason i.
REASONS = (
    "the loss or the gradient was not finite",
    "the loss spiked",
    "the segments used their units unevenly",
    "most units were dead",
    "the embeddings hardly varied",
    "the embeddings varied along hardly any dimension",
)
FIRST_COLLAPSE = 2  # the reasons from here on are collapses


class GuardState(NamedTuple):
    """State of the guards.

    Attributes:
      tripped_step: First step that tripped a guard, or -1, int32.
      reasons: Bits of the `REASONS` for which it tripped, int32.
      suspect_since: First of the consecutive steps that looked collapsed, or -1, int32.
      skipped: Number of steps that were skipped, int32.
      losses: Number of losses in the running mean, int32.
      loss_mean: Running mean of the loss, float32.
      loss_variance: Running variance of the loss, float32.
      seen: Scalars of the step that tripped, float32.
    """

    tripped_step: jax.Array
    reasons: jax.Array
    suspect_since: jax.Array
    skipped: jax.Array
    losses: jax.Array
    loss_mean: jax.Array
    loss_variance: jax.Array
    seen: dict[str, jax.Array]


def init_guard_state() -> GuardState:
    """Returns the state before the first step."""
    minus_one, zero = jnp.full((), -1, jnp.int32), jnp.zeros((), jnp.int32)
    nothing = jnp.zeros((), jnp.float32)
    names = ("loss", "grad_norm", "loss_mean", "loss_deviation", *STATISTICS)
    seen = dict.fromkeys(names, nothing)
    return GuardState(minus_one, zero, minus_one, zero, zero, nothing, nothing, seen)


def embedding_statistics(
    embeddings: jax.Array,
    *,
    num_segments: int | None = None,
    temperature: float = 1.0,
    center: bool = False,
) -> Metrics:
    r"""Measures how far a batch of embeddings is from a collapse.

    - `embedding_std`: mean over the units of the standard deviation of the L2-normalized
      embeddings, times sqrt(dim): 1 if they point everywhere, 0 if all are equal (Chen & He, arXiv
      2011.10566).
    - `effective_rank`: the participation ratio tr(C)² / tr(C²) of their covariance C, from 1 to
      dim: RankMe (arXiv 2210.02885) without singular values. For more than 64 units it is estimated
      from M = Rᵀ C R, where R holds 64 fixed directions of random signs, as the sum of M_ii M_jj
      over the sum of M_ij², i ≠ j. Their expectations are tr(C)² and tr(C²) up to a term that
      vanishes for both, so that neither C nor the Gram matrix of the batch is needed.
    - `usage_entropy`, only with segments: mean over the segments of the entropy of their units'
      mean probabilities, divided by the largest that the batch allows, log min(units, batch).
    - `dead_units`: share of the units, out of those that the batch could use, whose mean
      probability is below a hundredth of 1 / units. Without segments: share of the units whose
      standard deviation is below a hundredth of the mean one.

    Args:
      embeddings: Embeddings [batch, dim]. Under `jit` and sharded along the batch, the statistics
        are those of the global batch, and in the order of dim numbers are communicated.
      num_segments: Number of segments, None if the embedding has none.
      temperature: Softmax temperature of the segments.
      center: Whether to subtract the batch's mean first, as a centered objective does.

    Returns:
      float32 scalars by name.
    """
    batch, dim = embeddings.shape
    if center:
        embeddings = subtract_mean(embeddings)
    z = embeddings.astype(jnp.float32)
    norms = jnp.sqrt(jnp.sum(z**2, axis=1, keepdims=True))
    z = z / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
    z = z - jnp.mean(z, axis=0, keepdims=True)
    deviations = jnp.sqrt(jnp.mean(z**2, axis=0) * dim)  # [D]
    mean_deviation = jnp.mean(deviations)
    statistics = {"embedding_std": mean_deviation, "effective_rank": _effective_rank(z)}
    if num_segments is None:
        dead = jnp.mean((deviations <= _DEAD * mean_deviation).astype(jnp.float32))
        return statistics | {"dead_units": dead}
    units = dim // num_segments
    usable = min(units, batch)
    p = segment_probabilities(embeddings, num_segments=num_segments, temperature=temperature)
    usage = jnp.mean(p.astype(jnp.float32), axis=0)  # [S, K]
    entropy = -jnp.sum(usage * jnp.log(jnp.maximum(usage, 1e-30)), axis=1)
    alive = jnp.sum((usage >= _DEAD / units).astype(jnp.float32)) / (num_segments * usable)
    return statistics | {
        "usage_entropy": jnp.mean(entropy) / max(np.log(usable), 1e-9),
        "dead_units": jnp.maximum(1 - alive, 0),
    }


def _effective_rank(centered: jax.Array) -> jax.Array:
    """Returns the participation ratio of the covariance of centered rows [batch, dim], or 0."""
    dim = centered.shape[1]
    if dim <= _DIRECTIONS:
        m = centered.T @ centered
        pairs = np.ones((dim, dim), np.float32)
    else:
        signs = np.random.default_rng(0).integers(0, 2, (dim, _DIRECTIONS), np.int8) * 2 - 1
        projected = centered @ jnp.asarray(signs, jnp.int8).astype(jnp.float32)
        m = projected.T @ projected  # [64, 64]
        pairs = 1 - np.eye(_DIRECTIONS, dtype=np.float32)
    variances = jnp.diagonal(m)
    largest = jnp.maximum(jnp.max(variances), jnp.finfo(jnp.float32).tiny)
    m, variances = m / largest, variances / largest
    squares = jnp.sum(pairs * m**2)
    products = jnp.sum(pairs * jnp.outer(variances, variances))
    return products / jnp.maximum(squares, 1e-30)


def watch(
    guards: config_dict.FrozenConfigDict,
    state: GuardState,
    step: jax.Array,
    loss: jax.Array,
    grad_norm: jax.Array,
    metrics: Metrics,
) -> tuple[jax.Array, GuardState]:
    """Checks one step; to be called under `jax.jit`.

    Args:
      guards: The limits, `config.guards`.
      state: State before the step.
      step: Number of the step, from 1.
      loss: Loss of the step.
      grad_norm: Norm of its gradient.
      metrics: Metrics, of which the statistics are checked.

    Returns:
      Whether the update is applied, and the state after the step. Once a guard has tripped, no
      update is applied and the state does not change.
    """
    loss = loss.astype(jnp.float32)
    deviation = jnp.sqrt(state.loss_variance)
    difference = loss - state.loss_mean
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spike, collapsed = jnp.asarray(False), [jnp.asarray(False)] * 4
    if guards.enabled:
        warm = state.losses >= guards.warmup_steps
        if guards.loss_spike_deviations:
            unit = jnp.maximum(deviation, _MIN_DEVIATION * jnp.abs(state.loss_mean))
            spike = warm & (difference > guards.loss_spike_deviations * unit)
        collapsed = [
            warm & (metrics.get("usage_entropy", np.inf) < guards.min_usage_entropy),
            warm & (metrics.get("dead_units", 0.0) > guards.max_dead_units),
            warm & (metrics.get("embedding_std", np.inf) < guards.min_embedding_std),
            warm & (metrics.get("effective_rank", np.inf) < guards.min_effective_rank),
        ]
    suspect = jnp.any(jnp.stack(collapsed))
    since = jnp.where(state.suspect_since < 0, step, state.suspect_since)
    since = jnp.where(suspect, since, -1)
    long_enough = suspect & (step - since + 1 >= guards.collapse_steps)

    fresh = state.tripped_step < 0
    tripped = ~finite | spike | long_enough
    good, first = fresh & ~tripped, fresh & tripped
    reasons = jnp.stack([~finite, spike, *(long_enough & found for found in collapsed)])
    bits = jnp.sum(reasons.astype(jnp.int32) << jnp.arange(len(REASONS), dtype=jnp.int32))
    now = metrics | {"loss": loss, "grad_norm": grad_norm}
    now |= {"loss_mean": state.loss_mean, "loss_deviation": deviation}
    weight = 1 / jnp.minimum(state.losses + 1, guards.loss_spike_window).astype(jnp.float32)
    variance = (1 - weight) * (state.loss_variance + weight * difference**2)
    return good, GuardState(
        tripped_step=jnp.where(first, step, state.tripped_step),
        reasons=jnp.where(first, bits, state.reasons),
        suspect_since=jnp.where(fresh, since, state.suspect_since),
        skipped=state.skipped,
        losses=state.losses + good.astype(jnp.int32),
        loss_mean=jnp.where(good, state.loss_mean + weight * difference, state.loss_mean),
        loss_variance=jnp.where(good, variance, state.loss_variance),
        seen={
            name: jnp.where(first, now[name].astype(jnp.float32), old) if name in now else old
            for name, old in state.seen.items()
        },
    )
