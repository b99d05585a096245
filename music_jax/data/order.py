"""Orders the images of a training, as a function of the seed alone.

The global sample index counts the images of a whole training: epoch `e` of a dataset of `n` images
has the indices `e * n` to `e * n + n - 1`. Grain's shuffle maps them to images, with a key made
from the seed and the epoch; the remainder that does not fill a batch is dropped.
"""

import dataclasses
import functools

import numpy as np
from grain.experimental import index_shuffle

# Saved with each checkpoint, so that a run that resumes in another order can log this. Version 1
# used `seed + epoch` as the key: a seed had the orders of the next seed, one epoch later.
ORDER_VERSION = 2


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


def evenly_spaced(size: int, count: int) -> list[int]:
    """Returns up to `count` different indices, evenly spaced from 0 to `size - 1`."""
    count = min(size, count)
    return np.unique(np.linspace(0, size - 1, count, dtype=np.int64)).tolist()
