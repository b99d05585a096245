"""A linear classifier, trained in parallel to the pre-training without an effect on it.

It uses the backbone after every step, in inference mode, in a separate jitted step: the program of
the pre-training, and so every bit of its result, is the same with and without it.
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.checkpoint.manager import Checkpoints
from music_jax.data import datasets
from music_jax.data.augment import normalize_images
from music_jax.data.datasets import EvaluationSources
from music_jax.data.loader import TrainingOrder
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed.mesh import shares_cores
from music_jax.errors import UserError
from music_jax.models.network import Tree
from music_jax.train.input import TrainingInput
from music_jax.train.recipe import Recipe

_logger = logging.getLogger(__name__)


class ProbeState(NamedTuple):
    """Everything that a step of the probe changes.

    Attributes:
      head: `kernel` [features, classes] and `bias` [classes].
      opt_state: State of the optimizer.
      mean: Running mean of each feature, [features].
      variance: Running variance of each feature, [features].
      correct: Number of images since the last log that were classified correctly before the probe
        learned from them, float32.
      seen: Number of images since the last log, float32.
    """

    head: dict[str, jax.Array]
    opt_state: Any
    mean: jax.Array
    variance: jax.Array
    correct: jax.Array
    seen: jax.Array


def _init_probe(
    num_features: int, num_classes: int, settings: config_dict.ConfigDict
) -> ProbeState:
    """Returns the state before the first step."""
    head = {"kernel": jnp.zeros((num_features, num_classes)), "bias": jnp.zeros(num_classes)}
    opt_state = _optimizer(settings).init(head)
    mean, variance = jnp.zeros(num_features), jnp.ones(num_features)
    return ProbeState(head, opt_state, mean, variance, correct=jnp.zeros(()), seen=jnp.zeros(()))


def _optimizer(settings: config_dict.ConfigDict) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(settings.weight_decay, {"kernel": True, "bias": False})
    return optax.chain(decay, optax.sgd(settings.learning_rate, settings.momentum))


def _probe_step(
    probe: ProbeState, features: jax.Array, labels: jax.Array, settings: config_dict.ConfigDict
) -> ProbeState:
    """Takes one step of SGD on features [batch, features], which get no gradient.

    The features are standardized by running statistics with the same momentum. The learning rate is
    constant, since the features change until the end. `correct` is counted with the old head.
    """
    momentum, features = settings.momentum, jax.lax.stop_gradient(features.astype(jnp.float32))
    mean = momentum * probe.mean + (1 - momentum) * jnp.mean(features, axis=0)
    variance = momentum * probe.variance + (1 - momentum) * jnp.var(features, axis=0)
    features = (features - mean[None]) * jax.lax.rsqrt(variance + 1e-6)[None]

    def loss(head: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = features @ head["kernel"] + head["bias"][None]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        # As in `linear_probe.ranks`, ties and NaN count against the label.
        of_label = jnp.take_along_axis(logits, labels[:, None], axis=1)
        return jnp.mean(losses), jnp.sum(jnp.sum(logits >= of_label, axis=1) == 1)

    grads, correct = jax.grad(loss, has_aux=True)(probe.head)
    updates, opt_state = _optimizer(settings).update(grads, probe.opt_state, probe.head)
    return ProbeState(
        head=optax.apply_updates(probe.head, updates),
        opt_state=opt_state,
        mean=mean,
        variance=variance,
        correct=probe.correct + correct.astype(jnp.float32),
        seen=probe.seen + jnp.asarray(labels.shape[0], jnp.float32),
    )


def make_online_probe(
    config: config_dict.ConfigDict,
    sources: EvaluationSources | None,
    recipe: Recipe,
    mesh: Mesh,
    skipped: SkippedImages,
) -> "OnlineProbe | None":
    """Returns the probe if a config enables it, or None; none if images have several classes.

    It learns from the images of `config.online_probe.train`, or else of the final evaluation.

    Raises:
      UserError: The probe is enabled, but there are no labeled images to train it on.
    """
    if not config.online_probe.enabled:
        return None
    advice = "name a labeled set with --config.online_probe.train=, a folder or NAME:SPLIT of TFDS"
    if config.online_probe.train:
        source = datasets.open_named(config, config.online_probe.train, prepare=True)
    elif sources is not None:
        source = sources.train
    else:
        raise UserError(f"config.online_probe.enabled needs labeled images; {advice}")
    if source.multi_label:
        _logger.warning(
            f"the online probe is off: the images of {source.name} may have several classes each"
        )
        return None
    if source.num_classes < 2:
        reason = source.no_classes and f" ({source.no_classes})"
        raise UserError(f"{source.name} has no labels for the online probe{reason}; {advice}")
    rows = np.flatnonzero(source.labels() != -1)
    if len(rows) < 2:
        raise UserError(
            f"only {len(rows)} of the {len(source)} images of {source.name} have a label, too few "
            f"for the online probe; {advice}"
        )
    if unlabeled := len(source) - len(rows):
        _logger.info(f"online probe: {unlabeled:,} images without a label are ignored")
        source = source.subset(rows)
    return OnlineProbe(config, source, recipe, mesh, skipped)


class OnlineProbe:
    """Trains the probe along with the steps of a training.

    Attributes:
      state: The probe's state, to be saved with the training's.
    """

    state: ProbeState
    _batches: Iterator[dict[str, np.ndarray]]

    def __init__(
        self,
        config: config_dict.ConfigDict,
        source: Source,
        recipe: Recipe,
        mesh: Mesh,
        skipped: SkippedImages,
    ):
        """Prepares the probe's step; no image is read yet. See `make_online_probe`."""
        settings, network = config.online_probe, recipe.network
        self._every = settings.every_steps
        order = TrainingOrder(len(source), min(settings.batch_size, len(source)), config.seed)
        self._input = TrainingInput(config, source, order, mesh, skipped)
        self._has_diverged = False
        self._replicated = replicated = NamedSharding(mesh, PartitionSpec())
        sizes = network.num_features, source.num_classes
        self._init = functools.partial(_init_probe, *sizes, settings)

        def step(
            probe: ProbeState, params: Tree, batch_stats: Tree, images: jax.Array, labels: jax.Array
        ) -> ProbeState:
            params = jax.lax.with_sharding_constraint(params, replicated)
            images = normalize_images(images, mean=recipe.mean, std=recipe.std, dtype=recipe.dtype)
            features = network.features(params, batch_stats, images)
            return _probe_step(probe, features, labels, settings)

        self._step = jax.jit(step, donate_argnums=0, out_shardings=replicated)

    def start(self, step: int, num_steps: int, checkpoints: Checkpoints) -> None:
        """Restores the probe of a step's checkpoint, or initializes it if there is none."""
        self._has_diverged = False
        # The identical zeros need separate buffers, since each is donated.
        self.state = jax.device_put(self._init(), self._replicated, may_alias=False)
        if step:
            try:
                if not checkpoints.has(step, "online_probe"):
                    raise UserError(f"step {step} has none saved")
                like, sharding = self.state, self._replicated
                self.state = checkpoints.restore(step, like, sharding, name="online_probe")
            except UserError as error:
                _logger.warning(f"the online probe starts from scratch: {error}")
        start, stop = step // self._every, num_steps // self._every
        self._batches = self._input.on_host(start, stop, num_views=1)

    def after_step(self, step: int, params: Tree, batch_stats: Tree) -> None:
        """Takes a step on the next labeled images, every `every_steps` steps of the training."""
        if step % self._every:
            return
        batch, placing = next(self._batches), self._input.placing
        images, labels = placing(batch["images"][:, 0]), placing(batch["label"])
        self.state = self._step(self.state, params, batch_stats, images, labels)
        if shares_cores(placing.mesh):
            jax.block_until_ready(self.state)

    def metrics(self) -> dict[str, float]:
        """Returns `online_top1` of the images since the last call.

        It is empty if there were none, or once the probe has diverged, which is logged.
        """
        seen, correct = float(self.state.seen), float(self.state.correct)
        if not seen or self._has_diverged:
            return {}
        if not all(np.all(np.isfinite(np.asarray(x))) for x in jax.tree.leaves(self.state)):
            self._has_diverged = True
            _logger.warning(
                "the online probe diverged and is no longer reported; lower "
                "config.online_probe.learning_rate"
            )
            return {}
        zeros = jax.device_put((jnp.zeros(()), jnp.zeros(())), self._replicated)
        self.state = self.state._replace(seen=zeros[0], correct=zeros[1])
        return {"online_top1": correct / seen}
