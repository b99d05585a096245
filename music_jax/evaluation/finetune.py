"""Protocols that fine-tune the backbone: on all labels, or on a fraction of them."""

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import config_dict

from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.distributed.mesh import shares_cores
from music_jax.errors import DivergedError, NotMeasurableError, UndecodableError, UserError
from music_jax.evaluation.features import (
    Extractor,
    extract_split,
    normalize,
    random_crop_batches,
    replicate,
)
from music_jax.evaluation.results import Result
from music_jax.evaluation.run import Run
from music_jax.metrics.few_shot import stratified_subset
from music_jax.metrics.linear_probe import ranks
from music_jax.models.network import Tree
from music_jax.workdir.files import decode_text

_logger = logging.getLogger(__name__)


class FinetuneRecipe(NamedTuple):
    """Hyperparameters of fine-tuning.

    Attributes:
      num_epochs: Number of passes over the labeled images.
      batch_size: Number of images per step.
      backbone_learning_rate: Learning rate for a batch of 256, decayed to 0 by a cosine.
      head_learning_rate: Learning rate of the linear classifier, likewise.
      momentum: Momentum of SGD.
      weight_decay: Weight decay of all parameters.
    """

    num_epochs: int
    batch_size: int
    backbone_learning_rate: float
    head_learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 0.0


class Classifier(NamedTuple):
    """A backbone with a linear classifier.

    Attributes:
      params: Parameters of the network.
      kernel: Weights of the classifier, [features, classes].
      bias: Biases of the classifier, [classes].
      batch_stats: Running statistics of the network.
    """

    params: Tree
    kernel: jax.Array
    bias: jax.Array
    batch_stats: Tree


def full_finetune(run: Run) -> Result:
    """Fine-tunes the backbone on all labeled training images."""
    settings, rows = run.config.finetune, run.labeled_rows("train")
    rates = settings.backbone_learning_rate, settings.head_learning_rate
    result = _finetune_and_test(run, rows, settings, rates, "fine-tuning")
    return result | run.count_unlabeled("train", "test")


def semi_supervised(run: Run) -> Result:
    """Fine-tunes the backbone on a fraction of the labels: by default 1 % and 10 %."""
    settings, source = run.config.semi_supervised, run.evaluation_sources().train
    results = {}
    for i, fraction in enumerate(settings.fractions):
        if settings.lists[i]:
            listed = rows_of_list(source, settings.lists[i])
            rows = np.intersect1d(listed, run.labeled_rows("train"))
        else:
            train = run.train()
            rows = train.indices[stratified_subset(train.labels, fraction, seed=run.config.seed)]
        rates = settings.backbone_learning_rates[i], settings.head_learning_rates[i]
        name = f"{100 * fraction:g} %"
        results[name] = {
            **_finetune_and_test(run, rows, settings, rates, f"fine-tuning on {name}"),
            "list": settings.lists[i] or "stratified",
        }
    return {"by_share": results, **run.count_unlabeled("train", "test")}


def _finetune_and_test(
    run: Run,
    rows: np.ndarray,
    settings: config_dict.ConfigDict,
    learning_rates: tuple[float, float],
    description: str,
) -> Result:
    if len(rows) < 2:
        raise NotMeasurableError(f"{description} needs two images or more with a label")
    train, test = run.evaluation_sources()
    recipe = FinetuneRecipe(
        settings.num_epochs,
        min(settings.batch_size, len(rows)),
        *learning_rates,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    batches = random_crop_batches(
        train.subset(rows),
        run.config,
        run.mesh,
        batch_size=recipe.batch_size,
        num_epochs=recipe.num_epochs,
        seed=run.config.seed,
        skipped=run.skipped,
    )
    steps = recipe.num_epochs * (len(rows) // recipe.batch_size)
    with progress.bar(steps, unit="step", description=description) as bar:
        classifier = train_classifier(run, batches, recipe, num_steps=steps, after_step=bar.update)
    found = extract_split(
        logit_extractor(run, classifier),
        test.subset(run.labeled_rows("test")),
        run.config,
        run.mesh,
        skipped=run.skipped,
        description=f"{description}, test",
    )
    if not len(found):
        raise NotMeasurableError(f"none of the images of {test.name} can be decoded")
    logits = found.arrays["logits"]
    if not np.all(np.isfinite(logits)):
        raise DivergedError(f"{description} diverged; lower its learning rates")
    rank = ranks(logits, found.labels)
    return {
        "top1": float(np.mean(rank < 1)),
        "top5": float(np.mean(rank < 5)),
        "num_train": len(rows),
        "num_test": len(found),
        "batch_size": recipe.batch_size,
    }


def train_classifier(
    run: Run,
    batches: Iterable[tuple[jax.Array, jax.Array]],
    recipe: FinetuneRecipe,
    *,
    num_steps: int,
    after_step: Callable[[], None] = lambda: None,
) -> Classifier:
    """Trains the backbone of a run together with a linear classifier.

    BatchNorm uses batch statistics. The kernel of the classifier is drawn from N(0, 0.01²).

    Args:
      run: Run, whose parameters are not modified.
      batches: Images [batch, height, width, channels] and integer labels [batch] of each step.
      recipe: Hyperparameters.
      num_steps: Number of steps, for the schedule.
      after_step: Function called after each step, such as the update of a progress bar.
    """

    def sgd(base_learning_rate: float) -> optax.GradientTransformation:
        peak = base_learning_rate * recipe.batch_size / 256
        schedule = optax.cosine_decay_schedule(peak, num_steps)
        return optax.chain(
            optax.add_decayed_weights(recipe.weight_decay),
            optax.sgd(schedule, momentum=recipe.momentum),
        )

    optimizer = optax.multi_transform(
        {"backbone": sgd(recipe.backbone_learning_rate), "head": sgd(recipe.head_learning_rate)},
        {"backbone": "backbone", "head": "head"},
    )
    shape = run.network.num_features, run.num_classes
    kernel = 0.01 * jax.random.normal(jax.random.key(run.config.seed), shape)
    initial = {"backbone": run.params, "head": (kernel, jnp.zeros(run.num_classes))}
    trained, batch_stats = replicate((initial, run.batch_stats), run.mesh)
    opt_state = jax.jit(optimizer.init)(trained)
    step = jax.jit(functools.partial(_step, run, optimizer), donate_argnums=2)
    for i, (images, labels) in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(run.config.seed), i)
        trained, batch_stats, opt_state = step(trained, batch_stats, opt_state, images, labels, key)
        if shares_cores(run.mesh):
            jax.block_until_ready(trained["head"])
        after_step()
    kernel, bias = trained["head"]
    return Classifier(trained["backbone"], kernel, bias, batch_stats)


def _step(
    run: Run,
    optimizer: optax.GradientTransformation,
    trained: Tree,
    batch_stats: Tree,
    opt_state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[Tree, Tree, optax.OptState]:
    def loss(trained: Tree) -> tuple[jax.Array, Tree]:
        features, new_stats = run.network.train_features(
            trained["backbone"], batch_stats, normalize(images, run.config), key
        )
        kernel, bias = trained["head"]
        logits = features.astype(jnp.float32) @ kernel + bias[None]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), new_stats

    grads, new_stats = jax.grad(loss, has_aux=True)(trained)
    updates, opt_state = optimizer.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), new_stats, opt_state


def logit_extractor(run: Run, classifier: Classifier) -> Extractor:
    """Returns an extractor of `logits` [batch, classes], which uses the running statistics."""

    @jax.jit
    def extract(classifier: Classifier, images: jax.Array) -> dict[str, jax.Array]:
        features = run.network.features(
            classifier.params, classifier.batch_stats, normalize(images, run.config)
        )
        logits = features.astype(jnp.float32) @ classifier.kernel + classifier.bias[None]
        return {"logits": logits}

    return functools.partial(extract, classifier)


def rows_of_list(source: Source, path: str) -> np.ndarray:
    """Finds the images that a file lists, one per line, such as SimCLR's subsets of ImageNet.

    The name of an image is the last part of its path in a folder, or the `file_name` of its record
    in a TFDS dataset that has one (as `imagenet2012` does). Images may be missing if there are as
    many records that cannot be read.

    Args:
      source: Images.
      path: Path of the list.

    Returns:
      Indices in the source, ascending.

    Raises:
      UserError: The list cannot be read, is empty, or names an image that does not exist.
    """
    try:
        with open(os.path.expanduser(path), "rb") as file:
            lines = decode_text(file.read()).replace("\r", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list of images {path!r}: {error}") from error
    wanted = {os.path.basename(line.strip()) for line in lines if line.strip()}
    if not wanted:
        raise UserError(f"the list of images {path!r} is empty")
    rows, found, unreadable = [], set(), 0
    with progress.bar(len(source), unit="img", description="images on the list") as bar:
        for index in range(len(source)):
            try:
                name = _file_name(source, index)
            except UndecodableError:
                name, unreadable = "", unreadable + 1
            if name in wanted:
                rows.append(index)
                found.add(name)
            bar.update()
    missing = sorted(wanted - found)
    if missing and rows and len(missing) <= unreadable:
        _logger.warning(
            f"{len(missing)} images of the list {path!r} are excluded: {unreadable} records of "
            f"{source.name} cannot be read"
        )
    elif missing:
        raise UserError(
            f"{len(missing)} of the {len(wanted)} images of the list {path!r} are not in "
            f"{source.name}, such as {missing[0]!r}; expected names as in "
            f"{source.record_name(0)!r}, or the file_name of a record"
        )
    return np.asarray(rows)


def _file_name(source: Source, index: int) -> str:
    name = os.path.basename(source.record_name(index))
    if not name.isdigit():
        return name
    file_name = source.record(index).get("file_name", name)
    return os.path.basename(file_name.decode() if isinstance(file_name, bytes) else str(file_name))
