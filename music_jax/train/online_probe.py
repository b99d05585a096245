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
from music_jax.data.crops import Crop
from music_jax.data.datasets import EvaluationSources
from music_jax.data.loader import TrainingOrder, training_batches
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed.mesh import local_positions, shares_cores, to_devices
from music_jax.errors import UserError
from music_jax.models.network import Tree
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


def _optimizer(
    learning_rate: float, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(weight_decay, {"kernel": True, "bias": False}),
        optax.sgd(learning_rate, momentum),
    )


def init_probe(num_features: int, num_classes: int) -> ProbeState:
    """Returns the state before the first step."""
    head = {"kernel": jnp.zeros((num_features, num_classes)), "bias": jnp.zeros(num_classes)}
    return ProbeState(
        head=head,
        opt_state=_optimizer(0.0, 0.0, 0.0).init(head),
        mean=jnp.zeros(num_features),
        variance=jnp.ones(num_features),
        correct=jnp.zeros(()),
        seen=jnp.zeros(()),
    )


def probe_step(
    probe: ProbeState,
    features: jax.Array,
    labels: jax.Array,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> ProbeState:
    """Takes one step of SGD on features that are standardized by running statistics.

    Args:
      probe: State before the step.
      features: Features [batch, features], which get no gradient.
      labels: Labels, integers [batch].
      learning_rate: Learning rate, constant since the features change until the end.
      momentum: Momentum of SGD and of the running statistics.
      weight_decay: Weight decay of the kernel.

    Returns:
      The state after the step. `correct` is counted with the head before the step.
    """
    features = jax.lax.stop_gradient(features.astype(jnp.float32))
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
    optimizer = _optimizer(learning_rate, momentum, weight_decay)
    updates, opt_state = optimizer.update(grads, probe.opt_state, probe.head)
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
    """Returns the probe if a config enables it, or None.

    Args:
      config: The run's config; `online_probe` describes the probe.
      sources: Labeled images of the final evaluation, or None.
      recipe: Static inputs of the training step.
      mesh: The devices.
      skipped: Record of images that cannot be decoded.

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
    if source.num_classes < 2:
        raise UserError(
            f"{source.name} has no labels for the online probe"
            f"{source.no_classes and f' ({source.no_classes})'}; {advice}"
        )
    rows = np.flatnonzero(source.labels() != -1)
    if len(rows) < 2:
        raise UserError(
            f"only {len(rows)} of the {len(source)} images of {source.name} have a label, too few "
            f"for the online probe; {advice}"
        )
    if len(rows) < len(source):
        unlabeled = len(source) - len(rows)
        _logger.info(f"online probe: {unlabeled:,} images without a label are ignored")
        source = source.subset(rows)
    return OnlineProbe(config, source, recipe, mesh, skipped)


class OnlineProbe:
    """Trains the probe along with the steps of a training.

    Attributes:
      state: The probe's state, to be saved with the training's.
    """

    state: ProbeState

    def __init__(
        self,
        config: config_dict.ConfigDict,
        source: Source,
        recipe: Recipe,
        mesh: Mesh,
        skipped: SkippedImages,
    ):
        """Prepares the probe's step; no image is read yet. See `make_online_probe`."""
        self._config, self._source, self._skipped = config, source, skipped
        self._every = config.online_probe.every_steps
        self._batch_size = min(config.online_probe.batch_size, len(source))
        self._mesh = mesh
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._batches: Iterator[dict[str, np.ndarray]] | None = None
        self._has_diverged = False
        settings, network = config.online_probe, recipe.network
        self._init = functools.partial(init_probe, network.num_features, source.num_classes)

        def step(
            probe: ProbeState, params: Tree, batch_stats: Tree, images: jax.Array, labels: jax.Array
        ) -> ProbeState:
            params = jax.lax.with_sharding_constraint(params, self._replicated)
            images = normalize_images(images, mean=recipe.mean, std=recipe.std, dtype=recipe.dtype)
            return probe_step(
                probe,
                network.features(params, batch_stats, images),
                labels,
                learning_rate=settings.learning_rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
            )

        self._step = jax.jit(step, donate_argnums=0, out_shardings=self._replicated)

    def start(self, step: int, num_steps: int, checkpoints: Checkpoints) -> None:
        """Restores the probe of a step's checkpoint, or initializes it if there is none."""
        self.state, self._has_diverged = self._restored(step, checkpoints), False
        crop = self._config.crop
        self._batches = training_batches(
            self._source,
            TrainingOrder(len(self._source), self._batch_size, self._config.seed),
            crop=Crop(crop.size, tuple(crop.scale), tuple(crop.aspect_ratio)),
            channels=self._config.dataset.num_channels,
            positions=local_positions(self._batch_size, self._mesh),
            num_steps=num_steps // self._every,
            start_step=step // self._every,
            num_views=1,
            skipped=self._skipped,
            num_threads=self._config.num_decode_threads,
        )

    def _restored(self, step: int, checkpoints: Checkpoints) -> ProbeState:
        if step and checkpoints.has(step, "online_probe"):
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated),
                jax.eval_shape(self._init),
            )
            try:
                return checkpoints.restore(step, target, name="online_probe")
            except UserError as error:
                _logger.warning(f"the online probe starts from scratch: {error}")
        elif step:
            _logger.warning(f"the online probe starts from scratch: step {step} has none saved")
        # The identical zeros need separate buffers, since each is donated.
        return jax.device_put(self._init(), self._replicated, may_alias=False)

    def after_step(self, step: int, params: Tree, batch_stats: Tree) -> None:
        """Takes a step on the next labeled images, every `every_steps` steps of the training."""
        if step % self._every or self._batches is None:
            return
        batch = next(self._batches)
        images, labels = (
            to_devices(rows, self._batch_size, self._mesh)
            for rows in (batch["images"][:, 0], batch["label"])
        )
        self.state = self._step(self.state, params, batch_stats, images, labels)
        if shares_cores(self._mesh):
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
