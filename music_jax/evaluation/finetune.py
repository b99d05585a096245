"""Protocols that fine-tune the backbone: on all labels, or on a fraction of them."""

import functools
import logging
import os
from collections.abc import Iterable, Sequence
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
from music_jax.evaluation.features import Extractor
from music_jax.evaluation.results import MEAN_AVERAGE_PRECISION, Result
from music_jax.evaluation.run import Run
from music_jax.metrics.few_shot import stratified_subset
from music_jax.metrics.linear_probe import ranks
from music_jax.metrics.multi_label import (
    average_precisions,
    mean_average_precision,
    sigmoid_losses,
)
from music_jax.models.network import Tree
from music_jax.workdir.files import decode_text

_logger = logging.getLogger(__name__)


class Classifier(NamedTuple):
    """The trained parameters of a backbone with a linear classifier.

    Attributes:
      backbone: Parameters of the network.
      head: Weights and biases of the classifier, [features, classes] and [classes].
    """

    backbone: Tree
    head: Tree

    def logits(self, features: jax.Array) -> jax.Array:
        """Returns the logits [batch, classes] of features [batch, features]."""
        kernel, bias = self.head
        return features.astype(jnp.float32) @ kernel + bias[None]


def full_finetune(run: Run) -> Result:
    """Fine-tunes the backbone on all labeled training images."""
    settings = run.config.finetune
    rates = settings.backbone_learning_rate, settings.head_learning_rate
    return _finetune_and_test(run, run.labeled_rows("train"), settings, rates, "fine-tuning")


def semi_supervised(run: Run) -> Result:
    """Fine-tunes the backbone on a fraction of the labels: by default 1 % and 10 %."""
    settings = run.config.semi_supervised
    results = {}
    for fraction, path, backbone_rate, head_rate in zip(
        settings.fractions,
        settings.lists,
        settings.backbone_learning_rates,
        settings.head_learning_rates,
        strict=False,
    ):
        if path:
            listed = rows_of_list(run.evaluation_sources().train, path)
            rows = np.intersect1d(listed, run.labeled_rows("train"))
        else:
            train = run.train()
            rows = train.indices[stratified_subset(train.labels, fraction, seed=run.config.seed)]
        name, rates = f"{100 * fraction:g} %", (backbone_rate, head_rate)
        result = _finetune_and_test(run, rows, settings, rates, f"fine-tuning on {name}")
        results[name] = result | {"list": path or "stratified"}
    return {"by_share": results}


def _finetune_and_test(
    run: Run,
    rows: np.ndarray,
    settings: config_dict.ConfigDict,
    base_learning_rates: tuple[float, float],
    description: str,
) -> Result:
    if len(rows) < 2:
        raise NotMeasurableError(f"{description} needs two images or more with a label")
    train, test = run.evaluation_sources()
    batch_size = min(settings.batch_size, len(rows))
    batches = run.random_crop_batches(
        train.subset(rows),
        batch_size=batch_size,
        num_epochs=settings.num_epochs,
        description=description,
    )
    classifier, batch_stats = train_classifier(
        run,
        batches,
        num_steps=settings.num_epochs * (len(rows) // batch_size),
        learning_rates=[rate * batch_size / 256 for rate in base_learning_rates],
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    found = run.extract(
        logit_extractor(run, classifier, batch_stats),
        test.subset(run.labeled_rows("test")),
        f"{description}, test",
    )
    if not len(found):
        raise NotMeasurableError(f"none of the images of {test.name} can be decoded")
    logits = found.arrays["logits"]
    if not np.all(np.isfinite(logits)):
        raise DivergedError(f"{description} diverged; lower its learning rates")
    if run.multi_label:
        precisions = average_precisions(logits, found.labels)
        scores = {MEAN_AVERAGE_PRECISION: mean_average_precision(precisions)}
    else:
        rank = ranks(logits, found.labels)
        scores = {"top1": float(np.mean(rank < 1)), "top5": float(np.mean(rank < 5))}
    return {
        **scores,
        "num_train": len(rows),
        "num_test": len(found),
        "batch_size": batch_size,
    }


def train_classifier(
    run: Run,
    batches: Iterable[tuple[jax.Array, jax.Array]],
    *,
    num_steps: int,
    learning_rates: Sequence[float],
    momentum: float,
    weight_decay: float,
) -> tuple[Classifier, Tree]:
    """Trains a copy of the backbone of a run together with a linear classifier, by SGD.

    BatchNorm uses batch statistics. The kernel of the classifier is drawn from N(0, 0.01²).

    Args:
      run: Run.
      batches: Images [batch, height, width, channels] and labels, [batch] or [batch, classes], of
        each step.
      num_steps: Number of steps, after which the learning rates have decayed to 0 by a cosine.
      learning_rates: Initial learning rates of the backbone and of the classifier.
      momentum: Momentum.
      weight_decay: Weight decay of all parameters.

    Returns:
      The classifier and the running statistics of its backbone.
    """

    def sgd(learning_rate: float) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
        return optax.chain(
            optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=momentum)
        )

    backbone_rate, head_rate = learning_rates
    optimizer = optax.multi_transform(
        {"backbone": sgd(backbone_rate), "head": sgd(head_rate)}, Classifier("backbone", "head")
    )

    @functools.partial(jax.jit, donate_argnums=2)
    def step(
        classifier: Classifier,
        batch_stats: Tree,
        opt_state: optax.OptState,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
    ) -> tuple[Classifier, Tree, optax.OptState]:
        def loss(classifier: Classifier) -> tuple[jax.Array, Tree]:
            features, new_stats = run.network.train_features(
                classifier.backbone, batch_stats, run.normalize(images), key
            )
            logits = classifier.logits(features)
            if run.multi_label:
                losses = sigmoid_losses(logits, labels)
            else:
                losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses), new_stats

        grads, new_stats = jax.grad(loss, has_aux=True)(classifier)
        updates, opt_state = optimizer.update(grads, opt_state, classifier)
        return optax.apply_updates(classifier, updates), new_stats, opt_state

    shape = run.network.num_features, run.num_classes
    kernel = 0.01 * jax.random.normal(jax.random.key(run.config.seed), shape)
    initial = Classifier(run.params, (kernel, jnp.zeros(run.num_classes)))
    classifier, batch_stats = run.replicate((initial, run.batch_stats))
    opt_state = jax.jit(optimizer.init)(classifier)
    for i, (images, labels) in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(run.config.seed), i)
        classifier, batch_stats, opt_state = step(
            classifier, batch_stats, opt_state, images, labels, key
        )
        if shares_cores(run.mesh):
            jax.block_until_ready(classifier.head)
    return classifier, batch_stats


def logit_extractor(run: Run, classifier: Classifier, batch_stats: Tree) -> Extractor:
    """Returns an extractor of `logits` [batch, classes], which uses the running statistics."""

    @jax.jit
    def extract(
        classifier: Classifier, batch_stats: Tree, images: jax.Array
    ) -> dict[str, jax.Array]:
        images = run.normalize(images)
        features = run.network.features(classifier.backbone, batch_stats, images)
        return {"logits": classifier.logits(features)}

    return functools.partial(extract, classifier, batch_stats)


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
    names: list[str | None] = []  # None for records that cannot be read
    with progress.bar(len(source), unit="img", description="images on the list") as bar:
        for index in range(len(source)):
            try:
                names.append(_file_name(source, index))
            except UndecodableError:
                names.append(None)
            bar.update()
    rows, unreadable = [i for i, name in enumerate(names) if name in wanted], names.count(None)
    missing = sorted(wanted.difference(names))
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
