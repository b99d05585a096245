"""Linear classifiers on frozen features, trained by SGD with several learning rates at once."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy  # which imports its modules when they are used

from music_jax.errors import DivergedError, NotMeasurableError
from music_jax.metrics.knn import check_samples
from music_jax.metrics.multi_label import (
    average_precisions,
    mean_average_precision,
    sigmoid_losses,
)
from music_jax.metrics.scaling import Features, fit_scaling

_INIT_STREAM = 2**33  # separates the initial kernel's randomness from the batches'
_BLOCK = 4096  # samples processed at once


@dataclasses.dataclass(frozen=True)
class ProbeRecipe:
    """Hyperparameters of the training of a linear classifier.

    Attributes:
      num_epochs: Number of passes over the training features.
      batch_size: Number of samples per step.
      base_learning_rates: Candidate learning rates, for a batch of 256.
      momentum: Momentum of SGD.
      weight_decay: Weight decay of the kernel and the bias.
      drop_epochs: Epochs after which the rate is divided by 10; if empty, it decays to 0 by a
        cosine.
    """

    num_epochs: int
    batch_size: int
    base_learning_rates: tuple[float, ...]
    momentum: float = 0.9
    weight_decay: float = 0.0
    drop_epochs: tuple[int, ...] = ()


class Heads(NamedTuple):
    """One linear classifier per learning rate.

    Attributes:
      kernel: Weights, [rates, features, classes].
      bias: Biases, [rates, classes].
    """

    kernel: jax.Array
    bias: jax.Array


class ProbeResult(NamedTuple):
    """Result of a linear probe.

    Attributes:
      top1: Top-1 accuracy on all test samples, in [0, 1]; NaN if samples have several classes.
      top5: Top-5 accuracy, likewise.
      base_learning_rate: Selected learning rate, for a batch of 256.
      num_train: Number of training samples.
      predictions: Predicted labels of the test samples, int32 [test]; if samples have several
        classes, whether the score of each class is positive, [test, classes].
      average_precisions: Average precision of each class on the test samples, [classes], if samples
        have several classes.
      heads: The classifier, of scaled features.
      confidences: Probabilities of the predicted labels, float32 [test], if samples have one class.
      scale: Scaling of the features.
    """

    top1: float
    top5: float
    base_learning_rate: float
    num_train: int
    predictions: np.ndarray
    average_precisions: np.ndarray | None = None
    heads: Heads | None = None
    confidences: np.ndarray | None = None
    scale: Callable[[Features], Features] = lambda unscaled: unscaled

    def classifier(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns kernel [features, classes] and bias [classes] for unscaled features."""
        if self.heads is None:
            return None
        heads, zeros = self.heads, jnp.zeros((1, self.heads.kernel.shape[1]))
        with jax.default_matmul_precision("highest"):
            bias, transpose = jax.vjp(lambda x: logits(heads, self.scale(x))[0], zeros)
            (kernel,) = jax.vmap(transpose)(jnp.eye(bias.shape[1])[:, None])
        return np.asarray(kernel[:, 0].T), np.asarray(bias[0])


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

    Args:
      train_features: Training features, [train, features].
      train_labels: Training labels, integers [train]; or [train, classes], as
        `music_jax.metrics.multi_label` describes them, for a logistic regression of each class.
      test_features: Test features, [test, features].
      test_labels: Test labels, likewise.
      recipe: Hyperparameters.
      num_classes: Number of classes.
      feature_scaling: Scaling of the features, one of `scaling.FEATURE_SCALINGS`.
      validation_fraction: Fraction of the training samples that selects the learning rate.
      seed: Seed of the initial kernel, the batches and the validation samples.
      after_step: Function called after each step, such as the update of a progress bar.

    Returns:
      The accuracies or average precisions on the whole test set, and the predictions.

    Raises:
      DivergedError: The training diverged with every learning rate.
      ValueError: The shapes do not match.
    """
    check_samples(training=(train_features, train_labels), test=(test_features, test_labels))
    scale = fit_scaling(feature_scaling, lambda: train_features)
    train_features, test_features = scale(train_features), scale(test_features)

    def batches(recipe: ProbeRecipe, rows: np.ndarray) -> Iterator[tuple[jax.Array, jax.Array]]:
        for batch in shuffled_batches(train_features[rows], train_labels[rows], recipe, seed):
            yield batch
            after_step()

    return train_and_test(
        batches,
        lambda rows: (train_features[rows], train_labels[rows]),
        (test_features, test_labels),
        recipe,
        num_train=len(train_labels),
        num_classes=num_classes,
        validation_fraction=validation_fraction,
        seed=seed,
    )._replace(scale=scale)


def num_steps(recipe: ProbeRecipe, num_train: int, validation_fraction: float) -> int:
    """Returns the number of steps that `linear_probe` takes."""
    counts = [num_train]
    if len(recipe.base_learning_rates) > 1:
        counts.append(len(split_for_validation(num_train, validation_fraction, 0)[0]))
    return sum(recipe.num_epochs * (n // min(recipe.batch_size, n)) for n in counts)


def train_and_test(
    batches: Callable[[ProbeRecipe, np.ndarray], Iterable[tuple[jax.Array, jax.Array]]],
    validation_samples: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    test_samples: tuple[np.ndarray, np.ndarray],
    recipe: ProbeRecipe,
    *,
    num_train: int,
    num_classes: int,
    validation_fraction: float,
    seed: int,
    synchronous: bool = False,
) -> ProbeResult:
    """Selects the learning rate on held-out training samples, then trains on all and tests.

    With a single learning rate, nothing is held out. Test samples never influence the selection,
    which is by top-1 accuracy, or by mean average precision if samples have several classes.

    Args:
      batches: Function from a recipe and rows of the training samples to batches of scaled features
        and labels, as `fit` takes them.
      validation_samples: Function from such rows to their scaled features and labels.
      test_samples: Scaled features and labels to test with.
      recipe: Hyperparameters.
      num_train: Number of training samples.
      num_classes: Number of classes.
      validation_fraction: Share of the training samples to choose the learning rate by.
      seed: Seed of the initial weights and of the held-out samples.
      synchronous: Whether each step ends before the next batch is made, for batches on several
        devices that share the cores of a CPU.
    """
    features, labels = test_samples

    def train(rates: tuple[float, ...], rows: np.ndarray) -> Heads:
        batch_size = min(recipe.batch_size, len(rows))
        chosen = dataclasses.replace(recipe, base_learning_rates=rates, batch_size=batch_size)
        return fit(
            batches(chosen, rows),
            chosen,
            num_features=features.shape[1],
            num_classes=num_classes,
            steps_per_epoch=len(rows) // batch_size,
            seed=seed,
            synchronous=synchronous,
        )

    rates = recipe.base_learning_rates
    if len(rates) > 1:
        rest, held_out = split_for_validation(num_train, validation_fraction, seed)
        heads = train(rates, rest)
        rates = (rates[np.nanargmax(_by_rate(heads, *validation_samples(held_out)))],)
    heads = train(rates, np.arange(num_train))
    if labels.ndim == 2:
        top1, top5, confidences = np.nan, np.nan, None
        (precisions,) = class_precisions(heads, features, labels)
        chosen = [scores[0] > 0 for scores in _scores(heads, features)]
    else:
        (top1, top5), precisions = accuracies(heads, features, labels)[0], None
        blocks = [scores[0] for scores in _scores(heads, features)]
        chosen = [scores.argmax(axis=1) for scores in blocks]
        sure = [scipy.special.softmax(scores, axis=1).max(axis=1) for scores in blocks]
        confidences = np.concatenate(sure)
    predictions = np.concatenate(chosen).astype(np.int32)
    scores = float(top1), float(top5)
    return ProbeResult(*scores, rates[0], num_train, predictions, precisions, heads, confidences)


def _by_rate(heads: Heads, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the score of each classifier that selects the learning rate, [rates]."""
    if labels.ndim == 1:
        return accuracies(heads, features, labels)[:, 0]
    precisions = class_precisions(heads, features, labels)
    return np.asarray(
        [np.nan if row is None else mean_average_precision(row) for row in precisions]
    )


def split_for_validation(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows at random into those to train on and those held out, each ascending."""
    order = np.random.Generator(np.random.Philox(key=[seed, 2**32])).permutation(count)
    held_out = min(max(1, round(fraction * count)), count - 1)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def fit(
    batches: Iterable[tuple[jax.Array, jax.Array]],
    recipe: ProbeRecipe,
    *,
    num_features: int,
    num_classes: int,
    steps_per_epoch: int,
    seed: int,
    synchronous: bool = False,
) -> Heads:
    """Trains one classifier per learning rate, all on the same batches.

    A batch has features [batch, features] and labels as `linear_probe` takes them. The initial
    kernel is drawn from N(0, 0.01²) by `seed`; `steps_per_epoch` sets the schedule.
    """
    num_rates = len(recipe.base_learning_rates)
    # Initialized on the host: on a small dataset, compiling this would take longer than training.
    draw = np.random.Generator(np.random.Philox(key=[seed, _INIT_STREAM]))
    kernel = 0.01 * draw.standard_normal((num_features, num_classes), np.float32)
    heads = Heads(
        kernel=jnp.asarray(np.tile(kernel, (num_rates, 1, 1))),
        bias=jnp.asarray(np.zeros((num_rates, num_classes), np.float32)),
    )
    velocity = jax.tree.map(jnp.zeros_like, heads)
    rates = np.asarray(recipe.base_learning_rates, np.float32) * recipe.batch_size / 256
    num_steps = recipe.num_epochs * steps_per_epoch
    if recipe.drop_epochs:
        drops = {epoch * steps_per_epoch: 0.1 for epoch in recipe.drop_epochs}
        schedule = optax.piecewise_constant_schedule(1.0, drops)
    else:
        schedule = optax.cosine_decay_schedule(1.0, num_steps)
    scales = np.asarray(jax.jit(jax.vmap(schedule))(np.arange(num_steps, dtype=np.float32)))
    for (features, labels), scale in zip(batches, scales, strict=False):
        heads, velocity = _sgd_step(
            heads, velocity, features, labels, rates, scale, recipe.momentum, recipe.weight_decay
        )
        if synchronous:
            jax.block_until_ready(heads)
    return heads


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
        if labels.ndim == 2:
            losses = sigmoid_losses(scores, labels[None])
        else:
            repeated = jnp.broadcast_to(labels[None], scores.shape[:2])
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(scores, repeated)
        return jnp.sum(jnp.mean(losses, axis=1))  # the loss of each rate has its own parameters

    grads = jax.grad(total_loss)(heads)
    velocity = jax.tree.map(
        lambda m, g, w: momentum * m + g + weight_decay * w, velocity, grads, heads
    )

    def move(w: jax.Array, m: jax.Array) -> jax.Array:
        return w - scale * rates.reshape(-1, *(1,) * (w.ndim - 1)) * m

    return jax.tree.map(move, heads, velocity), velocity


def shuffled_batches(
    features: np.ndarray, labels: np.ndarray, recipe: ProbeRecipe, seed: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields batches, shuffled in each epoch; the incomplete batch of an epoch is dropped."""
    on_device, on_device_labels = jnp.asarray(features), jnp.asarray(labels)
    for epoch in range(recipe.num_epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(labels))
        for start in range(0, len(labels) - recipe.batch_size + 1, recipe.batch_size):
            yield _take(on_device, on_device_labels, order[start : start + recipe.batch_size])


@jax.jit
def _take(features: jax.Array, labels: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    return features[rows], labels[rows]


def accuracies(heads: Heads, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the top-1 and top-5 accuracies of each classifier on all samples, in [0, 1].

    Returns:
      float64 [rates, 2]; NaN for a classifier with a score that is not finite.

    Raises:
      DivergedError: All classifiers have such a score.
      NotMeasurableError: There are no samples.
    """
    _check_any(labels)
    correct = np.zeros((heads.bias.shape[0], 2))
    for i, scores in enumerate(_scores(heads, features)):
        rank = ranks(scores, labels[i * _BLOCK : (i + 1) * _BLOCK])
        correct += np.stack([np.sum(rank < k, axis=1) for k in (1, 5)], axis=1)
        correct[~np.all(np.isfinite(scores), axis=(1, 2))] = np.nan
    _check_converged(~np.isnan(correct))
    return correct / len(labels)


def class_precisions(
    heads: Heads, features: np.ndarray, labels: np.ndarray
) -> list[np.ndarray | None]:
    """Returns the average precisions [classes] of each classifier.

    They are None for a classifier with a score that is not finite. Raises as `accuracies` does.
    """
    _check_any(labels)
    scores = np.concatenate([*_scores(heads, features)], axis=1)  # [rates, samples, classes]
    finite = np.all(np.isfinite(scores), axis=(1, 2))
    _check_converged(finite)
    return [
        average_precisions(x, labels) if ok else None for x, ok in zip(scores, finite, strict=True)
    ]


def _check_any(labels: np.ndarray) -> None:
    if not len(labels):
        raise NotMeasurableError("no images are left to choose the learning rate by, or to test")


def _check_converged(converged: np.ndarray) -> None:
    if not np.any(converged):
        raise DivergedError("the linear probe diverged; lower its learning rates")


def ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the number of other classes that score at least as high as the label.

    Ties and NaN count against the label, so that constant scores are never right.

    Args:
      scores: Scores, [..., samples, classes].
      labels: Labels, integers [samples].

    Returns:
      Integers [..., samples]; 0 if the label scores highest.
    """
    label_scores = np.take_along_axis(
        scores, np.broadcast_to(labels[:, None], (*scores.shape[:-1], 1)), -1
    )
    return np.sum(~(scores < label_scores), axis=-1) - 1


@jax.jit
def logits(heads: Heads, features: jax.Array) -> jax.Array:
    """Returns the scores [rates, batch, classes] of features [batch, features]."""
    return jnp.einsum("bf,rfc->rbc", features, heads.kernel) + heads.bias[:, None, :]


def _scores(heads: Heads, features: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(features), _BLOCK):
        yield np.asarray(logits(heads, features[start : start + _BLOCK]))
