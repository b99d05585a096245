"""Extracts features of images with a frozen backbone."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.data.augment import augment_views, normalize_images, view_augmentations
from music_jax.data.crops import Crop
from music_jax.data.loader import TrainingOrder, evaluation_batches, training_batches
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.distributed.mesh import local_positions, to_devices
from music_jax.models.network import Network

Arrays = dict[str, np.ndarray]
# From uint8 [batch, height, width, channels], on the mesh, to float32 arrays [batch, ...] by name.
Extractor = Callable[[jax.Array], dict[str, jax.Array]]

_VIEWS_STREAM = 2  # separates the randomness of these views from that of the training
_VIEWED_AT_ONCE = 64  # images, each with all its views


@dataclasses.dataclass(frozen=True)
class SplitFeatures:
    """Output of an extractor for the images of a split that could be decoded, in their order.

    Attributes:
      arrays: `features` [images, features] and any other output of the extractor.
      labels: Labels, int32 [images]; -1 for images without a label.
      indices: Indices of the images in the source, int64 [images].
    """

    arrays: Arrays
    labels: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def features(self) -> np.ndarray:
        """Features of the backbone, [images, features]."""
        return self.arrays["features"]

    def select(self, rows: np.ndarray) -> "SplitFeatures":
        """Returns the output for some of the images."""
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return SplitFeatures(arrays, self.labels[rows], self.indices[rows])

    def labeled(self) -> "SplitFeatures":
        """Returns the output for the images that have a label."""
        rows = np.flatnonzero(self.labels >= 0)
        return self if len(rows) == len(self) else self.select(rows)


def backbone_extractor(
    network: Network,
    params: dict,
    batch_stats: dict,
    config: config_dict.ConfigDict,
    mesh: Mesh,
    *,
    embeddings: bool = False,
) -> Extractor:
    """Returns an extractor of `features`, with the network in inference mode.

    Args:
      network: Network.
      params: Parameters.
      batch_stats: Running statistics.
      config: Config, which sets how images are normalized.
      mesh: Devices.
      embeddings: Whether to extract `embeddings` of the projector as well.
    """

    @jax.jit
    def extract(params: dict, batch_stats: dict, images: jax.Array) -> dict[str, jax.Array]:
        images = normalize(images, config)
        if not embeddings:
            return {"features": network.features(params, batch_stats, images).astype(jnp.float32)}
        features, projected = network.infer(params, batch_stats, images)
        outputs = {"features": features, "embeddings": projected}
        return {name: array.astype(jnp.float32) for name, array in outputs.items()}

    return functools.partial(extract, *replicate((params, batch_stats), mesh))


def pixel_extractor(config: config_dict.ConfigDict) -> Extractor:
    """Returns an extractor of the normalized pixels as `features`, for comparison."""

    @jax.jit
    def extract(images: jax.Array) -> dict[str, jax.Array]:
        pixels = normalize(images, config).astype(jnp.float32)
        return {"features": pixels.reshape(images.shape[0], -1)}

    return extract


def replicate(tree: tuple[dict, dict], mesh: Mesh) -> tuple[dict, dict]:
    """Copies parameters and statistics to every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def normalize(images: jax.Array, config: config_dict.ConfigDict) -> jax.Array:
    """Normalizes images, uint8 [batch, height, width, channels], for the backbone."""
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
    """Applies an extractor to the central view of every image of a split.

    Args:
      extractor: Function to apply.
      source: Images of the split.
      config: Config, which sets the size of the views and the number of channels.
      mesh: Devices.
      skipped: Record of images that cannot be decoded, which are excluded.
      description: Text of the progress bar.

    Returns:
      The output for the whole split, on every process.
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
            outputs = extractor(images) | {"label": labels, "decoded": decoded}
            parts.append({name: _gather(array) for name, array in outputs.items()})
            bar.update(min(batch_size, len(source) - bar.n))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    indices = np.flatnonzero(arrays.pop("decoded"))
    arrays = {name: array[indices] for name, array in arrays.items()}
    return SplitFeatures(labels=arrays.pop("label"), arrays=arrays, indices=indices)


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
    """Extracts features and embeddings of several training views of random images.

    `config.evaluation.view_images` images are drawn; each is cropped and augmented as in training,
    `config.evaluation.num_views` times, with the augmentations of the two views in turn. The
    network is in inference mode.

    Args:
      network: Network.
      params: Parameters.
      batch_stats: Running statistics.
      source: Images to draw from.
      config: Config of the run.
      mesh: Devices.
      skipped: Record of images that cannot be decoded; each is replaced by another one.
      description: Text of the progress bar.

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

    batches = training_batches(
        source,
        TrainingOrder(len(source), batch_size, config.seed),
        crop=_crop(config),
        channels=config.dataset.num_channels,
        positions=local_positions(batch_size, mesh),
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
            images, index = (
                to_devices(batch[name], batch_size, mesh) for name in ("images", "sample_index")
            )
            found = extract(params, batch_stats, images, index, key)
            parts.append({name: _gather(array) for name, array in found.items()})
            bar.update(batch_size * num_views)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
    """Yields randomly cropped images, uint8 [batch, height, width, channels], and labels [batch].

    Images are randomly flipped if the training flips its views.
    """
    order = TrainingOrder(len(source), batch_size, seed)
    batches = training_batches(
        source,
        order,
        crop=_crop(config),
        channels=config.dataset.num_channels,
        positions=local_positions(batch_size, mesh),
        num_steps=num_epochs * order.steps_per_epoch,
        num_views=1,
        flip=any(view.flip_probability > 0 for view in view_augmentations(config)),
        skipped=skipped,
        num_threads=config.num_decode_threads,
    )
    for batch in batches:
        images, labels = batch["images"][:, 0], batch["label"]
        yield to_devices(images, batch_size, mesh), to_devices(labels, batch_size, mesh)


def _crop(config: config_dict.ConfigDict) -> Crop:
    return Crop(config.crop.size, tuple(config.crop.scale), tuple(config.crop.aspect_ratio))


def _gather(x: jax.Array) -> np.ndarray:
    """Returns a sharded array on every process."""
    if jax.process_count() == 1 or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
