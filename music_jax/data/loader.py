"""Batches of host-cut views, in an order that depends on the seed alone.

Global sample index `i` runs over the whole training: epoch `e` of a dataset of `n` images takes the
indices `e * n ... e * n + n - 1`, shuffled anew by Grain, and leaves out the remainder that fills
no batch. The order, the crops and (on the device) the augmentations depend on the seed
and this index, never on a worker, a process or where a run was resumed.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from music_jax.data.crops import Crop, center_crop, decode, random_resized_crop
from music_jax.data.sources import Source
from music_jax.errors import UnusableDataError


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """Which image a position of a batch holds, at any step.

    Attributes:
      num_records: images in the dataset.
      batch_size: the global batch, at most `num_records`.
      seed: of the shuffle.
    """

    num_records: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        shuffled = grain.MapDataset.range(self.num_records).shuffle(seed=self.seed)
        object.__setattr__(self, "_shuffled", shuffled)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.num_records // self.batch_size

    def sample_index(self, step: int, position: int) -> int:
        """Global index of the sample at a position of the global batch of a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.num_records + step_in_epoch * self.batch_size + position

    def record_key(self, sample_index: int) -> int:
        """Which of the dataset's images a global sample index stands for."""
        return int(self._shuffled[sample_index])  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class _Views:
    """What Grain reads: item `k` is this process's k-th sample, decoded and cut into its views."""

    source: Source
    order: TrainingOrder
    crop: Crop
    num_views: int
    channels: int
    positions: np.ndarray  # positions in the global batch that this process fills
    num_steps: int
    flip: bool

    def __len__(self) -> int:
        return self.num_steps * len(self.positions)

    def __getitem__(self, k: int) -> dict[str, Any]:
        step, i = divmod(int(k), len(self.positions))
        sample_index = self.order.sample_index(step, int(self.positions[i]))
        key = self.order.record_key(sample_index)
        encoded, label = self.source.example(key)
        image = _decode(self.source, key, encoded, self.channels)
        rng = np.random.Generator(np.random.Philox(key=[self.order.seed, sample_index]))
        views = [random_resized_crop(image, self.crop, rng) for _ in range(self.num_views)]
        if self.flip:
            views = [view[:, ::-1] if rng.random() < 0.5 else view for view in views]
        return {
            "images": np.stack(views),  # [views, size, size, channels]
            "sample_index": np.uint32(sample_index % 2**32),
            "label": np.int32(label),
        }


def training_batches(
    source: Source,
    order: TrainingOrder,
    *,
    crop: Crop,
    channels: int,
    positions: np.ndarray,
    num_steps: int,
    start_step: int = 0,
    num_views: int = 2,
    flip: bool = False,
    num_threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's share of the batches of the steps `start_step ... num_steps - 1`.

    Args:
      source: the images.
      order: which of them each step takes.
      crop: how each view is cut.
      channels: 1 or 3.
      positions: the positions of the global batch that this process fills, ascending.
      num_steps: steps of the whole training.
      start_step: the step to begin with, as if the ones before it had been read.
      num_views: crops of each image.
      flip: mirror half of the views; for where no device augmentation follows.
      num_threads: decoding threads; by default one a core.

    Yields:
      Dictionaries of `images`, uint8 [positions, views, size, size, channels]; `sample_index`,
      uint32 [positions]; `label`, int32 [positions].
    """
    views = _Views(source, order, crop, num_views, channels, positions, num_steps, flip)
    dataset = grain.MapDataset.source(views).batch(len(positions))[start_step:]
    return iter(dataset.to_iter_dataset(_read_options(num_threads)))


@dataclasses.dataclass(frozen=True)
class _Centered:
    source: Source
    positions: np.ndarray
    size: int
    resize_shorter_side: int
    channels: int

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, k: int) -> dict[str, Any]:
        key = int(self.positions[k])
        if key >= len(self.source):  # Fills up the last batch; its label tells it from the rest.
            blank = np.zeros((self.size, self.size, self.channels), np.uint8)
            return {"images": blank, "label": np.int32(-1)}
        encoded, label = self.source.example(key)
        image = _decode(self.source, key, encoded, self.channels)
        return {
            "images": center_crop(image, self.size, self.resize_shorter_side),
            "label": np.int32(label),
        }


def evaluation_batches(
    source: Source,
    *,
    size: int,
    resize_shorter_side: int,
    channels: int,
    batch_size: int,
    positions: np.ndarray,
    num_threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's share of every image of a split, in order, centre-cropped, once.

    Args:
      source: the images.
      size: side of the views in pixels.
      resize_shorter_side: what the image's shorter side becomes before the crop.
      channels: 1 or 3.
      batch_size: the global batch; the last one is filled up with blanks whose label is -1.
      positions: the positions of the global batch that this process fills, ascending.
      num_threads: decoding threads; by default one a core.

    Yields:
      Dictionaries of `images`, uint8 [positions, size, size, channels], and `label`, int32
      [positions].
    """
    num_batches = -(-len(source) // batch_size)
    keys = (np.arange(num_batches)[:, None] * batch_size + positions[None, :]).reshape(-1)
    views = _Centered(source, keys, size, resize_shorter_side, channels)
    dataset = grain.MapDataset.source(views).batch(len(positions))
    return iter(dataset.to_iter_dataset(_read_options(num_threads)))


def _read_options(num_threads: int | None) -> grain.ReadOptions:
    """Each thread makes whole batches, which costs less than handing over single samples."""
    threads = num_threads or os.cpu_count() or 1
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)


def _decode(source: Source, key: int, encoded: bytes, channels: int) -> np.ndarray:
    try:
        return decode(encoded, channels)
    except UnusableDataError as error:
        raise UnusableDataError(f"image {key} of {source.name}: {error}") from error
