"""A linear classifier that is trained beside the pre-training, which does not notice it.

It sees the backbone as each step leaves it, in inference mode, by a jitted step of its own: the
training's program, and so every bit of its result, is the same with it and without.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.data import datasets
from music_jax.data.crops import Crop
from music_jax.data.datasets import EvaluationSources
from music_jax.data.loader import TrainingOrder, training_batches
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed.mesh import is_main_process, shares_cores
from music_jax.errors import UserError
from music_jax.evaluation.features import Placing, normalize
from music_jax.models.network import Network, Tree
from music_jax.workdir.files import bucket_errors, new_file, read_npz

_logger = logging.getLogger(__name__)

_DIRECTORY = "online_probe"
_NPZ_OVERHEAD = 1 << 16  # bytes of a file beside its arrays, at most


class ProbeState(NamedTuple):
    """What the probe's step changes.

    Attributes:
      kernel: [features, classes].
      bias: [classes].
      mean: running mean of each feature, [features].
      variance: running variance of each feature, [features].
      velocity_kernel: SGD's momentum.
      velocity_bias: likewise.
      correct: labeled images that were classified rightly, before they were learned from, since
        the last log; float32.
      seen: of so many.
    """

    kernel: jax.Array
    bias: jax.Array
    mean: jax.Array
    variance: jax.Array
    velocity_kernel: jax.Array
    velocity_bias: jax.Array
    correct: jax.Array
    seen: jax.Array


def init_probe(num_features: int, num_classes: int) -> ProbeState:
    """A classifier that has seen nothing; no two arrays are one, since each is donated."""
    return ProbeState(
        kernel=jnp.zeros((num_features, num_classes)),
        bias=jnp.zeros(num_classes),
        mean=jnp.zeros(num_features),
        variance=jnp.ones(num_features),
        velocity_kernel=jnp.zeros((num_features, num_classes)),
        velocity_bias=jnp.zeros(num_classes),
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
    """One step of SGD on features that are standardized by running statistics.

    Args:
      probe: the state before it.
      features: [batch, features], through which no gradient goes.
      labels: integers [batch].
      learning_rate: constant, since the features themselves change until the end.
      momentum: of SGD, and of the running statistics.
      weight_decay: of the kernel.

    Returns:
      The state after it, the batch counted in `correct` by the classifier before.
    """
    features = jax.lax.stop_gradient(features.astype(jnp.float32))
    mean = momentum * probe.mean + (1 - momentum) * jnp.mean(features, axis=0)
    variance = momentum * probe.variance + (1 - momentum) * jnp.var(features, axis=0)
    features = (features - mean[None]) * jax.lax.rsqrt(variance + 1e-6)[None]

    def loss(head: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = features @ head[0] + head[1][None]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        # As in `linear_probe.ranks`, ties and NaN count against the label.
        of_label = jnp.take_along_axis(logits, labels[:, None], axis=1)
        return jnp.mean(losses), jnp.sum(jnp.sum(logits >= of_label, axis=1) == 1)

    head = probe.kernel, probe.bias
    (grad_kernel, grad_bias), correct = jax.grad(loss, has_aux=True)(head)
    velocity_kernel = momentum * probe.velocity_kernel + grad_kernel + weight_decay * probe.kernel
    velocity_bias = momentum * probe.velocity_bias + grad_bias
    return ProbeState(
        kernel=probe.kernel - learning_rate * velocity_kernel,
        bias=probe.bias - learning_rate * velocity_bias,
        mean=mean,
        variance=variance,
        velocity_kernel=velocity_kernel,
        velocity_bias=velocity_bias,
        correct=probe.correct + correct.astype(jnp.float32),
        seen=probe.seen + jnp.asarray(labels.shape[0], jnp.float32),
    )


def make_online_probe(
    config: config_dict.ConfigDict,
    probed: EvaluationSources | None,
    network: Network,
    mesh: Mesh,
    directory: epath.Path,
    skipped: SkippedImages,
) -> "OnlineProbe | None":
    """The probe that a config asks for, if it does.

    Args:
      config: its part `online_probe` says how, and with which images.
      probed: what the run is evaluated with, if there is anything.
      network: the network that is trained.
      mesh: the devices.
      directory: the workdir.
      skipped: takes note of images that cannot be decoded.

    Raises:
      UserError: it asks for one, but there are no labeled images to learn from.
    """
    if not config.online_probe.enabled:
        return None
    if config.online_probe.train:
        source = datasets.open_named(config, config.online_probe.train, prepare=True)
    elif probed is not None:
        source = probed.train
    else:
        raise UserError(
            "config.online_probe.enabled needs labeled images; name some with "
            "--config.online_probe.train=, a folder or NAME:SPLIT of TFDS"
        )
    if source.num_classes < 2:
        raise UserError(
            f"{source.name} has no labels for the online probe"
            f"{source.no_classes and f' ({source.no_classes})'}; name a labeled set with "
            "--config.online_probe.train=, a folder or NAME:SPLIT of TFDS"
        )
    rows = np.flatnonzero(source.labels() != -1)
    if len(rows) < 2:
        raise UserError(
            f"only {len(rows)} of the {len(source)} images of {source.name} have a label, too few "
            "for the online probe; name a labeled set with --config.online_probe.train="
        )
    if len(rows) < len(source):
        _logger.info(
            f"online probe: {len(source) - len(rows):,} images without a label were left out"
        )
        source = source.subset(rows)
    return OnlineProbe(config, source, network, mesh, directory, skipped)


class OnlineProbe:
    """Trains the probe along with the steps of a training, and goes on where that was resumed."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        source: Source,
        network: Network,
        mesh: Mesh,
        directory: epath.Path,
        skipped: SkippedImages,
    ):
        """Makes the probe's step; no image is read yet.

        Args:
          config: its part `online_probe` says how.
          source: the labeled images to learn from; those of the pre-training or others.
          network: the network that is trained.
          mesh: the devices.
          directory: the workdir.
          skipped: takes note of images that cannot be decoded.
        """
        self._config, self._source, self._skipped = config, source, skipped
        self._directory = directory / _DIRECTORY
        self._every = config.online_probe.every_steps
        self._batch_size = min(config.online_probe.batch_size, len(source))
        self._placing = Placing(self._batch_size, mesh)
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._num_features = network.num_features
        self._state: ProbeState | None = None
        self._batches: Iterator[dict[str, np.ndarray]] | None = None
        self._has_diverged = False
        settings = config.online_probe

        def step(
            probe: ProbeState, params: Tree, batch_stats: Tree, images: jax.Array, labels: jax.Array
        ) -> ProbeState:
            params = jax.lax.with_sharding_constraint(params, self._whole)
            return probe_step(
                probe,
                network.features(params, batch_stats, normalize(images, config)),
                labels,
                learning_rate=settings.learning_rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
            )

        self._step = jax.jit(step, donate_argnums=0, out_shardings=self._whole)

    def start(self, step: int, num_steps: int) -> None:
        """Takes up the probe as it was saved at a step of the training, or starts anew.

        What was saved at later steps, which the training takes again, is removed.
        """
        self._state, self._has_diverged = self._restored(step), False
        if is_main_process() and self._directory.exists():
            for path in self._directory.glob("*.npz"):
                if path.stem.isdecimal() and int(path.stem) > step:
                    path.unlink()
        order = TrainingOrder(len(self._source), self._batch_size, self._config.seed)
        crop = self._config.crop
        self._batches = training_batches(
            self._source,
            order,
            crop=Crop(crop.size, tuple(crop.scale), tuple(crop.aspect_ratio)),
            channels=self._config.dataset.num_channels,
            positions=self._placing.positions,
            num_steps=num_steps // self._every,
            start_step=step // self._every,
            num_views=1,
            skipped=self._skipped,
            num_threads=self._config.num_decode_threads,
        )

    def after_step(self, step: int, params: Tree, batch_stats: Tree) -> None:
        """Takes a step on the next labeled images, if the training's step is one of those."""
        if step % self._every or self._batches is None:
            return
        batch = next(self._batches)
        images, labels = self._placing(batch["images"][:, 0]), self._placing(batch["label"])
        self._state = self._step(self._state, params, batch_stats, images, labels)
        if shares_cores(self._placing.mesh):
            jax.block_until_ready(self._state)

    def metrics(self) -> dict[str, float]:
        """`online_top1` of the images since this was last asked.

        Nothing if there were none, or once the probe has diverged, which the training survives; a
        line says so.
        """
        assert self._state is not None
        seen, correct = float(self._state.seen), float(self._state.correct)
        if not seen or self._has_diverged:
            return {}
        if not all(np.all(np.isfinite(np.asarray(array))) for array in self._state):
            self._has_diverged = True
            _logger.info(
                "the online probe diverged and is no longer reported; lower "
                "config.online_probe.learning_rate"
            )
            return {}
        zeros = jax.device_put((jnp.zeros(()), jnp.zeros(())), self._whole)
        self._state = self._state._replace(seen=zeros[0], correct=zeros[1])
        return {"online_top1": correct / seen}

    def save(self, step: int, kept: list[int]) -> None:
        """Keeps the probe for a step's checkpoint, made next, and those of the ones still there."""
        assert self._state is not None
        if not is_main_process():
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, Any] = {k: np.asarray(v) for k, v in self._state._asdict().items()}
            with new_file(self._directory / f"{step}.npz") as file:
                np.savez(file, **arrays)
            for old in self._directory.glob("*.npz"):
                if old.stem not in {str(s) for s in (*kept, step)}:
                    old.unlink()
        except OSError as error:
            _logger.info(f"the online probe is not saved: {error}")

    def _restored(self, step: int) -> ProbeState:
        found = init_probe(self._num_features, self._source.num_classes)
        if is_main_process():
            found = self._read(step, found)
        if jax.process_count() > 1:
            found = multihost_utils.broadcast_one_to_all(found)
        return jax.device_put(found, self._whole)

    def _read(self, step: int, fresh: ProbeState) -> ProbeState:
        path = self._directory / f"{step}.npz"
        if step and path.exists():
            try:
                size = sum(array.nbytes for array in fresh)
                with bucket_errors(path):
                    arrays: dict[str, Any] = read_npz(path, max_bytes=size + _NPZ_OVERHEAD)
                found = ProbeState(**{name: arrays[name] for name in ProbeState._fields})
                if any(
                    (a.shape, a.dtype) != (b.shape, b.dtype)
                    for a, b in zip(found, fresh, strict=True)
                ):
                    raise ValueError("it is of another size or type")
                return found
            except (OSError, ValueError, KeyError) as error:
                _logger.info(f"the online probe starts anew, {path} being damaged: {error}")
        return fresh
