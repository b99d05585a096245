"""A linear classifier on frozen features, trained by SGD for several learning rates at once."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from music_jax.errors import DivergedError, NotMeasurableError
from music_jax.evaluation.metrics.feature_scaling import fit_scaling

_INIT_STD = 0.01
_INIT_STREAM = 2**33  # separates the initial kernel's randomness from the batches'
_BLOCK = 4096  # samples that are scored at once


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
    after_step: Callable[[], None] = lambda: None,
) -> Heads:
    """Trains one classifier for each learning rate, all on the same batches.

    Args:
      batches: features [batch, features] and integer labels [batch] of every step.
      recipe: how to train.
      num_features: size of the features.
      num_classes: number of labels.
      steps_per_epoch: steps an epoch, for the schedule.
      seed: of the initial kernel, drawn from N(0, 0.01).
      after_step: called after each step, such as to move a progress bar.

    Returns:
      The classifiers.
    """
    num_rates = len(recipe.base_learning_rates)
    # Made on the host: on a small dataset it would take longer to compile this than to train.
    draw = np.random.Generator(np.random.Philox(key=[seed, _INIT_STREAM]))
    kernel = _INIT_STD * draw.standard_normal((num_features, num_classes), np.float32)
    heads = Heads(
        kernel=jnp.asarray(np.tile(kernel, (num_rates, 1, 1))),
        bias=jnp.asarray(np.zeros((num_rates, num_classes), np.float32)),
    )
    velocity = jax.tree.map(lambda w: jnp.asarray(np.zeros(w.shape, np.float32)), heads)
    rates = np.asarray(recipe.base_learning_rates, np.float32) * recipe.batch_size / 256
    steps = np.arange(recipe.num_epochs * steps_per_epoch, dtype=np.float32)
    scales = np.asarray(jax.jit(jax.vmap(_schedule(recipe, steps_per_epoch)))(steps))
    for (features, labels), scale in zip(batches, scales, strict=False):
        heads, velocity = _sgd_step(
            heads, velocity, features, labels, rates, scale, recipe.momentum, recipe.weight_decay
        )
        after_step()
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
    scale: np.float32,
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
        return w - scale * rates.reshape(-1, *(1,) * (w.ndim - 1)) * m

    return jax.tree.map(move, heads, velocity), velocity


class ProbeResult(NamedTuple):
    """What a linear probe found.

    Attributes:
      top1: accuracy over all test samples, in [0, 1].
      top5: share of the test samples whose label is among the five best.
      base_learning_rate: the one chosen, at a batch of 256.
      num_train: training samples.
      predictions: of the test samples, int32 [test].
    """

    top1: float
    top5: float
    base_learning_rate: float
    num_train: int
    predictions: np.ndarray


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    recipe: ProbeRecipe,
    *,
    num_classes: int,
    feature_scaling: str = "none",
    validation_fraction: float = 0.1,
    seed: int = 0,
    after_step: Callable[[], None] = lambda: None,
) -> ProbeResult:
    """Trains a linear classifier on features of one view of each image, and tests it.

    Where there are several learning rates, the one is taken that is best on a part of the training
    samples, after training on the rest; then all of them are trained on.

    Args:
      train_features: [train, features].
      train_labels: integers [train].
      test_features: [test, features].
      test_labels: integers [test].
      recipe: how to train.
      num_classes: number of labels.
      feature_scaling: how features are scaled, as `fit_scaling` names it.
      validation_fraction: of the training samples, to choose the learning rate.
      seed: of the initial kernel, the batches and the validation part.
      after_step: called after each of `num_steps` steps, such as to move a progress bar.

    Returns:
      The accuracies over the whole test set, and the predictions.

    Raises:
      DivergedError: as `best_rate` and `score_heads`.
      ValueError: features and labels do not fit together.
    """
    if len(train_features) != len(train_labels) or len(test_features) != len(test_labels):
        raise ValueError(
            f"expected a label for each sample; got {len(train_features)} training features and "
            f"{len(train_labels)} labels, {len(test_features)} test features and "
            f"{len(test_labels)} labels"
        )
    scale = fit_scaling(feature_scaling, lambda: train_features)
    train_features, test_features = scale(train_features), scale(test_features)

    def trained(recipe: ProbeRecipe, rows: np.ndarray) -> Heads:
        recipe = clip_batch(recipe, len(rows))
        return fit(
            shuffled_batches(train_features[rows], train_labels[rows], recipe, seed),
            recipe,
            num_features=train_features.shape[1],
            num_classes=num_classes,
            steps_per_epoch=len(rows) // recipe.batch_size,
            seed=seed,
            after_step=after_step,
        )

    rates = recipe.base_learning_rates
    if len(rates) > 1:
        rest, held_out = split_for_validation(len(train_labels), validation_fraction, seed)
        heads = trained(recipe, rest)
        rates = (rates[best_rate(heads, train_features[held_out], train_labels[held_out])],)
    recipe = dataclasses.replace(recipe, base_learning_rates=rates)
    heads = trained(recipe, np.arange(len(train_labels)))
    return score_heads(heads, test_features, test_labels, rates[0], num_train=len(train_labels))


def num_steps(recipe: ProbeRecipe, num_train: int, validation_fraction: float) -> int:
    """How many steps `linear_probe` takes."""

    def steps(count: int) -> int:
        return recipe.num_epochs * (count // clip_batch(recipe, count).batch_size)

    if len(recipe.base_learning_rates) == 1:
        return steps(num_train)
    rest, _ = split_for_validation(num_train, validation_fraction, 0)
    return steps(len(rest)) + steps(num_train)


def clip_batch(recipe: ProbeRecipe, num_train: int) -> ProbeRecipe:
    """The recipe with a batch that is no larger than the training set."""
    return dataclasses.replace(recipe, batch_size=min(recipe.batch_size, num_train))


def split_for_validation(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random disjoint rows, ascending: the rest, and the part held out."""
    order = np.random.Generator(np.random.Philox(key=[seed, 2**32])).permutation(count)
    held_out = min(max(1, round(count * fraction)), count - 1)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def best_rate(heads: Heads, features: np.ndarray, labels: np.ndarray) -> int:
    """Chooses the learning rate whose classifier is best on held-out samples.

    A classifier that diverged is worse than any other.

    Returns:
      Its index.

    Raises:
      DivergedError: all of them diverged.
      NotMeasurableError: there are no samples.
    """
    if not len(labels):
        raise NotMeasurableError("no images are left to choose the learning rate by")
    top1 = accuracies(heads, features, labels)[:, 0]
    if np.all(np.isnan(top1)):
        raise DivergedError("the linear probe diverged; lower its learning rates")
    return int(np.nanargmax(top1))


def score_heads(
    heads: Heads,
    features: np.ndarray,
    labels: np.ndarray,
    base_learning_rate: float,
    *,
    num_train: int,
) -> ProbeResult:
    """What the first of the classifiers is worth on the test samples.

    Raises:
      DivergedError: its scores are not all finite.
    """
    top1, top5 = accuracies(heads, features, labels)[0]
    if np.isnan(top1):
        raise DivergedError("the linear probe diverged; lower its learning rates")
    return ProbeResult(
        float(top1), float(top5), base_learning_rate, num_train, predict(heads, features)
    )


def predict(heads: Heads, features: np.ndarray) -> np.ndarray:
    """The first classifier's label of each sample, int32 [samples]."""
    blocks = [
        np.argmax(np.asarray(_jitted_logits(heads, features[start : start + _BLOCK]))[0], axis=1)
        for start in range(0, len(features), _BLOCK)
    ]
    return np.concatenate(blocks).astype(np.int32)


def logits(heads: Heads, features: jax.Array) -> jax.Array:
    """Scores [rates, batch, classes] of features [batch, features]."""
    return jnp.einsum("bf,rfc->rbc", features, heads.kernel) + heads.bias[:, None, :]


def accuracies(
    heads: Heads, features: np.ndarray, labels: np.ndarray, *, top: tuple[int, ...] = (1, 5)
) -> np.ndarray:
    """Top-k accuracies in [0, 1], float64 [rates, len(top)], over all samples given.

    They are NaN for a classifier whose scores are not all finite.
    """
    correct = np.zeros((heads.bias.shape[0], len(top)))
    for start in range(0, len(labels), _BLOCK):
        block = slice(start, start + _BLOCK)
        scores = np.asarray(_jitted_logits(heads, features[block]))  # [rates, block, classes]
        rank = ranks(scores, labels[block])
        correct += np.stack([np.sum(rank < k, axis=1) for k in top], axis=1)
        correct[~np.all(np.isfinite(scores), axis=(1, 2))] = np.nan
    return correct / len(labels)


def ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes score no less than the label's own: 0 where the label is the best.

    Ties and NaN count against the label: scores that are all alike are never right.

    Args:
      scores: [..., samples, classes].
      labels: integers [samples].

    Returns:
      Integers [..., samples].
    """
    of_label = np.take_along_axis(
        scores, np.broadcast_to(labels[:, None], (*scores.shape[:-1], 1)), -1
    )
    return np.sum(~(scores < of_label), axis=-1) - 1


_jitted_logits = jax.jit(logits)


def shuffled_batches(
    features: np.ndarray, labels: np.ndarray, recipe: ProbeRecipe, seed: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Batches of cached features, shuffled anew each epoch; the remainder of each is left out."""
    on_device, on_device_labels = jnp.asarray(features), jnp.asarray(labels)
    for epoch in range(recipe.num_epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(labels))
        for start in range(0, len(labels) - recipe.batch_size + 1, recipe.batch_size):
            yield _take(on_device, on_device_labels, order[start : start + recipe.batch_size])


@jax.jit
def _take(features: jax.Array, labels: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return features[rows], labels[rows]
