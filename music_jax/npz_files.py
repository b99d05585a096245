"""Reading .npz files that anyone may have written: they are arrays, or a `ValueError`."""

import pathlib

import numpy as np
from etils import epath


def read_npz(path: pathlib.Path | epath.Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, by name.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no .npz file, or damaged.
    """
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except OSError:
            raise
        except Exception as error:  # zipfile, zlib and NumPy have many
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"it is no whole .npz file: {reason}") from error
