"""Reads the batches of a training onto the mesh, and checks the images."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax.data.crops import Crop
from music_jax.data.loader import MAX_THREADS, loader_bytes, training_batches
from music_jax.data.order import TrainingOrder
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed.mesh import Placing
from music_jax.errors import UserError
from music_jax.train.recipe import Crops
from music_jax.train.step import crop_shapes
from music_jax.workdir.files import read_json, write_json

_BATCHES_AHEAD = 2  # transferred to the devices while a step runs
_FEW_STEPS = 10  # per epoch
_UNUSED_SHARE = 0.01  # of the images, that an epoch may omit without a warning


class TrainingInput:
    """The batches of a training from any step on.

    Attributes:
      order: Order of the images.
      num_steps: Number of steps of the whole training.
      placing: Function that puts this process's rows of a batch onto the mesh.
    """

    def __init__(
        self,
        config: config_dict.ConfigDict,
        source: Source,
        order: TrainingOrder,
        mesh: Mesh,
        skipped: SkippedImages,
    ):
        """Stores the arguments; no image is read yet."""
        self._config, self._source, self._skipped = config, source, skipped
        self.order, self.placing = order, Placing(order.batch_size, mesh)
        self.num_steps = config.num_epochs * order.steps_per_epoch

    def on_host(
        self, start_step: int, num_steps: int, *, num_views: int = 2, local_views: bool = False
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of the batches of the steps after `start_step`."""
        config = self._config
        ratios, local = tuple(config.crop.aspect_ratio), config.local_views
        views = {"images": (Crop(config.crop.size, tuple(config.crop.scale), ratios), num_views)}
        if local_views and local.count:
            views["local_images"] = (Crop(local.size, tuple(local.scale), ratios), local.count)
        return training_batches(
            self._source,
            self.order,
            views=views,
            channels=config.dataset.num_channels,
            dtype=config.dataset.pixel_type,
            positions=self.placing.positions,
            num_steps=num_steps,
            start_step=start_step,
            skipped=self._skipped,
            num_threads=config.num_decode_threads,
        )

    def on_devices(self, start_step: int) -> Iterator[tuple[Crops, jax.Array]]:
        """Yields the global batches and their sample indices, transferred ahead of their use."""
        queue: collections.deque[tuple[Crops, jax.Array]] = collections.deque()
        for batch in self.on_host(start_step, self.num_steps, local_views=True):
            crops: Any = batch["images"]
            if "local_images" in batch:
                crops = (crops, batch["local_images"])
            queue.append(jax.tree.map(self.placing, (crops, batch["sample_index"])))
            if len(queue) == _BATCHES_AHEAD:
                yield queue.popleft()
        yield from queue


def host_bytes(
    config: config_dict.ConfigDict, num_rows: int, *, file_bytes: int, image_bytes: int
) -> int:
    """Returns the most host memory that the batches of a training take in one process.

    Args:
      config: The config.
      num_rows: Rows of the global batch that the process provides.
      file_bytes: Size of an encoded image.
      image_bytes: Size of a decoded image at its full resolution.
    """
    views = jax.tree.leaves(crop_shapes(config))
    row_bytes = sum(view.size * view.dtype.itemsize for view in views) // config.batch_size
    read = loader_bytes(
        num_rows,
        row_bytes,
        num_threads=config.num_decode_threads or MAX_THREADS,
        file_bytes=file_bytes,
        image_bytes=image_bytes,
    )
    # Besides: the batch that was read last, those that were transferred, and that of the step.
    return read + (_BATCHES_AHEAD + 2) * num_rows * row_bytes


def check_same_images(workdir: epath.Path, source: Source, *, resuming: bool) -> None:
    """Checks that a run resumes with the images that it began with; a new run records them.

    Their fingerprint is in images.json. A run of an earlier version, which has no such file,
    resumes and gets one.

    Raises:
      UserError: Images were renamed, replaced, added or removed, or the file cannot be read.
    """
    path = workdir / "images.json"
    fingerprint = source.fingerprint(times=False)
    if not (resuming and path.exists()):
        write_json(path, {"source": source.name, "images": len(source), "fingerprint": fingerprint})
        return
    try:
        same = read_json(path)["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error!r}; remove it to resume") from error
    if not same:
        raise UserError(
            f"the images of {source.name} have changed since the run in {workdir} began: files "
            "were renamed, replaced, added or removed. Put them back and rerun the command, or "
            "train on the new images with another --workdir; to resume this run with the images as "
            f"they are now, remove {path}"
        )


def color_warnings(config: config_dict.ConfigDict) -> list[str]:
    """Returns a warning about augmentations of colors that images without colors do not get."""
    channels, views = config.dataset.num_channels, config.augmentation.values()
    names = ("jitter", "grayscale", "solarize")
    drawn = [name for name in names if any(view[f"{name}_probability"] for view in views)]
    if channels in (1, 3) or not drawn:
        return []
    return [
        f"config.augmentation: {', '.join(drawn)} need one or three channels; the images of "
        f"{channels} channels do not get them"
    ]


def small_data_warnings(config: config_dict.ConfigDict, order: TrainingOrder) -> list[str]:
    """Returns warnings about defaults that do not suit a small dataset, with fields to change."""
    steps, images, log_every = order.steps_per_epoch, order.num_records, config.log_every_steps
    unused = images - steps * config.batch_size
    warnings = []
    if steps < _FEW_STEPS:
        warnings.append(
            f"an epoch of {images} images has only {steps} step{'s' * (steps > 1)} with "
            f"config.batch_size = {config.batch_size}; a smaller batch gives more steps"
        )
    if unused > _UNUSED_SHARE * images:
        warnings.append(
            f"each epoch omits {unused} of {images} images ({unused / images:.0%}), different ones "
            "each time, since every batch is full; another config.batch_size omits fewer"
        )
    if log_every > config.num_epochs * steps:
        warnings.append(
            f"the run has fewer steps than config.log_every_steps = {log_every}: only the first "
            "step, the last step and those of checkpoints are logged"
        )
    elif log_every > steps:
        warnings.append(
            f"metrics are logged once in {log_every / steps:.1f} epochs; a smaller "
            "config.log_every_steps logs more often"
        )
    return warnings
