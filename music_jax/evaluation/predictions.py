"""linear_eval.npz: what the linear probe said of each test image, beside linear_eval.json."""

import logging
from typing import NamedTuple

import numpy as np
from etils import epath

from music_jax.distributed.mesh import is_main_process
from music_jax.workdir.files import new_file, read_npz

_logger = logging.getLogger(__name__)

_FILE = "linear_eval.npz"


class Predictions(NamedTuple):
    """The probe's predictions.

    Attributes:
      indices: of the images in the test source, int64 [images].
      labels: what they are, int32 [images].
      predictions: what the probe says, int32 [images].
      step: of the checkpoint that was probed.
    """

    indices: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    step: int

    @property
    def top1(self) -> float:
        """Share of the images of which the probe says what they are."""
        return float(np.mean(self.labels == self.predictions))


def write_predictions(workdir: epath.Path, found: Predictions) -> None:
    """Writes the file; where it cannot be written, a line says so."""
    if not is_main_process():
        return
    path = workdir / _FILE
    try:
        with new_file(path) as file:
            np.savez(
                file,
                indices=found.indices.astype(np.int64),
                labels=found.labels.astype(np.int32),
                predictions=found.predictions.astype(np.int32),
                step=np.asarray(found.step, np.int64),
            )
    except OSError as error:
        _logger.info(f"the probe's predictions are not kept: {error}")


def read_predictions(workdir: epath.Path) -> Predictions | None:
    """Reads the file; None if it is not there.

    Raises:
      ValueError: it is damaged, or holds something else.
    """
    path = workdir / _FILE
    if not path.exists():
        return None
    try:
        arrays = read_npz(path)
        indices, labels, predictions = (arrays[n] for n in ("indices", "labels", "predictions"))
        step, images = arrays["step"], indices.shape
        shapes = (images, images, images, ())
        for array, shape in zip((indices, labels, predictions, step), shapes, strict=True):
            if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
                raise ValueError("its arrays are of other shapes or types")
        if len(images) != 1 or not images[0] or min(labels.min(), indices.min()) < 0:
            raise ValueError("it names no images, or images without a label")
        if predictions.min() < 0 or max(labels.max(), predictions.max()) >= 2**31:
            raise ValueError("its predictions are no labels")
        return Predictions(indices, labels, predictions, int(step))
    except (OSError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
