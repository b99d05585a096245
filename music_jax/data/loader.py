"""Makes batches of views on the host.

The order, the crops, the replacement of an image that cannot be decoded, and (on the device) the
augmentations depend on the seed and the global sample index (see `music_jax.data.order`), never on
a worker, a process, or where a run was resumed.
"""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import cv2
import grain
import numpy as np
from numpy.typing import DTypeLike

from music_jax.data.crops import NUMBERS_PER_BOX, Box, Crop, central_view, cut, draw_boxes
from music_jax.data.decode import EncodedImage, Header, decode, largest_reduction, read_header
from music_jax.data.labels import Label
from music_jax.data.order import TrainingOrder
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed import usable_cores
from music_jax.errors import UndecodableError, UnusableDataError

# Samples that one thread reads, then decodes in a row. Decoding takes three times as long where
# Python code, which evicts the decoder from the caches, runs between two images.
_PART_SIZE = 32

# Batches that are decoded ahead of their use, for any number of threads.
_BATCHES_AHEAD = 3

MAX_THREADS = 224  # of decoding, by default: one per vCPU of the largest TPU VM

# Broken images in a row, each drawn at random from the dataset, after which training stops.
_MAX_TRIES = 100

Views = Mapping[str, tuple[Crop, int]]  # settings and number of crops, by the name of their array
_Batch = dict[str, np.ndarray]
_Cut = tuple[Box, bool]  # the box of a view, and whether it is mirrored


def training_batches(
    source: Source,
    order: TrainingOrder,
    *,
    views: Views,
    channels: int,
    dtype: DTypeLike = np.uint8,
    positions: np.ndarray,
    num_steps: int,
    start_step: int = 0,
    flip: bool = False,
    skipped: SkippedImages | None = None,
    num_threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns this process's share of the batches of steps `start_step` to `num_steps - 1`.

    Args:
      source: Images.
      order: Order of the images.
      views: Settings and number of the random crops of each image, by the name of their array.
        Crops keep their boxes whatever names follow theirs. They also keep their pixels, unless a
        JPEG that would be decoded at a reduced size is decoded at a larger one for the others.
      channels: Number of channels; files of 1 (gray) and 3 (RGB) are converted to one another.
      dtype: Type of the pixels: uint8, uint16 or float32.
      positions: Positions of the global batch that this process fills, ascending.
      num_steps: Number of steps of the whole training.
      start_step: First step; its batches are the same as if all steps before had been read.
      flip: Whether to mirror half of the views, if no augmentation on the device follows.
      skipped: List to which images that cannot be decoded are added. Other images replace them,
        chosen by the seed and the sample's index. By default such an image is an error.
      num_threads: Number of decoding threads; by default one per core that the process may use, up
        to `MAX_THREADS`.

    Yields:
      Dictionaries of the views, [positions, views, size, size, channels] for each name;
      `sample_index`, uint32 [positions]; `label`, as `Source.no_labels` returns them.

    Raises:
      UnusableDataError: While iterating, if images cannot be decoded and must not be skipped.
    """
    batches = _TrainingBatches(
        source, order, views, channels, np.dtype(dtype), positions, flip, skipped
    )
    return _read(batches.new, batches.fill, len(positions), start_step, num_steps, num_threads)


def evaluation_batches(
    source: Source,
    *,
    size: int,
    resize_shorter_side: int,
    channels: int,
    dtype: DTypeLike = np.uint8,
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
      channels: Number of channels, as in `training_batches`.
      dtype: Type of the pixels, likewise.
      batch_size: Global batch size; the last batch is padded with images of zeros without a label.
      positions: Positions of the global batch that this process fills, ascending.
      skipped: List to which images that cannot be decoded are added. Images of zeros without
        a label replace them. By default such an image is an error.
      num_threads: Number of decoding threads; by default one per core that the process may use, up
        to `MAX_THREADS`.

    Yields:
      Dictionaries of `images`, [positions, size, size, channels]; `label`, as `Source.no_labels`
      returns them; `decoded`, bool [positions], False for images of zeros.
    """
    count = len(positions)

    def new() -> _Batch:
        return {
            "images": np.zeros((count, size, size, channels), dtype),
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
                    dtype=dtype,
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


@dataclasses.dataclass(frozen=True)
class _TrainingBatches:
    """This process's share of the batch of each step; see `training_batches`."""

    source: Source
    order: TrainingOrder
    views: Views
    channels: int
    dtype: np.dtype
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
        for name, (crop, num_views) in self.views.items():
            shape = (count, num_views, crop.size, crop.size, self.channels)
            batch[name] = np.empty(shape, self.dtype)
        return batch

    def fill(self, step: int, batch: _Batch, rows: range) -> None:
        """Fills in some rows of a batch."""
        positions = self.positions[rows.start : rows.stop].tolist()
        indices = [self.order.sample_index(step, position) for position in positions]
        keys = [self.order.record_key(index) for index in indices]
        samples = [self._read(key) for key in keys]
        cuts = self._draw(indices, samples)
        for i, row in enumerate(rows):
            views = [view for name in self.views for view in batch[name][row]]
            batch["sample_index"][row] = indices[i] % 2**32
            batch["label"][row] = self._fill(indices[i], keys[i], samples[i], cuts[i], views)

    def _read(self, key: int) -> _Sample:
        try:
            encoded, label = self.source.example(key)
            return _Sample(encoded, label, read_header(encoded, self.channels))
        except UndecodableError as error:
            return _Sample(b"", -1, Header(1, 1), error)

    def _draw(self, sample_indices: list[int], samples: list[_Sample]) -> list[list[_Cut]]:
        """Draws the crops of each sample, one element per view."""
        sizes = np.asarray([sample.header[:2] for sample in samples])
        count = NUMBERS_PER_BOX + 1
        drawn: list[list[_Cut]] = [[] for _ in samples]
        for stream, (crop, num_views) in enumerate(self.views.values()):
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
        image = decode(
            sample.encoded,
            self.channels,
            dtype=self.dtype,
            header=header,
            reduction=reduction,
            quick=True,
        )
        if not header.is_jpeg and image.shape[:2] != header[:2]:  # a rotated PNG, for example
            actual = sample._replace(header=Header(*image.shape[:2]))
            (cuts,) = self._draw([index], [actual])
        for (box, flip), view in zip(cuts, views, strict=True):
            cut(image, box, view, reduction=reduction)
            if flip:
                view[:] = view[:, ::-1].copy()


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
    threads = num_threads or min(usable_cores(), MAX_THREADS)
    cv2.setNumThreads(0)  # These threads are enough.
    size, num_parts, parts_ahead = _parts(num_rows, threads)
    started: dict[int, _Batch] = {}
    lock = threading.Lock()

    def fill_part(item: int) -> int:
        k, part = divmod(item, num_parts)
        with lock:
            if k not in started:
                started[k] = new()
        fill(k, started[k], range(part * size, min((part + 1) * size, num_rows)))
        return item

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=parts_ahead)
    parts = grain.MapDataset.range(start * num_parts, stop * num_parts).map(fill_part)
    filled = iter(parts.to_iter_dataset(options))
    for k in range(start, stop):
        for _ in range(num_parts):
            next(filled)
        yield started.pop(k)


def _parts(num_rows: int, threads: int) -> tuple[int, int, int]:
    """Returns the rows of a part, the parts of a batch, and the parts that are read ahead."""
    # Small batches are divided into smaller parts, so that all threads have one.
    size = min(_PART_SIZE, -(-_BATCHES_AHEAD * num_rows // threads))
    num_parts = -(-num_rows // size)
    return size, num_parts, max(threads + 1, _BATCHES_AHEAD * num_parts)


def loader_bytes(
    num_rows: int, row_bytes: int, *, num_threads: int, file_bytes: int, image_bytes: int
) -> int:
    """Returns the most memory that `training_batches` takes for batches, files and decoding.

    Args:
      num_rows: Rows of a batch that the process provides.
      row_bytes: Size of the views of a row.
      num_threads: Number of decoding threads.
      file_bytes: Size of an encoded image.
      image_bytes: Size of a decoded image at its full resolution.
    """
    size, num_parts, parts_ahead = _parts(num_rows, num_threads)
    batches = -(-parts_ahead // num_parts) + 1  # one of them is only partly read
    # A thread holds the files of a part, and an image while it is converted or mirrored.
    return batches * num_rows * row_bytes + num_threads * (size * file_bytes + 2 * image_bytes)
