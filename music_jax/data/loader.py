"""Makes batches of views on the host, in an order that depends on the seed alone.

The global sample index counts the images of a whole training: epoch `e` of a dataset of `n` images
has the indices `e * n` to `e * n + n - 1`. Grain's shuffle maps them to images, with a key made
from the seed and the epoch; the remainder that does not fill a batch is dropped. The order, the
crops, the replacement of an image that cannot be decoded, and (on the device) the augmentations
depend on the seed and this index, never on a worker, a process, or where a run was resumed.
"""

import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import grain
import numpy as np
from grain.experimental import index_shuffle

from music_jax.data.decode import (
    EncodedImage,
    Header,
    central_view,
    decode,
    largest_reduction,
    read_header,
)
from music_jax.data.labels import Label
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed import usable_cores
from music_jax.errors import UndecodableError, UnusableDataError

# Saved with each checkpoint, so that a run that resumes in another order can log this. Version 1
# used `seed + epoch` as the key: a seed had the orders of the next seed, one epoch later.
ORDER_VERSION = 2

# Samples that one thread reads, then decodes in a row. Decoding takes three times as long where
# Python code, which evicts the decoder from the caches, runs between two images.
_PART_SIZE = 32

# Batches that are decoded ahead of their use, for any number of threads.
_BATCHES_AHEAD = 3

# Broken images in a row, each drawn at random from the dataset, after which training stops.
_MAX_TRIES = 100

_TRIES = 10  # at drawing a box
NUMBERS_PER_BOX = 2 * _TRIES + 2  # area and aspect ratio of each try, then top and left

_Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """Assigns an image to each position of the batch of each step.

    Attributes:
      num_records: Number of images in the dataset.
      batch_size: Global batch size, at most `num_records`.
      seed: Seed of the shuffle.
    """

    num_records: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in an epoch."""
        return self.num_records // self.batch_size

    def sample_index(self, step: int, position: int) -> int:
        """Returns the global index of the sample at a position of the global batch of a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.num_records + step_in_epoch * self.batch_size + position

    def substitute(self, sample_index: int, attempt: int) -> int:
        """Returns the image to use where a sample's own and `attempt` others are broken."""
        bits = np.random.Philox(key=[self.seed, sample_index], counter=[0, 0, 0, 1 + attempt])
        return int(np.random.Generator(bits).integers(self.num_records))

    def record_key(self, sample_index: int) -> int:
        """Returns the position in the dataset of the image with a global sample index."""
        epoch, index = divmod(sample_index, self.num_records)
        seed = _shuffle_key(self.seed, epoch)
        return index_shuffle(index, max_index=self.num_records - 1, seed=seed, rounds=4)


@functools.lru_cache
def _shuffle_key(seed: int, epoch: int) -> int:
    """Returns 32 bits for Grain's shuffle, unrelated for any two pairs of seed and epoch.

    Two of `k` pairs share a key with a probability of `k**2 / 2**33`: 0.01 % for 10 seeds of 100
    epochs each. Then one epoch of a run has the order of one epoch of another.
    """
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class Crop:
    """Settings of the random crops of training views.

    Attributes:
      size: Side of the square view, in pixels.
      scale: Range of the crop's share of the image's area; (1, 1) takes the entire image.
      aspect_ratio: Range of the crop's width divided by its height.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


_Cut = tuple[Box, bool]  # the box of a view, and whether it is mirrored


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
    local_views: tuple[Crop, int] | None = None,
    flip: bool = False,
    skipped: SkippedImages | None = None,
    num_threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns this process's share of the batches of steps `start_step` to `num_steps - 1`.

    Args:
      source: Images.
      order: Order of the images.
      crop: Settings of the random crops.
      channels: 1 (gray) or 3 (RGB).
      positions: Positions of the global batch that this process fills, ascending.
      num_steps: Number of steps of the whole training.
      start_step: First step; its batches are the same as if all steps before had been read.
      num_views: Number of crops of each image.
      local_views: Settings and number of further crops of each image, the local views. The other
        crops keep their boxes. They also keep their pixels, unless a JPEG that would be decoded at
        a reduced size is decoded at a larger one for the local views.
      flip: Whether to mirror half of the views, if no augmentation on the device follows.
      skipped: List to which images that cannot be decoded are added. Other images replace them,
        chosen by the seed and the sample's index. By default such an image is an error.
      num_threads: Number of decoding threads; by default one per core that the process may use.

    Yields:
      Dictionaries of `images`, uint8 [positions, views, size, size, channels]; `local_images`
      likewise, if there are local views; `sample_index`, uint32 [positions]; `label`, as
      `Source.no_labels` returns them.

    Raises:
      UnusableDataError: While iterating, if images cannot be decoded and must not be skipped.
    """
    groups = [_Group("images", crop, num_views)]
    if local_views is not None:
        groups.append(_Group("local_images", *local_views))
    batches = _TrainingBatches(source, order, groups, channels, positions, flip, skipped)
    return _read(batches.new, batches.fill, len(positions), start_step, num_steps, num_threads)


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
    """Returns this process's share of all images of a split, in order, each center-cropped once.

    Args:
      source: Images.
      size: Side of the views, in pixels.
      resize_shorter_side: Length to which the shorter side is resized before the crop.
      channels: 1 (gray) or 3 (RGB).
      batch_size: Global batch size; the last batch is padded with black images without a label.
      positions: Positions of the global batch that this process fills, ascending.
      skipped: List to which images that cannot be decoded are added. Black images without a
        label replace them. By default such an image is an error.
      num_threads: Number of decoding threads; by default one per core that the process may use.

    Yields:
      Dictionaries of `images`, uint8 [positions, size, size, channels]; `label`, as
      `Source.no_labels` returns them; `decoded`, bool [positions], False for black images.
    """
    count = len(positions)

    def new() -> _Batch:
        return {
            "images": np.zeros((count, size, size, channels), np.uint8),
            "label": source.no_labels(count),
            "decoded": np.zeros(count, bool),
        }

    def fill(k: int, batch: _Batch, rows: range) -> None:
        for row in rows:
            key = k * batch_size + int(positions[row])
            if key >= len(source):  # padding
                return
            try:
                encoded, label = source.example(key)
                batch["images"][row] = central_view(
                    encoded,
                    size=size,
                    resize_shorter_side=resize_shorter_side,
                    channels=channels,
                )
            except UndecodableError as error:
                _skip(skipped, source, key, error)
            else:
                batch["label"][row], batch["decoded"][row] = label, True

    return _read(new, fill, count, 0, -(-len(source) // batch_size), num_threads)


class _Sample(NamedTuple):
    """A sample that was read but not decoded; with an error, its other fields are unused."""

    encoded: EncodedImage
    label: Label
    header: Header
    error: UndecodableError | None = None


class _Group(NamedTuple):
    """Views of one size."""

    name: str  # of their array in the batch
    crop: Crop
    num_views: int


@dataclasses.dataclass(frozen=True)
class _TrainingBatches:
    """This process's share of the batch of each step; see `training_batches`."""

    source: Source
    order: TrainingOrder
    groups: list[_Group]
    channels: int
    positions: np.ndarray
    flip: bool
    skipped: SkippedImages | None

    def new(self) -> _Batch:
        """Returns a batch that is not filled in yet."""
        count = len(self.positions)
        batch = {
            "sample_index": np.empty(count, np.uint32),
            "label": self.source.no_labels(count),
        }
        for name, crop, num_views in self.groups:
            shape = (count, num_views, crop.size, crop.size, self.channels)
            batch[name] = np.empty(shape, np.uint8)
        return batch

    def fill(self, step: int, batch: _Batch, rows: range) -> None:
        """Fills in some rows of a batch."""
        positions = self.positions[rows.start : rows.stop].tolist()
        indices = [self.order.sample_index(step, position) for position in positions]
        keys = [self.order.record_key(index) for index in indices]
        samples = [self._read(key) for key in keys]
        cuts = self._draw(indices, samples)
        for i, row in enumerate(rows):
            views = [view for group in self.groups for view in batch[group.name][row]]
            batch["sample_index"][row] = indices[i] % 2**32
            batch["label"][row] = self._fill(indices[i], keys[i], samples[i], cuts[i], views)

    def _read(self, key: int) -> _Sample:
        try:
            encoded, label = self.source.example(key)
            return _Sample(encoded, label, read_header(encoded))
        except UndecodableError as error:
            return _Sample(b"", -1, Header(1, 1), error)

    def _draw(self, sample_indices: list[int], samples: list[_Sample]) -> list[list[_Cut]]:
        """Draws the crops of each sample, one element per view of any group."""
        sizes = np.asarray([sample.header[:2] for sample in samples])
        count = NUMBERS_PER_BOX + 1
        drawn: list[list[_Cut]] = [[] for _ in samples]
        for stream, (_, crop, num_views) in enumerate(self.groups):
            heights, widths = np.repeat(sizes, num_views, axis=0).T
            numbers = _uniform(self.order.seed, sample_indices, num_views * count, stream)
            numbers = numbers.reshape(-1, count)
            boxes = draw_boxes(heights, widths, crop, numbers[:, :-1]).tolist()
            flips = (self.flip & (numbers[:, -1] < 0.5)).tolist()
            cuts = [(Box(*box), flip) for box, flip in zip(boxes, flips, strict=True)]
            for i, of_sample in enumerate(drawn):
                of_sample += cuts[i * num_views : (i + 1) * num_views]
        return drawn

    def _fill(
        self, index: int, key: int, sample: _Sample, cuts: list[_Cut], views: list[np.ndarray]
    ) -> Label:
        """Fills in the views, each [size, size, channels], of a sample; returns its label."""
        for attempt in range(_MAX_TRIES):
            try:
                if sample.error is not None:
                    raise sample.error
                self._cut_views(index, sample, cuts, views)
                return sample.label
            except UndecodableError as error:
                _skip(self.skipped, self.source, key, error)
                key = self.order.substitute(index, attempt)
                sample = self._read(key)
                (cuts,) = self._draw([index], [sample])
        raise UnusableDataError(
            f"{_MAX_TRIES} images of {self.source.name}, drawn at random, cannot be decoded"
        )

    def _cut_views(
        self, index: int, sample: _Sample, cuts: list[_Cut], views: list[np.ndarray]
    ) -> None:
        header = sample.header
        factor = min(
            min(box.height, box.width) / len(view)
            for (box, _), view in zip(cuts, views, strict=True)
        )
        reduction = largest_reduction(header, factor)
        encoded, channels = sample.encoded, self.channels
        image = decode(encoded, channels, header=header, reduction=reduction, quick=True)
        if not header.is_jpeg and image.shape[:2] != header[:2]:  # a rotated PNG, for example
            actual = sample._replace(header=Header(*image.shape[:2]))
            (cuts,) = self._draw([index], [actual])
        for (box, flip), view in zip(cuts, views, strict=True):
            cut(image, box, view, reduction=reduction)
            if flip:
                view[:] = view[:, ::-1].copy()


def draw_boxes(
    heights: np.ndarray, widths: np.ndarray, crop: Crop, numbers: np.ndarray
) -> np.ndarray:
    """Draws a random box in each of many images, as torchvision's `RandomResizedCrop` does.

    Area and aspect ratio are drawn up to ten times. If no box fits, the largest centered box within
    the range of aspect ratios is taken.

    Args:
      heights: Heights of the images, [n].
      widths: Widths of the images, [n].
      crop: Ranges to draw from.
      numbers: Uniform numbers in [0, 1), [n, NUMBERS_PER_BOX]; each row gives one box.

    Returns:
      int64 [n, 4], the fields of `Box`.
    """
    low, high = crop.scale
    log_low, log_high = (math.log(r) for r in crop.aspect_ratio)
    h, w = heights[:, None], widths[:, None]
    areas = h * w * (low + (high - low) * numbers[:, :_TRIES])
    ratios = np.exp(log_low + (log_high - log_low) * numbers[:, _TRIES : 2 * _TRIES])
    tried_w, tried_h = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (tried_w > 0) & (tried_w <= w) & (tried_h > 0) & (tried_h <= h)  # [n, tries]
    first = fits.argmax(axis=1)[:, None]
    any_fits = fits.any(axis=1)
    ratio = np.clip(widths / heights, *crop.aspect_ratio)
    largest_w = np.minimum(widths, np.maximum(1, np.rint(heights * ratio)))
    largest_h = np.minimum(heights, np.maximum(1, np.rint(widths / ratio)))
    box_w = np.where(any_fits, np.take_along_axis(tried_w, first, axis=1)[:, 0], largest_w)
    box_h = np.where(any_fits, np.take_along_axis(tried_h, first, axis=1)[:, 0], largest_h)
    top = np.where(any_fits, (heights - box_h + 1) * numbers[:, -2], (heights - box_h) // 2)
    left = np.where(any_fits, (widths - box_w + 1) * numbers[:, -1], (widths - box_w) // 2)
    return np.stack([top, left, box_h, box_w], axis=1).astype(np.int64)


def cut(image: np.ndarray, box: Box, out: np.ndarray, *, reduction: int = 1) -> None:
    """Cuts a box out of an image and resizes it to a square, fast enough for training.

    Halves the box, each pixel the mean of four, while it is at least twice as large as the square,
    then interpolates bilinearly. Averaging over all pixels at once, as `resize` does, takes five
    to ten times as long; the mean difference is one gray level.

    Args:
      image: uint8 [height, width, channels].
      box: Box, in pixels of the image at full size.
      out: uint8 [size, size, channels], contiguous; receives the square.
      reduction: Factor by which decoding has reduced the image.
    """
    top, left, height, width = box
    if reduction > 1:
        height = -(-(top + height) // reduction) - top // reduction
        width = -(-(left + width) // reduction) - left // reduction
        top, left = top // reduction, left // reduction
    part = image[top : top + height, left : left + width]
    size = out.shape[0]
    while height >= 2 * size and width >= 2 * size:
        height, width = height // 2, width // 2
        part = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
    if (height, width) == (size, size):
        out[:] = part.reshape(out.shape)
    else:
        cv2.resize(part, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)


def _uniform(seed: int, sample_indices: list[int], count: int, stream: int) -> np.ndarray:
    """Returns [samples, count] numbers in [0, 1), a function of the seed and each sample's index.

    The numbers of a sample have a fixed position in a stream, so that runs of consecutive indices
    are drawn together.
    """
    blocks = -(-count // 4)  # Philox gives four numbers for each value of its counter
    numbers = np.empty((len(sample_indices), 4 * blocks))
    indices = np.asarray(sample_indices)
    starts = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)]
    for start, end in itertools.pairwise(starts):
        bits = np.random.Philox(
            key=[seed, stream], counter=[sample_indices[start] * blocks, 0, 0, 0]
        )
        np.random.Generator(bits).random(out=numbers[start:end])
    return numbers[:, :count]


def _skip(skipped: SkippedImages | None, source: Source, key: int, error: UndecodableError) -> None:
    if skipped is None:
        name = source.record_name(key)
        raise UnusableDataError(f"image {name} of {source.name}: {error}") from error
    skipped.add(source, key, str(error))


def _read(
    new: Callable[[], _Batch],
    fill: Callable[[int, _Batch, range], None],
    num_rows: int,
    start: int,
    stop: int,
    num_threads: int | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches `start` to `stop - 1`, decoded by several threads ahead of their use.

    Each thread fills in some rows of a batch in place. All threads thus work on a few batches at a
    time, and samples need not be passed on and stacked.
    """
    threads = num_threads or usable_cores()
    cv2.setNumThreads(0)  # These threads are enough.
    # Small batches are divided into smaller parts, so that all threads have one.
    size = min(_PART_SIZE, -(-_BATCHES_AHEAD * num_rows // threads))
    num_parts = -(-num_rows // size)
    started: dict[int, _Batch] = {}
    lock = threading.Lock()

    def fill_part(item: int) -> int:
        k, part = divmod(item, num_parts)
        with lock:
            if k not in started:
                started[k] = new()
        fill(k, started[k], range(part * size, min((part + 1) * size, num_rows)))
        return item

    options = grain.ReadOptions(
        num_threads=threads,
        prefetch_buffer_size=max(threads + 1, _BATCHES_AHEAD * num_parts),
    )
    parts = grain.MapDataset.range(start * num_parts, stop * num_parts).map(fill_part)
    filled = iter(parts.to_iter_dataset(options))
    for k in range(start, stop):
        for _ in range(num_parts):
            next(filled)
        yield started.pop(k)
