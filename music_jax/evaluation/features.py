"""Features of every image of a split, from a frozen backbone."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.config import view_augmentations
from music_jax.data.augment import augment_views, normalize_images
from music_jax.data.crops import Crop
from music_jax.data.loader import TrainingOrder, evaluation_batches, training_batches
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.distributed.mesh import batch_sharding, local_positions, to_devices
from music_jax.models.network import Network

Arrays = dict[str, np.ndarray]
# uint8 [batch, height, width, channels], on the mesh, to float32 arrays [batch, ...] by name.
Extractor = Callable[[jax.Array], dict[str, jax.Array]]

_VIEWS_STREAM = 2  # separates these views' augmentations from those of the training
_VIEWED_AT_ONCE = 64  # images, each in all its views


@dataclasses.dataclass(frozen=True)
class SplitFeatures:
    """What an extractor gave for the images of a split that could be decoded, in its order.

    Attributes:
      arrays: `features` [images, features] and whatever else the extractor gives.
      labels: int32 [images], -1 where an image has none.
      indices: each image's index in the source, int64 [images].
      without_label: how many images `labeled` left out.
    """

    arrays: Arrays
    labels: np.ndarray
    indices: np.ndarray
    without_label: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def features(self) -> np.ndarray:
        """The backbone's, [images, features]."""
        return self.arrays["features"]

    def rows(self, rows: np.ndarray) -> "SplitFeatures":
        """Those of some images."""
        return SplitFeatures(
            {name: array[rows] for name, array in self.arrays.items()},
            self.labels[rows],
            self.indices[rows],
            self.without_label,
        )

    def labeled(self) -> "SplitFeatures":
        """Those of the images that have a label."""
        rows = np.flatnonzero(self.labels >= 0)
        if len(rows) == len(self):
            return self
        return dataclasses.replace(self.rows(rows), without_label=len(self) - len(rows))


def backbone_extractor(
    network: Network,
    params: dict,
    batch_stats: dict,
    config: config_dict.ConfigDict,
    mesh: Mesh,
    *,
    embeddings: bool = False,
) -> Extractor:
    """An extractor of `features`, the normalization layers being in inference mode.

    Args:
      network: the network.
      params: its parameters.
      batch_stats: its running statistics.
      config: says how images are normalized.
      mesh: the devices.
      embeddings: give the projector's `embeddings` as well.

    Returns:
      The extractor.
    """

    @jax.jit
    def extract(params: dict, batch_stats: dict, images: jax.Array) -> dict[str, jax.Array]:
        images = normalize(images, config)
        if not embeddings:
            return {"features": network.features(params, batch_stats, images).astype(jnp.float32)}
        features, embedded = network.infer(params, batch_stats, images)
        return {
            "features": features.astype(jnp.float32),
            "embeddings": embedded.astype(jnp.float32),
        }

    return functools.partial(extract, *replicate((params, batch_stats), mesh))


def pixel_extractor(config: config_dict.ConfigDict) -> Extractor:
    """An extractor that gives the normalized pixels as `features`, for comparison."""

    @jax.jit
    def extract(images: jax.Array) -> dict[str, jax.Array]:
        pixels = normalize(images, config).astype(jnp.float32)
        return {"features": pixels.reshape(images.shape[0], -1)}

    return extract


def replicate(tree: tuple[dict, dict], mesh: Mesh) -> tuple[dict, dict]:
    """Parameters and statistics, whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def normalize(images: jax.Array, config: config_dict.ConfigDict) -> jax.Array:
    """Images uint8 [batch, height, width, channels] as the backbone takes them."""
    return normalize_images(
        images,
        mean=tuple(config.dataset.mean),
        std=tuple(config.dataset.std),
        dtype=jnp.dtype(config.compute_dtype),
    )


def extract_split(
    extractor: Extractor,
    source: Source,
    config: config_dict.ConfigDict,
    mesh: Mesh,
    *,
    skipped: SkippedImages,
    description: str,
) -> SplitFeatures:
    """What an extractor gives for the central view of every image of a split, none left out.

    Args:
      extractor: what computes features.
      source: the split.
      config: gives the views' size and the channels.
      mesh: the devices.
      skipped: takes note of images that cannot be decoded.
      description: what the progress bar says.

    Returns:
      The whole split, on every process, but for the images that cannot be decoded.
    """
    batch_size = -(-config.evaluation.batch_size // mesh.size) * mesh.size
    batches = evaluation_batches(
        source,
        size=config.crop.size,
        resize_shorter_side=config.crop.eval_resize,
        channels=config.dataset.num_channels,
        batch_size=batch_size,
        positions=local_positions(batch_size, mesh),
        skipped=skipped,
        num_threads=config.num_decode_threads,
    )
    parts: list[Arrays] = []
    with progress.bar(len(source), unit="img", description=description) as bar:
        for batch in batches:
            images, labels, decoded = (
                to_devices(batch[name], batch_size, mesh) for name in ("images", "label", "decoded")
            )
            found = extractor(images) | {"label": labels, "decoded": decoded}
            parts.append({name: _gather(array) for name, array in found.items()})
            bar.update(min(batch_size, len(source) - bar.n))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    indices = np.flatnonzero(whole.pop("decoded"))
    whole = {name: array[indices] for name, array in whole.items()}
    return SplitFeatures(labels=whole.pop("label"), arrays=whole, indices=indices)


def extract_views(
    network: Network,
    params: dict,
    batch_stats: dict,
    source: Source,
    config: config_dict.ConfigDict,
    mesh: Mesh,
    *,
    skipped: SkippedImages,
    description: str,
) -> Arrays:
    """Features and embeddings of several training views of some images, in inference mode.

    The images are drawn at random, `config.evaluation.view_images` of them, and cut and augmented
    `config.evaluation.num_views` times as in the training, the two views' augmentations in turn.

    Args:
      network: the network.
      params: its parameters.
      batch_stats: its running statistics.
      source: where the images are drawn from.
      config: the run's.
      mesh: the devices.
      skipped: takes note of images that cannot be decoded; another takes the place of each.
      description: what the progress bar says.

    Returns:
      `features` [images, views, features] and `embeddings` [images, views, dim], float32.
    """
    num_views = config.evaluation.num_views
    num_images = min(config.evaluation.view_images, len(source))
    batch_size = min(_VIEWED_AT_ONCE, num_images)
    num_steps = num_images // batch_size
    pair = view_augmentations(config)
    augmentations = tuple(pair[i % 2] for i in range(num_views))
    key = jax.random.fold_in(jax.random.key(config.seed), _VIEWS_STREAM)

    @jax.jit
    def extract(
        params: dict,
        batch_stats: dict,
        images: jax.Array,
        sample_index: jax.Array,
        key: jax.Array,
    ) -> dict[str, jax.Array]:
        views = augment_views(
            images,
            sample_index,
            key,
            views=augmentations,
            mean=tuple(config.dataset.mean),
            std=tuple(config.dataset.std),
            dtype=jnp.dtype(config.compute_dtype),
        )
        shape = views.shape[:2]
        found = network.infer(params, batch_stats, views.reshape(-1, *views.shape[2:]))
        return {
            name: array.astype(jnp.float32).reshape(*shape, -1)
            for name, array in zip(("features", "embeddings"), found, strict=True)
        }

    placing = Placing(batch_size, mesh)
    batches = training_batches(
        source,
        TrainingOrder(len(source), batch_size, config.seed),
        crop=_crop(config),
        channels=config.dataset.num_channels,
        positions=placing.positions,
        num_steps=num_steps,
        num_views=num_views,
        skipped=skipped,
        num_threads=config.num_decode_threads,
    )
    params, batch_stats = replicate((params, batch_stats), mesh)
    parts = []
    total = num_steps * batch_size * num_views
    with progress.bar(total, unit="view", description=description) as bar:
        for batch in batches:
            images, index = placing(batch["images"]), placing(batch["sample_index"])
            found = extract(params, batch_stats, images, index, key)
            parts.append({name: _gather(array) for name, array in found.items()})
            bar.update(batch_size * num_views)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclasses.dataclass(frozen=True)
class Placing:
    """Puts batches onto a mesh: split over its devices, or whole on each if they do not divide it.

    Attributes:
      batch_size: of the global batch.
      mesh: the devices.
    """

    batch_size: int
    mesh: Mesh

    @property
    def positions(self) -> np.ndarray:
        """The positions of the global batch that this process fills."""
        if self.batch_size % self.mesh.size:
            return np.arange(self.batch_size)
        return local_positions(self.batch_size, self.mesh)

    @property
    def sharding(self) -> NamedSharding:
        """Where a batch lives."""
        if self.batch_size % self.mesh.size:
            return NamedSharding(self.mesh, PartitionSpec())
        return batch_sharding(self.mesh)

    def __call__(self, local: np.ndarray) -> jax.Array:
        """Puts this process's rows of a batch onto its devices."""
        shape = (self.batch_size, *local.shape[1:])
        return jax.make_array_from_process_local_data(self.sharding, local, shape)


def random_crop_batches(
    source: Source,
    config: config_dict.ConfigDict,
    mesh: Mesh,
    *,
    batch_size: int,
    num_epochs: int,
    seed: int,
    skipped: SkippedImages,
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Randomly cropped images, uint8 [batch, height, width, channels], and labels [batch].

    They are flipped at random where the training flips its views.
    """
    order = TrainingOrder(len(source), batch_size, seed)
    placing = Placing(batch_size, mesh)
    batches = training_batches(
        source,
        order,
        crop=_crop(config),
        channels=config.dataset.num_channels,
        positions=placing.positions,
        num_steps=num_epochs * order.steps_per_epoch,
        num_views=1,
        flip=any(view.flip_probability > 0 for view in view_augmentations(config)),
        skipped=skipped,
        num_threads=config.num_decode_threads,
    )
    for batch in batches:
        yield placing(batch["images"][:, 0]), placing(batch["label"])


def _crop(config: config_dict.ConfigDict) -> Crop:
    return Crop(config.crop.size, tuple(config.crop.scale), tuple(config.crop.aspect_ratio))


def _gather(x: jax.Array) -> np.ndarray:
    """The whole of an array that is split over the mesh, on every process."""
    if jax.process_count() == 1 or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
