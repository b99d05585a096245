"""Batches of host-cut views, in an order that depends on the seed alone.

Global sample index `i` runs over the whole training: epoch `e` of a dataset of `n` images takes the
indices `e * n ... e * n + n - 1`, shuffled by Grain with a key that is mixed from the seed and the
epoch, and leaves out the remainder that fills no batch. The order, the crops, the replacement for
an image that cannot be decoded and (on the device) the augmentations depend on the seed and this
index, never on a worker, a process or where a run was resumed.
"""

import dataclasses
import functools
import itertools
import threading
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import grain
import numpy as np
from grain.experimental import index_shuffle

from music_jax.data.central import central_view
from music_jax.data.crops import NUMBERS_PER_BOX, Box, Crop, cut, draw_boxes
from music_jax.data.decode import decode, largest_reduction, use_one_thread
from music_jax.data.headers import Header, read_header
from music_jax.data.memory import BatchMemory
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed import usable_cores
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
        epoch, index = divmod(sample_index, self.num_records)
        seed = _shuffle_key(self.seed, epoch)
        return index_shuffle(index, max_index=self.num_records - 1, seed=seed, rounds=4)


# Saved with each checkpoint, to say when a run is resumed in another order. 1 was `seed + epoch`,
# which gave a seed the orders of the next seed, one epoch later.
ORDER_VERSION = 2


@functools.lru_cache
def _shuffle_key(seed: int, epoch: int) -> int:
    """32 bits for Grain's shuffle, unrelated for any two pairs of seed and epoch.

    Two of `k` pairs have the same key with a probability of `k**2 / 2**33`: 0.01 % for 10 seeds of
    100 epochs each. Then a single epoch of one run has the order of one epoch of another.
    """
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


# Samples that are read and planned before they are decoded, and that a thread decodes in a row:
# between two images that are decoded, the caches hold nothing of Python's, and the same work takes
# three times as long.
_PART_SIZE = 32

# Batches that are decoded ahead of their use, however many threads there are.
_BATCHES_AHEAD = 3

# So many images in a row, each drawn at random from the dataset, are not all broken by chance.
_MAX_TRIES = 100


@dataclasses.dataclass(frozen=True)
class _TrainingBatches:
    """This process's share of each step's batch."""

    source: Source
    order: TrainingOrder
    crop: Crop
    num_views: int
    channels: int
    positions: np.ndarray  # positions in the global batch that this process fills
    num_steps: int
    flip: bool
    skipped: SkippedImages | None
    memory: BatchMemory

    def __len__(self) -> int:
        return self.num_steps

    def new(self, step: int) -> dict[str, np.ndarray]:
        """A batch whose images and labels are still to be filled in."""
        count, size = len(self.positions), self.crop.size
        return {
            "images": self.memory.take((count, self.num_views, size, size, self.channels)),
            "sample_index": np.asarray(
                [i % 2**32 for i in self._indices(step, range(count))], np.uint32
            ),
            "label": np.empty(count, np.int32),
        }

    def fill(self, step: int, batch: dict[str, np.ndarray], rows: range) -> None:
        """Fills in some rows of a batch."""
        indices = self._indices(step, rows)
        keys = [self.order.record_key(index) for index in indices]
        plans = self._plan(indices, keys)
        for row, index, key, plan in zip(rows, indices, keys, plans, strict=True):
            batch["label"][row] = self._fill(index, key, plan, batch["images"][row])

    def _indices(self, step: int, rows: range) -> list[int]:
        first = self.order.sample_index(step, 0)
        return [first + position for position in self.positions[rows.start : rows.stop].tolist()]

    def _plan(self, sample_indices: list[int], keys: list[int]) -> "list[_Plan | UndecodableError]":
        """Reads images and draws what is to be cut out of them."""
        read = [self._read(key) for key in keys]
        sizes = [(1, 1) if isinstance(r, UndecodableError) else r[2][:2] for r in read]
        return [
            r if isinstance(r, UndecodableError) else _Plan(*r, *drawn)
            for r, drawn in zip(read, self._draw(sample_indices, sizes), strict=True)
        ]

    def _draw(
        self, sample_indices: list[int], sizes: list[tuple[int, int]]
    ) -> list[tuple[list[Box], list[bool]]]:
        """What is cut out of images of these heights and widths for each view, and mirrored."""
        heights, widths = np.repeat(np.asarray(sizes), self.num_views, axis=0).T
        count = NUMBERS_PER_BOX + 1
        numbers = _uniform(self.order.seed, sample_indices, self.num_views * count)
        numbers = numbers.reshape(-1, count)
        boxes = draw_boxes(heights, widths, self.crop, numbers[:, :-1])
        flips = self.flip & (numbers[:, -1] < 0.5)
        shape = (len(sizes), self.num_views)
        each = zip(boxes.reshape(*shape, -1).tolist(), flips.reshape(shape).tolist(), strict=True)
        return [([Box(*box) for box in some], flip) for some, flip in each]

    def _read(self, key: int) -> tuple[bytes, int, Header] | UndecodableError:
        try:
            encoded, label = self.source.example(key)
            return encoded, label, read_header(encoded)
        except UndecodableError as error:
            return error

    def _fill(
        self, sample_index: int, key: int, plan: "_Plan | UndecodableError", views: np.ndarray
    ) -> int:
        """Fills in the views [views, size, size, channels] of a sample; gives its label."""
        for attempt in range(_MAX_TRIES):
            try:
                if isinstance(plan, UndecodableError):
                    raise plan
                self._cut_views(sample_index, plan, views)
                return plan.label
            except UndecodableError as error:
                _skip(self.skipped, self.source, key, error)
                key = self.order.substitute(sample_index, attempt)
                (plan,) = self._plan([sample_index], [key])
        raise UnusableDataError(
            f"{_MAX_TRIES} images of {self.source.name}, drawn at random, cannot be decoded"
        )

    def _cut_views(self, sample_index: int, plan: "_Plan", views: np.ndarray) -> None:
        smallest = min(min(box.height, box.width) for box in plan.boxes)
        reduction = largest_reduction(plan.header, smallest / self.crop.size)
        image = decode(
            plan.encoded,
            self.channels,
            header=plan.header,
            reduction=reduction,
            quick=True,
            rows=max(box.top + box.height for box in plan.boxes),
        )
        boxes, flips = plan.boxes, plan.flips
        if not plan.header.is_jpeg and image.shape[:2] != plan.header[:2]:
            ((boxes, flips),) = self._draw([sample_index], [image.shape[:2]])  # a turned PNG, say
        for box, flip, view in zip(boxes, flips, views, strict=True):
            cut(image, box, view, reduction=reduction)
            if flip:
                view[:] = view[:, ::-1].copy()


def _uniform(seed: int, sample_indices: list[int], count: int) -> np.ndarray:
    """[samples, count] numbers in [0, 1), a function of the seed and each sample's index alone.

    A sample's numbers are at its own place in one stream; neighbors are drawn together.
    """
    blocks = -(-count // 4)  # Philox gives four numbers for each value of its counter
    numbers = np.empty((len(sample_indices), 4 * blocks))
    indices = np.asarray(sample_indices)
    starts = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)]
    for start, end in itertools.pairwise(starts):
        bits = np.random.Philox(key=[seed, 0], counter=[sample_indices[start] * blocks, 0, 0, 0])
        np.random.Generator(bits).random(out=numbers[start:end])
    return numbers[:, :count]


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
      num_threads: Decoding threads; by default one a core that the process may use.

    Yields:
      Dictionaries of `images`, uint8 [positions, views, size, size, channels]; `sample_index`,
      uint32 [positions]; `label`, int32 [positions].

    Raises:
      UnusableDataError: while iterating, if images cannot be decoded and it may not be overlooked.
    """
    use_one_thread()
    batches = _TrainingBatches(
        source,
        order,
        crop,
        num_views,
        channels,
        positions,
        num_steps,
        flip,
        skipped,
        BatchMemory(),
    )
    return _read(batches, start_step, num_threads)


@dataclasses.dataclass(frozen=True)
class _EvaluationBatches:
    """This process's share of each batch of the split."""

    source: Source
    positions: np.ndarray
    batch_size: int
    size: int
    resize_shorter_side: int
    channels: int
    skipped: SkippedImages | None

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def new(self, k: int) -> dict[str, np.ndarray]:
        """A batch of blanks."""
        del k
        count = len(self.positions)
        return {
            "images": np.zeros((count, self.size, self.size, self.channels), np.uint8),
            "label": np.full(count, -1, np.int32),
            "decoded": np.zeros(count, bool),
        }

    def fill(self, k: int, batch: dict[str, np.ndarray], rows: range) -> None:
        """Fills in some rows of a batch, up to the end of the split."""
        for row in rows:
            key = k * self.batch_size + int(self.positions[row])
            if key < len(self.source):
                label = self._cut_center(key, batch["images"][row])
                if label is not None:
                    batch["label"][row], batch["decoded"][row] = label, True

    def _cut_center(self, key: int, view: np.ndarray) -> int | None:
        """Fills in the central view and gives the label; None if the image cannot be decoded."""
        try:
            encoded, label = self.source.example(key)
            view[:] = central_view(
                encoded,
                size=self.size,
                resize_shorter_side=self.resize_shorter_side,
                channels=self.channels,
            )
        except UndecodableError as error:
            _skip(self.skipped, self.source, key, error)
            return None
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
    """This process's share of every image of a split, in order, center-cropped, once.

    Args:
      source: the images.
      size: side of the views in pixels.
      resize_shorter_side: what the image's shorter side becomes before the crop.
      channels: 1 or 3.
      batch_size: the global batch; the last one is filled up with blanks whose label is -1.
      positions: the positions of the global batch that this process fills, ascending.
      skipped: takes note of each image that cannot be decoded, which is a blank whose label is -1;
        without it such an image is an error.
      num_threads: Decoding threads; by default one a core that the process may use.

    Yields:
      Dictionaries of `images`, uint8 [positions, size, size, channels]; `label`, int32 [positions],
      -1 where there is none; `decoded`, bool [positions], False for a blank.
    """
    use_one_thread()
    batches = _EvaluationBatches(
        source, positions, batch_size, size, resize_shorter_side, channels, skipped
    )
    return _read(batches, 0, num_threads)


class _Batches(Protocol):
    """Batches that are made row by row."""

    @property
    def positions(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def new(self, k: int, /) -> dict[str, np.ndarray]: ...

    def fill(self, k: int, batch: dict[str, np.ndarray], rows: range, /) -> None: ...


class _Parts:
    """What Grain reads: an item is some rows of a batch, which are filled in where they belong.

    So all threads work on a few batches at a time. Single samples that are handed over and stacked
    would cost more.
    """

    def __init__(self, batches: _Batches, size: int):
        self._batches, self._size = batches, size
        self.per_batch = -(-len(batches.positions) // size)
        self._begun: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._batches) * self.per_batch

    def __getitem__(self, item: int) -> int:
        k, part = divmod(int(item), self.per_batch)
        with self._lock:
            if k not in self._begun:
                self._begun[k] = self._batches.new(k)
            batch = self._begun[k]
        stop = min((part + 1) * self._size, len(self._batches.positions))
        self._batches.fill(k, batch, range(part * self._size, stop))
        return k

    def take(self, k: int) -> dict[str, np.ndarray]:
        """The batch, whose parts have all been read."""
        with self._lock:
            return self._begun.pop(k)


def _read(
    batches: _Batches, start: int, num_threads: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """Reads batches from `start` on, decoded by several threads ahead of their use."""
    threads = num_threads or usable_cores()
    # With few samples in a batch the parts are smaller, so that all threads have one.
    share = -(-_BATCHES_AHEAD * len(batches.positions) // threads)
    parts = _Parts(batches, min(_PART_SIZE, share))
    options = grain.ReadOptions(
        num_threads=threads,
        prefetch_buffer_size=max(threads + 1, _BATCHES_AHEAD * parts.per_batch),
    )
    dataset = grain.MapDataset.source(parts)[start * parts.per_batch :]
    read = iter(dataset.to_iter_dataset(options))
    for k in range(start, len(batches)):
        for _ in range(parts.per_batch):
            next(read)
        yield parts.take(k)


def _skip(skipped: SkippedImages | None, source: Source, key: int, error: UndecodableError) -> None:
    if skipped is None:
        name = source.record_name(key)
        raise UnusableDataError(f"image {name} of {source.name}: {error}") from error
    skipped.add(source, key, str(error))
