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

from music_jax import progress
from music_jax.data.augment import normalize_images
from music_jax.data.crops import Crop
from music_jax.data.loader import TrainingOrder, evaluation_batches, training_batches
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.mesh import local_positions, to_devices
from music_jax.models.network import Network

# uint8 [batch, height, width, channels], on the mesh, to float32 [batch, features].
Extractor = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LabelledFeatures:
    """Features [samples, features] and labels [samples], in the order of the split.

    The label is -1 where the image could not be decoded; its features mean nothing.
    """

    features: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: np.ndarray | slice = slice(None)) -> "LabelledFeatures":
        """Those of the samples that could be decoded."""
        present = self.labels[rows] >= 0
        return LabelledFeatures(self.features[rows][present], self.labels[rows][present])


def backbone_extractor(
    network: Network, params: dict, batch_stats: dict, config: config_dict.ConfigDict, mesh: Mesh
) -> Extractor:
    """An extractor by the backbone, its normalisation layers in inference mode."""
    replicated = NamedSharding(mesh, PartitionSpec())
    params, batch_stats = jax.device_put((params, batch_stats), replicated)

    @jax.jit
    def extract(params: dict, batch_stats: dict, images: jax.Array) -> jax.Array:
        return network.features(params, batch_stats, _normalize(images, config))

    return functools.partial(extract, params, batch_stats)


def pixel_extractor(config: config_dict.ConfigDict) -> Extractor:
    """An extractor that gives the normalised pixels themselves, for comparison."""

    @jax.jit
    def extract(images: jax.Array) -> jax.Array:
        return _normalize(images, config).astype(jnp.float32).reshape(images.shape[0], -1)

    return extract


def _normalize(images: jax.Array, config: config_dict.ConfigDict) -> jax.Array:
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
) -> LabelledFeatures:
    """Features and labels of the central view of every image of a split, no remainder left out.

    Args:
      extractor: what computes features.
      source: the split.
      config: gives the views' size and the channels.
      mesh: the devices.
      skipped: takes note of images that cannot be decoded.
      description: what the progress bar says.

    Returns:
      Features and labels of the whole split, on every process.
    """
    batch_size = -(-config.linear_eval.batch_size // mesh.size) * mesh.size
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
    features, labels = [], []
    with progress.bar(len(source), unit="img", description=description) as bar:
        for batch in batches:
            images = to_devices(batch["images"], batch_size, mesh)
            features.append(_gather(extractor(images)))
            labels.append(_gather(to_devices(batch["label"], batch_size, mesh)))
            bar.update(min(batch_size, len(source) - bar.n))
    all_features, all_labels = np.concatenate(features), np.concatenate(labels)
    present = slice(0, len(source))
    return LabelledFeatures(all_features[present], all_labels[present])


def random_crop_batches(
    extractor: Extractor,
    source: Source,
    config: config_dict.ConfigDict,
    mesh: Mesh,
    *,
    batch_size: int,
    num_epochs: int,
    seed: int,
    skipped: SkippedImages,
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Features [batch, features] and labels [batch] of randomly cropped and flipped images."""
    order = TrainingOrder(len(source), batch_size, seed)
    batches = training_batches(
        source,
        order,
        crop=Crop(config.crop.size, tuple(config.crop.scale), tuple(config.crop.aspect_ratio)),
        channels=config.dataset.num_channels,
        positions=local_positions(batch_size, mesh),
        num_steps=num_epochs * order.steps_per_epoch,
        num_views=1,
        flip=True,
        skipped=skipped,
        num_threads=config.num_decode_threads,
    )
    for batch in batches:
        images = to_devices(batch["images"][:, 0], batch_size, mesh)
        yield extractor(images), to_devices(batch["label"], batch_size, mesh)


def _gather(x: jax.Array) -> np.ndarray:
    """The whole of an array that is split over the mesh, on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
