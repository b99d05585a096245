"""Batches of host-cut views, in an order that depends on the seed alone.

Global sample index `i` runs over the whole training: epoch `e` of a dataset of `n` images takes the
indices `e * n ... e * n + n - 1`, shuffled anew by Grain, and leaves out the remainder that fills
no batch. The order, the crops, what takes the place of an image that cannot be decoded and (on the
device) the augmentations depend on the seed and this index, never on a worker, a process or where a
run was resumed.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

from music_jax.data.crops import Box, Crop, center_crop, cut, draw_box
from music_jax.data.decode import decode, largest_reduction, use_one_thread
from music_jax.data.headers import Header, read_header
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.errors import UndecodableError, UnusableDataError


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

    def substitute(self, sample_index: int, attempt: int) -> int:
        """The image that a sample takes where its own, and `attempt` others, are broken."""
        bits = np.random.Philox(key=[self.seed, sample_index], counter=[0, 0, 0, 1 + attempt])
        return int(np.random.Generator(bits).integers(self.num_records))

    def record_key(self, sample_index: int) -> int:
        """Which of the dataset's images a global sample index stands for."""
        return int(self._shuffled[sample_index])  # type: ignore[attr-defined]


# So many samples are read and planned before they are decoded: between two images that are decoded,
# the caches hold nothing of Python's, and the same work takes three times as long.
_PLANNED_AT_ONCE = 32

# So many images in a row, each drawn at random from the dataset, are not all broken by chance.
_MAX_TRIES = 100


@dataclasses.dataclass(frozen=True)
class _TrainingBatches:
    """What Grain reads: item `step` is this process's share of that step's batch.

    Whole batches cost less than single samples that are handed over and stacked.
    """

    source: Source
    order: TrainingOrder
    crop: Crop
    num_views: int
    channels: int
    positions: np.ndarray  # positions in the global batch that this process fills
    num_steps: int
    flip: bool
    skipped: SkippedImages | None

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        count, size = len(self.positions), self.crop.size
        images = np.empty((count, self.num_views, size, size, self.channels), np.uint8)
        indices = [self.order.sample_index(int(step), int(p)) for p in self.positions]
        labels: list[int] = []
        for start in range(0, count, _PLANNED_AT_ONCE):
            some = indices[start : start + _PLANNED_AT_ONCE]
            keys = [self.order.record_key(index) for index in some]
            plans = [self._plan(*pair) for pair in zip(some, keys, strict=True)]
            for index, key, plan in zip(some, keys, plans, strict=True):
                labels.append(self._fill(index, key, plan, images[len(labels)]))
        return {
            "images": images,
            "sample_index": np.asarray([i % 2**32 for i in indices], np.uint32),
            "label": np.asarray(labels, np.int32),
        }

    def _plan(self, sample_index: int, key: int) -> "_Plan | UndecodableError":
        """Reads an image and draws what is to be cut out of it."""
        try:
            encoded, label = self.source.example(key)
            header = read_header(encoded)
        except UndecodableError as error:
            return error
        whole = self.crop.is_whole(header.height, header.width)
        flips = [False] * self.num_views
        if whole and not self.flip:
            boxes = [Box(0, 0, header.height, header.width)] * self.num_views
        else:
            rng = np.random.Generator(np.random.Philox(key=[self.order.seed, sample_index]))
            boxes = [
                draw_box(header.height, header.width, self.crop, rng) for _ in range(self.num_views)
            ]
            if self.flip:
                flips = [rng.random() < 0.5 for _ in boxes]
        return _Plan(encoded, label, header, boxes, flips)

    def _fill(
        self, sample_index: int, key: int, plan: "_Plan | UndecodableError", views: np.ndarray
    ) -> int:
        """Fills in the views [views, size, size, channels] of a sample; gives its label."""
        for attempt in range(_MAX_TRIES):
            try:
                if isinstance(plan, UndecodableError):
                    raise plan
                self._cut_views(plan, views)
                return plan.label
            except UndecodableError as error:
                _skip(self.skipped, self.source, key, error)
                key = self.order.substitute(sample_index, attempt)
                plan = self._plan(sample_index, key)
        raise UnusableDataError(
            f"{_MAX_TRIES} images of {self.source.name}, drawn at random, cannot be decoded"
        )

    def _cut_views(self, plan: "_Plan", views: np.ndarray) -> None:
        smallest = min(min(box.height, box.width) for box in plan.boxes)
        reduction = largest_reduction(plan.header, smallest / self.crop.size)
        image = decode(plan.encoded, self.channels, header=plan.header, reduction=reduction)
        for box, flip, view in zip(plan.boxes, plan.flips, views, strict=True):
            cut(image, box, view, reduction=reduction)
            if flip:
                view[:] = view[:, ::-1].copy()


class _Plan(NamedTuple):
    """A sample that has been read, and what is to be cut out of it."""

    encoded: bytes
    label: int
    header: Header
    boxes: list[Box]
    flips: list[bool]


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
    skipped: SkippedImages | None = None,
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
      skipped: takes note of each image that cannot be decoded, whose place another image takes,
        chosen by the seed and the sample's index alone; without it such an image is an error.
      num_threads: decoding threads; by default one a core.

    Yields:
      Dictionaries of `images`, uint8 [positions, views, size, size, channels]; `sample_index`,
      uint32 [positions]; `label`, int32 [positions].

    Raises:
      UnusableDataError: while iterating, if images cannot be decoded and it may not be overlooked.
    """
    use_one_thread()
    batches = _TrainingBatches(
        source, order, crop, num_views, channels, positions, num_steps, flip, skipped
    )
    dataset = grain.MapDataset.source(batches)[start_step:]
    return iter(dataset.to_iter_dataset(_read_options(num_threads)))


@dataclasses.dataclass(frozen=True)
class _EvaluationBatches:
    """What Grain reads: item `k` is this process's share of the k-th batch of the split."""

    source: Source
    positions: np.ndarray
    batch_size: int
    size: int
    resize_shorter_side: int
    channels: int
    skipped: SkippedImages | None

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        shape = (len(self.positions), self.size, self.size, self.channels)
        images = np.zeros(shape, np.uint8)
        labels = np.full(len(self.positions), -1, np.int32)
        decoded = np.zeros(len(self.positions), bool)
        for i, position in enumerate(self.positions):
            key = int(k) * self.batch_size + int(position)
            if key < len(self.source):
                label = self._cut_center(key, images[i])
                if label is not None:
                    labels[i], decoded[i] = label, True
        return {"images": images, "label": labels, "decoded": decoded}

    def _cut_center(self, key: int, view: np.ndarray) -> int | None:
        """Fills in the central view and gives the label; None if the image cannot be decoded."""
        try:
            encoded, label = self.source.example(key)
            header = read_header(encoded)
            shrink = min(header.height, header.width) / self.resize_shorter_side
            reduction = largest_reduction(header, shrink)
            image = decode(encoded, self.channels, header=header, reduction=reduction)
        except UndecodableError as error:
            _skip(self.skipped, self.source, key, error)
            return None
        view[:] = center_crop(image, self.size, self.resize_shorter_side)
        return label


def evaluation_batches(
    source: Source,
    *,
    size: int,
    resize_shorter_side: int,
    channels: int,
    batch_size: int,
    positions: np.ndarray,
    skipped: SkippedImages | None = None,
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
      skipped: takes note of each image that cannot be decoded, which is a blank whose label is -1;
        without it such an image is an error.
      num_threads: decoding threads; by default one a core.

    Yields:
      Dictionaries of `images`, uint8 [positions, size, size, channels]; `label`, int32 [positions],
      -1 where there is none; `decoded`, bool [positions], False for a blank.
    """
    use_one_thread()
    batches = _EvaluationBatches(
        source, positions, batch_size, size, resize_shorter_side, channels, skipped
    )
    return iter(grain.MapDataset.source(batches).to_iter_dataset(_read_options(num_threads)))


def _read_options(num_threads: int | None) -> grain.ReadOptions:
    threads = num_threads or os.cpu_count() or 1
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)


def _skip(skipped: SkippedImages | None, source: Source, key: int, error: UndecodableError) -> None:
    if skipped is None:
        name = source.record_name(key)
        raise UnusableDataError(f"image {name} of {source.name}: {error}") from error
    skipped.add(source, key, str(error))
