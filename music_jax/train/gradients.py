"""The gradient of an objective of the whole batch's embeddings, in one part or in several."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from music_jax.train.objective import Metrics, Objective

# Parameters, running statistics, images [batch, ...] and their indices [batch], to embeddings
# [batch, views, dim] and the new running statistics.
Embed = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


class BatchGradients(NamedTuple):
    """What a batch tells.

    Attributes:
      loss: the objective of the whole batch.
      metrics: what else the objective reports.
      grads: the loss's gradient by the parameters.
      batch_stats: the running statistics after the batch.
    """

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
    """The gradient of a batch that is embedded in one pass.

    Args:
      embed: the network in training mode.
      objective: the loss of two views' embeddings.
      params: the parameters.
      batch_stats: the running statistics.
      images: [batch, ...].
      sample_index: [batch].

    Returns:
      The loss, its gradient and the new running statistics.
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
    """The same for a batch whose activations do not fit: in microbatches, with cached embeddings.

    The loss is still that of the whole batch. A first pass embeds one microbatch after another and
    keeps the embeddings alone; the objective gives the loss and its gradient by them; a second pass
    embeds each microbatch again and takes that gradient on to the parameters. It costs one more
    forward pass, and the memory of the activations of one microbatch. Views are augmented in both
    passes, which their key by sample makes the same, rather than kept.

    What normalizes over the batch normalizes over a microbatch (on all devices), so that with
    BatchNorm the gradient is that of another network than the whole batch in one pass. The running
    statistics move once a microbatch, in the first pass.

    Sample `n` is in microbatch `n % steps`: on any number of devices the same, and each device
    keeps its samples.

    Args:
      embed: the network in training mode.
      objective: the loss of two views' embeddings.
      params: the parameters.
      batch_stats: the running statistics.
      images: [batch, ...].
      sample_index: [batch].
      steps: number of microbatches, a divisor of the batch.
      place: puts gradients where they are to be added up.

    Returns:
      The loss, its gradient and the new running statistics.

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
    """The rows n of [batch, ...] for which n % steps is `microbatch`: [batch / steps, ...]."""
    rows = x.reshape(-1, steps, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(rows, microbatch, axis=1, keepdims=False)
