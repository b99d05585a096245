"""What is seen of a training while it runs: metrics.jsonl, the progress bar and the writers."""

import collections
import time

import numpy as np
from etils import epath
from ml_collections import config_dict

from music_jax.distributed import progress
from music_jax.train import guards
from music_jax.train.input import TrainingInput
from music_jax.train.writers import Writers
from music_jax.workdir.logs import MetricsLog


class Log:
    """Logs the steps after one of them."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        directory: epath.Path,
        training: TrainingInput,
        writers: Writers,
        start_step: int,
    ):
        """Takes out what was logged of later steps.

        Args:
          config: of the run.
          directory: the workdir.
          training: says how long it is.
          writers: see `train.writers`.
          start_step: the step that the training goes on from.

        Raises:
          UserError: a writer that was asked for cannot be used.
        """
        self._steps_per_epoch = training.order.steps_per_epoch
        self._batch_size = config.batch_size
        self._writers = writers
        writers.start(start_step)
        self._file = MetricsLog(
            directory, start_step, ignore_failures=config.checkpoint.ignore_failed_saves
        )
        self._bar = progress.bar(
            training.num_steps * self._batch_size,
            unit="img",
            description="pre-training",
            done=start_step * self._batch_size,
        )
        self._step = start_step
        self._time: float | None = None

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._file.close()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Logs a step."""
        rate = self._images_per_second(step)
        record = {
            "step": step,
            "epoch": step / self._steps_per_epoch,
            **scalars,
            "images_per_second": rate,
        }
        self._file.write(record)
        known = {k: v for k, v in record.items() if k != "step" and v is not None}
        self._writers.scalars(step, known)
        self._bar.set_postfix(collections.OrderedDict(_shown(scalars)), refresh=False)
        self._bar.update(step * self._batch_size - self._bar.n)

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Shows pictures of a step, where there is anything to show them in."""
        self._writers.images(step, images)

    def flush(self) -> None:
        """Makes what was logged safe from a kill, in a bucket too."""
        self._file.flush(now=True)
        self._writers.flush()

    def _images_per_second(self, step: int) -> float | None:
        """Since it was last asked; the first answer, with compilation, is None."""
        now = time.monotonic()
        rate = None
        if self._time is not None and now > self._time:
            rate = (step - self._step) * self._batch_size / (now - self._time)
        self._step, self._time = step, now
        return rate


def _shown(scalars: dict[str, float]) -> dict[str, str]:
    """The loss first, then its terms, for the progress bar."""
    hidden = ("loss", "learning_rate", "grad_norm", *guards.STATISTICS)
    terms = {name: value for name, value in scalars.items() if name not in hidden}
    return {name: f"{value:.3f}" for name, value in ({"loss": scalars["loss"]} | terms).items()}
