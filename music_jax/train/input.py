"""Reads the batches of a training and puts them onto the mesh."""

import collections
import itertools
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax.data.loader import Crop, TrainingOrder, training_batches
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed.mesh import local_positions, to_devices
from music_jax.errors import UserError
from music_jax.workdir.files import read_json, write_json

_BATCHES_AHEAD = 2  # transferred to the devices while a step runs


class TrainingInput:
    """The batches of a training from any step on."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        source: Source,
        order: TrainingOrder,
        mesh: Mesh,
        skipped: SkippedImages,
    ):
        """Stores the arguments; no image is read yet."""
        self._config, self._source, self._mesh, self._skipped = config, source, mesh, skipped
        self.order = order
        self.num_steps = config.num_epochs * order.steps_per_epoch
        self.positions = local_positions(config.batch_size, mesh)

    def on_host(self, start_step: int, num_steps: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of the batches of the steps after `start_step`."""
        config = self._config
        return training_batches(
            self._source,
            self.order,
            crop=Crop(config.crop.size, tuple(config.crop.scale), tuple(config.crop.aspect_ratio)),
            channels=config.dataset.num_channels,
            positions=self.positions,
            num_steps=num_steps,
            start_step=start_step,
            skipped=self._skipped,
            num_threads=config.num_decode_threads,
        )

    def on_devices(self, start_step: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yields the global batches and their sample indices, transferred ahead of their use."""
        size, mesh = self._config.batch_size, self._mesh
        moving = (
            (
                to_devices(batch["images"], size, mesh),
                to_devices(batch["sample_index"], size, mesh),
            )
            for batch in self.on_host(start_step, self.num_steps)
        )
        queue = collections.deque(itertools.islice(moving, _BATCHES_AHEAD))
        while queue:
            yield queue.popleft()
            queue.extend(itertools.islice(moving, 1))


def check_same_images(workdir: epath.Path, source: Source, *, resuming: bool) -> None:
    """Checks that a run resumes with the images that it began with; a new run records them.

    Their fingerprint is in images.json. A run of an earlier version, which has no such file,
    resumes and gets one.

    Args:
      workdir: Workdir of the run.
      source: The images.
      resuming: Whether the run has a checkpoint.

    Raises:
      UserError: Images were renamed, replaced, added or removed, or the file cannot be read.
    """
    path = workdir / "images.json"
    fingerprint = source.fingerprint(times=False)
    if resuming and path.exists():
        try:
            same = read_json(path)["fingerprint"] == fingerprint
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {path}: {error!r}; remove it to resume") from error
        if not same:
            raise UserError(
                f"the images of {source.name} have changed since the run in {workdir} began: "
                "files were renamed, replaced, added or removed. Put them back and rerun the "
                "command, or train on the new images with another --workdir; to resume this run "
                f"with the images as they are now, remove {path}"
            )
        return
    write_json(path, {"source": source.name, "images": len(source), "fingerprint": fingerprint})
