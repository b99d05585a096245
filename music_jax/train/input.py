"""The batches of a training, on the mesh."""

import collections
import itertools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax.data.crops import Crop
from music_jax.data.loader import TrainingOrder, training_batches
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.mesh import local_positions, to_devices

_BATCHES_AHEAD = 2  # on their way to the devices while a step runs


class TrainingInput:
    """What a training reads, from any step on."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        source: Source,
        order: TrainingOrder,
        mesh: Mesh,
        skipped: SkippedImages,
    ):
        """Names the images; nothing is read yet."""
        self._config, self._source, self._mesh, self._skipped = config, source, mesh, skipped
        self.order = order
        self.num_steps = config.num_epochs * order.steps_per_epoch
        self.positions = local_positions(config.batch_size, mesh)

    def on_host(self, start_step: int, num_steps: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's share of the batches of the steps after `start_step`, to `num_steps`."""
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
        """The global batches and their sample indices, the next on their way while one is used."""
        size = self._config.batch_size
        moving = (
            (
                to_devices(batch["images"], size, self._mesh),
                to_devices(batch["sample_index"], size, self._mesh),
            )
            for batch in self.on_host(start_step, self.num_steps)
        )
        queue = collections.deque(itertools.islice(moving, _BATCHES_AHEAD))
        while queue:
            yield queue.popleft()
            queue.extend(itertools.islice(moving, 1))
