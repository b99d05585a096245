"""Extracts features of images with a frozen network, and caches them on disk."""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.data.augment import (
    ViewAugmentation,
    augment_views,
    normalize_images,
    view_augmentations,
)
from music_jax.data.crops import Crop
from music_jax.data.labels import has_label
from music_jax.data.loader import evaluation_batches, training_batches
from music_jax.data.order import TrainingOrder
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.distributed.mesh import Placing, is_main_process
from music_jax.models.network import INIT_COMPILER_OPTIONS, Network, Tree, init_network
from music_jax.workdir.files import bucket_errors, check_is_file, new_file, read_npy

_logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
# From images [batch, height, width, channels], on the mesh, to float32 arrays [batch, ...] by name.
Extractor = Callable[[jax.Array], dict[str, jax.Array]]
_Variables = tuple[Tree, Tree]  # parameters and running statistics
Model = Literal["trained", "random_init", "raw_pixels"]

_VIEWS_STREAM = 2  # separates the randomness of these views from that of the training
_VIEWED_AT_ONCE = 64  # images, each with all its views
_CACHE_FORMAT = 2
_CACHE_OVERHEAD = 1 << 16  # bytes of a file besides its arrays, at most


@dataclasses.dataclass(frozen=True)
class SplitFeatures:
    """Output of an extractor for the images of a split that could be decoded, in their order.

    Attributes:
      arrays: `features` [images, features] and any other output of the extractor.
      labels: Labels, int32 [images] or int8 [images, classes]; see `music_jax.data.labels`.
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
        rows = np.flatnonzero(has_label(self.labels))
        return self if len(rows) == len(self) else self.select(rows)


@dataclasses.dataclass(frozen=True)
class FrozenNetwork:
    """A network in inference mode, with all that applying it to images takes.

    Attributes:
      config: Config, which sets how images are cropped and normalized.
      network: Network.
      params: Trained parameters.
      batch_stats: Trained running statistics.
      mesh: Devices.
      skipped: Record of images that cannot be decoded.
    """

    config: config_dict.ConfigDict
    network: Network
    params: Tree
    batch_stats: Tree
    mesh: Mesh
    skipped: SkippedImages

    def extractor(self, model: Model, *, embeddings: bool = False) -> Extractor:
        """Returns a function from images to `features` and, on request, `embeddings`.

        Args:
          model: `trained`, `random_init` (the backbone before training) or `raw_pixels` (the
            normalized pixels as features).
          embeddings: Whether to extract the embeddings of the projector as well.
        """
        if model == "raw_pixels":

            @jax.jit
            def pixels(images: jax.Array) -> dict[str, jax.Array]:
                normalized = self.normalize(images).astype(jnp.float32)
                return {"features": normalized.reshape(images.shape[0], -1)}

            return pixels
        variables = self.params, self.batch_stats
        if model == "random_init":
            init = functools.partial(init_network, self.config)
            key = jax.random.key(self.config.seed)
            variables = jax.jit(init, compiler_options=INIT_COMPILER_OPTIONS)(key)
        extract = _jit_extract(self.network, embeddings, tuple(self.normalization.items()))
        return functools.partial(extract, self.replicate(variables))

    def replicate(self, tree: Any) -> Any:
        """Copies arrays to every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def normalize(self, images: jax.Array) -> jax.Array:
        """Normalizes images [batch, height, width, channels] for the backbone."""
        return normalize_images(images, **self.normalization)

    @property
    def normalization(self) -> dict[str, Any]:
        """The arguments of `normalize_images` for the backbone."""
        dataset, dtype = self.config.dataset, jnp.dtype(self.config.compute_dtype)
        return {"mean": tuple(dataset.mean), "std": tuple(dataset.std), "dtype": dtype}

    def extract(
        self, extractor: Extractor, source: Source, description: str, *, delay: float = 0.0
    ) -> SplitFeatures:
        """Applies an extractor to the central view of every image of a split.

        Args:
          extractor: Function to apply.
          source: Images of the split; those that cannot be decoded are excluded.
          description: Text of the progress bar.
          delay: Seconds before which no bar is shown.

        Returns:
          The output for the whole split, on every process.
        """
        config, devices = self.config, self.mesh.size
        placing = Placing(-(-config.evaluation.batch_size // devices) * devices, self.mesh)
        batches = evaluation_batches(
            source,
            size=config.crop.size,
            resize_shorter_side=config.crop.eval_resize,
            channels=config.dataset.num_channels,
            dtype=config.dataset.pixel_type,
            batch_size=placing.batch_size,
            positions=placing.positions,
            skipped=self.skipped,
            num_threads=config.num_decode_threads,
        )
        outputs = (
            extractor(placing(batch["images"]))
            | {name: placing(batch[name]) for name in ("label", "decoded")}
            for batch in batches
        )
        with progress.bar(len(source), unit="img", description=description, delay=delay) as bar:
            arrays = _join(
                outputs, lambda: bar.update(min(placing.batch_size, len(source) - bar.n))
            )
        indices = np.flatnonzero(arrays.pop("decoded"))
        arrays = {name: array[indices] for name, array in arrays.items()}
        return SplitFeatures(labels=arrays.pop("label"), arrays=arrays, indices=indices)

    def extract_views(
        self,
        source: Source,
        *,
        num_images: int,
        num_views: int,
        description: str,
        embeddings: bool = True,
        delay: float = 0.0,
    ) -> Arrays:
        """Extracts features of several training views of random images.

        Each image is cropped and augmented as in training, with the augmentations of the two views
        in turn.

        Args:
          source: Images to draw from; those that cannot be decoded are replaced by others.
          num_images: Number of images to draw; all, if there are fewer. A number above 64 is
            rounded down to a multiple of 64.
          num_views: Number of views of each image.
          description: Text of the progress bar.
          embeddings: Whether to extract the embeddings of the projector as well.
          delay: Seconds before which no bar is shown.

        Returns:
          `features` [images, views, features] and any `embeddings` [images, views, dim], float32.
        """
        num_images = min(num_images, len(source))
        placing = Placing(min(_VIEWED_AT_ONCE, num_images), self.mesh)
        num_steps = num_images // placing.batch_size
        pair = view_augmentations(self.config)
        key = jax.random.fold_in(jax.random.key(self.config.seed), _VIEWS_STREAM)
        augmentations = tuple(pair[i % 2] for i in range(num_views))
        normalization = tuple(self.normalization.items())
        extract = _jit_extract_views(self.network, embeddings, normalization, augmentations)
        variables = self.replicate((self.params, self.batch_stats))
        outputs = (
            extract(variables, placing(batch["images"]), placing(batch["sample_index"]), key)
            for batch in self.random_crops(source, placing, num_steps, num_views)
        )
        step = placing.batch_size * num_views
        total = num_steps * step
        with progress.bar(total, unit="view", description=description, delay=delay) as bar:
            return _join(outputs, lambda: bar.update(step))

    def random_crop_batches(
        self, source: Source, *, batch_size: int, num_epochs: int, description: str
    ) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yields randomly cropped images [batch, height, width, channels] and labels.

        Images are randomly flipped if the training flips its views. A bar shows the progress.
        """
        placing = Placing(batch_size, self.mesh)
        num_steps = num_epochs * (len(source) // batch_size)
        flip = any(view.flip_probability > 0 for view in view_augmentations(self.config))
        with progress.bar(num_steps, unit="step", description=description) as bar:
            for batch in self.random_crops(source, placing, num_steps, 1, flip):
                yield placing(batch["images"][:, 0]), placing(batch["label"])
                bar.update()

    def random_crops(
        self, source: Source, placing: Placing, num_steps: int, num_views: int, flip: bool = False
    ) -> Iterator[Arrays]:
        """Yields batches of random crops, `images` [batch, views, height, width, channels]."""
        config, crop = self.config, self.config.crop
        settings = Crop(crop.size, tuple(crop.scale), tuple(crop.aspect_ratio))
        return training_batches(
            source,
            TrainingOrder(len(source), placing.batch_size, config.seed),
            views={"images": (settings, num_views)},
            channels=config.dataset.num_channels,
            dtype=config.dataset.pixel_type,
            positions=placing.positions,
            num_steps=num_steps,
            flip=flip,
            skipped=self.skipped,
            num_threads=config.num_decode_threads,
        )


@functools.lru_cache(maxsize=4)  # All weights of a network share a program.
def _jit_extract(
    network: Network, embeddings: bool, normalization: tuple[tuple[str, Any], ...]
) -> Callable[[_Variables, jax.Array], dict[str, jax.Array]]:
    def extract(variables: _Variables, images: jax.Array) -> dict[str, jax.Array]:
        normalized = normalize_images(images, **dict(normalization))
        return _infer(network, embeddings, variables, normalized)

    return jax.jit(extract)


@functools.lru_cache(maxsize=4)
def _jit_extract_views(
    network: Network,
    embeddings: bool,
    normalization: tuple[tuple[str, Any], ...],
    augmentations: tuple[ViewAugmentation, ...],
) -> Callable[[_Variables, jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]:
    def extract(
        variables: _Variables, images: jax.Array, sample_index: jax.Array, key: jax.Array
    ) -> dict[str, jax.Array]:
        options = dict(normalization)
        views = augment_views(images, sample_index, key, views=augmentations, **options)
        outputs = _infer(network, embeddings, variables, views.reshape(-1, *views.shape[2:]))
        return {name: x.reshape(*views.shape[:2], -1) for name, x in outputs.items()}

    return jax.jit(extract)


def _infer(
    network: Network, embeddings: bool, variables: _Variables, images: jax.Array
) -> dict[str, jax.Array]:
    names = ("features", "embeddings") if embeddings else ("features",)
    outputs = network.infer(*variables, images)
    return {name: x.astype(jnp.float32) for name, x in zip(names, outputs, strict=False)}


def _join(outputs: Iterable[dict[str, jax.Array]], after_batch: Callable[[], Any]) -> Arrays:
    """Joins the outputs for all batches on every process."""
    parts = []
    for output in outputs:
        parts.append(multihost_utils.process_allgather(output, tiled=True))
        after_batch()
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Expected(NamedTuple):
    """Accepted arrays of the cache: their largest shape, their type, and the range of integers."""

    shape: tuple[int, ...]
    dtype: Any
    values: range | None = None

    @property
    def max_bytes(self) -> int:
        """Size of the largest such array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def check(self, array: np.ndarray) -> None:
        """Raises ValueError unless the array is accepted, whatever the number of its rows."""
        if array.dtype != self.dtype or array.ndim == 0 or array.shape[1:] != self.shape[1:]:
            raise ValueError(f"expected {self.dtype} {self.shape}; got {array.dtype} {array.shape}")
        if self.values is None or not array.size:
            return
        if array.min() < self.values.start or array.max() >= self.values.stop:
            raise ValueError(f"expected integers in {self.values}")


def cached_arrays(
    directory: epath.Path,
    name: str,
    key: dict[str, Any],
    compute: Callable[[], Arrays],
    *,
    expected: dict[str, Expected],
) -> Arrays:
    """Returns arrays from the cache, which may be deleted at any time, or computes and caches them.

    Arrays of damaged files are computed again. If a file cannot be written, a warning is logged.

    Args:
      directory: Directory of the cache, created when needed.
      name: First part of the file's name, for readability.
      key: Everything that the arrays depend on, as JSON values.
      compute: Function that returns the arrays, called by all processes of a run or by none.
      expected: Accepted arrays, by name; all of them have the same number of rows.
    """
    text = json.dumps({"format": _CACHE_FORMAT, **key}, sort_keys=True)
    path = directory / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.npz"
    arrays = _read_cache(path, expected)
    found = multihost_utils.process_allgather(np.asarray(arrays is not None))
    if arrays is not None and np.all(found):
        return arrays
    arrays = compute()
    if is_main_process():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with new_file(path) as file:
                np.savez(file, allow_pickle=False, **arrays)
        except OSError as error:
            _logger.warning(f"features are not cached: {error}")
    return arrays


def _read_cache(path: epath.Path, expected: dict[str, Expected]) -> Arrays | None:
    """Reads a file array by array, so that only one copy is in memory; its CRCs are verified."""
    if not path.exists():
        return None
    try:
        check_is_file(path)
        max_bytes = sum(like.max_bytes for like in expected.values()) + _CACHE_OVERHEAD
        if path.stat().length > max_bytes:
            raise ValueError("the file is larger than expected")
        arrays = {}
        with bucket_errors(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for name, like in expected.items():
                with archive.open(f"{name}.npy") as member:
                    arrays[name] = read_npy(member, max_bytes=like.max_bytes)
                like.check(arrays[name])
        if len({len(array) for array in arrays.values()}) > 1:
            raise ValueError("the arrays differ in their number of rows")
        return arrays
    except Exception as error:  # zipfile raises many kinds
        _logger.warning(f"the cached features {path} are damaged and computed again: {error}")
        return None
