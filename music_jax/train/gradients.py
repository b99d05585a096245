"""Gradients of an objective of a whole batch, which may be embedded in microbatches."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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


# Maps parameters, running statistics, images [batch, ...] and sample indices [batch] to embeddings
# [batch, views, dim] and new running statistics.
Embed = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


class BatchGradients(NamedTuple):
    """Loss, metrics and gradients of a batch, and the running statistics after it."""

    loss: jax.Array
    metrics: Metrics
    grads: Any
    batch_stats: Any


def batch_gradients(
    embed: Embed,
    objective: Objective,
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    sample_index: jax.Array,
) -> BatchGradients:
    """Computes the gradients of a batch in one pass.

    Args:
      embed: Network in training mode.
      objective: Loss of the embeddings of two views.
      params: Parameters.
      batch_stats: Running statistics.
      images: Images [batch, ...].
      sample_index: Global index of each sample, [batch].
    """

    def loss_of(params: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
        embeddings, new_stats = embed(params, batch_stats, images, sample_index)
        loss, metrics = objective(embeddings[:, 0], embeddings[:, 1])
        return loss, (new_stats, metrics)

    (loss, (new_stats, metrics)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return BatchGradients(loss, metrics, grads, new_stats)


def accumulated_gradients(
    embed: Embed,
    objective: Objective,
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    sample_index: jax.Array,
    *,
    steps: int,
    place: Callable[[Any], Any] = lambda grads: grads,
) -> BatchGradients:
    """Computes the gradients of a batch in microbatches, for activations that do not fit.

    The loss is still that of the whole batch. A first pass embeds the microbatches and stores only
    their embeddings; the objective gives the loss and its gradient with respect to them; a second
    pass embeds each microbatch again and propagates that gradient to the parameters. This costs one
    more forward pass and needs memory for the activations of one microbatch. Both passes augment
    the views, identically, since their randomness is keyed by sample.

    BatchNorm normalizes over a microbatch (on all devices), so that the gradient differs from that
    of `batch_gradients`. The running statistics are updated once per microbatch, in the first pass.

    Sample `n` is in microbatch `n % steps`: the same on any number of devices, and each device
    keeps its samples.

    Args:
      embed: Network in training mode.
      objective: Loss of the embeddings of two views.
      params: Parameters.
      batch_stats: Running statistics.
      images: Images [batch, ...].
      sample_index: Global index of each sample, [batch].
      steps: Number of microbatches, a divisor of the batch size.
      place: Function that shards gradients for their summation.

    Reference:
      Gao et al, `Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
      <https://arxiv.org/abs/2101.06983>`_, 2021
    """

    def first_pass(stats: Any, microbatch: jax.Array) -> tuple[Any, jax.Array]:
        part = (_microbatch(x, microbatch, steps) for x in (images, sample_index))
        embeddings, stats = embed(params, stats, *part)
        return stats, embeddings

    def second_pass(grads: Any, microbatch: jax.Array) -> tuple[Any, None]:
        part = [_microbatch(x, microbatch, steps) for x in (images, sample_index)]
        _, pullback = jax.vjp(lambda params: embed(params, batch_stats, *part)[0], params)
        (more,) = pullback(_microbatch(cotangents, microbatch, steps))
        return jax.tree.map(jnp.add, grads, place(more)), None

    def loss_of(embeddings: jax.Array) -> tuple[jax.Array, Metrics]:
        return objective(embeddings[:, 0], embeddings[:, 1])

    microbatches = jnp.arange(steps)
    new_stats, parts = jax.lax.scan(first_pass, batch_stats, microbatches)
    embeddings = parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])  # [batch, views, dim]
    (loss, metrics), cotangents = jax.value_and_grad(loss_of, has_aux=True)(embeddings)
    zeros = place(jax.tree.map(jnp.zeros_like, params))
    grads, _ = jax.lax.scan(second_pass, zeros, microbatches)
    return BatchGradients(loss, metrics, grads, new_stats)


def _microbatch(x: jax.Array, microbatch: jax.Array, steps: int) -> jax.Array:
    """Returns the rows n of [batch, ...] with n % steps == microbatch: [batch / steps, ...]."""
    rows = x.reshape(-1, steps, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(rows, microbatch, axis=1, keepdims=False)
