"""A linear classifier on frozen features, trained by SGD for several learning rates at once."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

_INIT_STD = 0.01


@dataclasses.dataclass(frozen=True)
class ProbeRecipe:
    """How the classifier is trained.

    Attributes:
      num_epochs: passes over the training features.
      batch_size: samples a step.
      base_learning_rates: the candidates, at a batch of 256.
      momentum: of SGD.
      weight_decay: of the kernel and the bias.
      drop_epochs: the rate falls to a tenth after each of these epochs; if empty, as a cosine to 0.
    """

    num_epochs: int
    batch_size: int
    base_learning_rates: tuple[float, ...]
    momentum: float = 0.9
    weight_decay: float = 0.0
    drop_epochs: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
    """One linear classifier a learning rate.

    Attributes:
      kernel: [rates, features, classes].
      bias: [rates, classes].
    """

    kernel: jax.Array
    bias: jax.Array


def fit(
    batches: Iterator[tuple[jax.Array, jax.Array]],
    recipe: ProbeRecipe,
    *,
    num_features: int,
    num_classes: int,
    steps_per_epoch: int,
    seed: int,
) -> Heads:
    """Trains one classifier for each learning rate, all on the same batches.

    Args:
      batches: features [batch, features] and integer labels [batch] of every step.
      recipe: how to train.
      num_features: size of the features.
      num_classes: number of labels.
      steps_per_epoch: steps an epoch, for the schedule.
      seed: of the initial kernel, drawn from N(0, 0.01).

    Returns:
      The classifiers.
    """
    num_rates = len(recipe.base_learning_rates)
    key = jax.random.key(seed)
    kernel = _INIT_STD * jax.random.normal(key, (num_features, num_classes))
    heads = Heads(
        kernel=jnp.tile(kernel[None], (num_rates, 1, 1)), bias=jnp.zeros((num_rates, num_classes))
    )
    rates = jnp.asarray(recipe.base_learning_rates, jnp.float32) * recipe.batch_size / 256
    velocity = jax.tree.map(jnp.zeros_like, heads)
    schedule = _schedule(recipe, steps_per_epoch)
    for step, (features, labels) in enumerate(batches):
        scale = jnp.asarray(schedule(step), jnp.float32)
        heads, velocity = _sgd_step(
            heads, velocity, features, labels, rates * scale, recipe.momentum, recipe.weight_decay
        )
    return heads


def _schedule(recipe: ProbeRecipe, steps_per_epoch: int) -> optax.Schedule:
    if recipe.drop_epochs:
        drops = {epoch * steps_per_epoch: 0.1 for epoch in recipe.drop_epochs}
        return optax.piecewise_constant_schedule(1.0, drops)
    return optax.cosine_decay_schedule(1.0, recipe.num_epochs * steps_per_epoch)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _sgd_step(
    heads: Heads,
    velocity: Heads,
    features: jax.Array,
    labels: jax.Array,
    rates: jax.Array,
    momentum: float,
    weight_decay: float,
) -> tuple[Heads, Heads]:
    def total_loss(heads: Heads) -> jax.Array:
        scores = logits(heads, features)  # [rates, batch, classes]
        repeated = jnp.broadcast_to(labels[None], scores.shape[:2])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(scores, repeated)
        return jnp.sum(jnp.mean(losses, axis=1))  # each rate's own loss has its own parameters

    grads = jax.grad(total_loss)(heads)
    velocity = jax.tree.map(
        lambda m, g, w: momentum * m + g + weight_decay * w, velocity, grads, heads
    )

    def move(w: jax.Array, m: jax.Array) -> jax.Array:
        return w - rates.reshape(-1, *(1,) * (w.ndim - 1)) * m

    return jax.tree.map(move, heads, velocity), velocity


def logits(heads: Heads, features: jax.Array) -> jax.Array:
    """Scores [rates, batch, classes] of features [batch, features]."""
    return jnp.einsum("bf,rfc->rbc", features, heads.kernel) + heads.bias[:, None, :]


def accuracies(
    heads: Heads, features: np.ndarray, labels: np.ndarray, *, top: tuple[int, ...] = (1, 5)
) -> np.ndarray:
    """Top-k accuracies in [0, 1], float64 [rates, len(top)], over all samples given."""
    correct = np.zeros((heads.bias.shape[0], len(top)), np.int64)
    for start in range(0, len(labels), 4096):
        block = slice(start, start + 4096)
        scores = np.asarray(_jitted_logits(heads, features[block]))  # [rates, block, classes]
        of_label = np.take_along_axis(scores, labels[None, block, None], axis=2)
        # Ties and NaN count against the label: scores that are all alike are never right.
        rank = np.sum(~(scores < of_label), axis=2) - 1  # [rates, block]
        correct += np.stack([np.sum(rank < k, axis=1) for k in top], axis=1)
    return correct / len(labels)


_jitted_logits = jax.jit(logits)


def shuffled_batches(
    features: np.ndarray, labels: np.ndarray, recipe: ProbeRecipe, seed: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Batches of cached features, shuffled anew each epoch; the remainder of each is left out."""
    on_device, on_device_labels = jnp.asarray(features), jnp.asarray(labels)
    for epoch in range(recipe.num_epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(labels))
        for start in range(0, len(labels) - recipe.batch_size + 1, recipe.batch_size):
            rows = jnp.asarray(order[start : start + recipe.batch_size])
            yield _take(on_device, rows), _take(on_device_labels, rows)


@jax.jit
def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x[rows]
