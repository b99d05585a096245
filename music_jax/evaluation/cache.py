"""Caches arrays on disk that take long to compute; the cache may be deleted at any time."""

import hashlib
import json
import logging
import math
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from music_jax.distributed.mesh import is_main_process
from music_jax.workdir.files import bucket_errors, check_is_file, new_file, read_npy

_logger = logging.getLogger(__name__)

_FORMAT = 2
_OVERHEAD = 1 << 16  # bytes of a file besides its arrays, at most


class Expected(NamedTuple):
    """The arrays that are accepted from the cache, whose files anyone may have written.

    Attributes:
      shape: Shape with the largest number of rows.
      dtype: Type.
      values: Range of integers; None for any values.
    """

    shape: tuple[int, ...]
    dtype: Any
    values: range | None = None

    @property
    def max_bytes(self) -> int:
        """Size of the largest such array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def check(self, array: np.ndarray) -> None:
        """Raises ValueError unless the array is accepted, whatever the number of its rows."""
        if array.dtype != self.dtype or array.ndim == 0 or array.shape[1:] != self.shape[1:]:
            raise ValueError(f"expected {self.dtype} {self.shape}; got {array.dtype} {array.shape}")
        if self.values is None or not array.size:
            return
        if array.min() < self.values.start or array.max() >= self.values.stop:
            raise ValueError(f"expected integers in {self.values}")


def cached_arrays(
    directory: epath.Path,
    name: str,
    key: dict[str, Any],
    compute: Callable[[], dict[str, np.ndarray]],
    *,
    expected: dict[str, Expected],
) -> dict[str, np.ndarray]:
    """Returns arrays from the cache, or computes and caches them.

    Arrays of damaged files are computed again. If a file cannot be written, a warning is logged.

    Args:
      directory: Directory of the cache, created when needed.
      name: First part of the file's name, for readability.
      key: Everything that the arrays depend on, as JSON values.
      compute: Function that returns the arrays, called by all processes of a run or by none.
      expected: Accepted arrays, by name; all of them have the same number of rows.
    """
    text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
    path = directory / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.npz"
    arrays = _read(path, expected)
    found = arrays is not None
    if jax.process_count() > 1:
        found = bool(np.all(multihost_utils.process_allgather(np.asarray(found))))
    if found and arrays is not None:
        return arrays
    arrays = compute()
    if is_main_process():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with new_file(path) as file:
                np.savez(file, allow_pickle=False, **arrays)
        except OSError as error:
            _logger.warning(f"features are not cached: {error}")
    return arrays


def _read(path: epath.Path, expected: dict[str, Expected]) -> dict[str, np.ndarray] | None:
    """Reads a file array by array, so that only one copy is in memory; its CRCs are verified."""
    if not path.exists():
        return None
    try:
        check_is_file(path)
        if path.stat().length > sum(like.max_bytes for like in expected.values()) + _OVERHEAD:
            raise ValueError("the file is larger than expected")
        arrays = {}
        with bucket_errors(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for name, like in expected.items():
                with archive.open(f"{name}.npy") as member:
                    arrays[name] = read_npy(member, max_bytes=like.max_bytes)
                like.check(arrays[name])
        if len({len(array) for array in arrays.values()}) > 1:
            raise ValueError("the arrays differ in their number of rows")
        return arrays
    except Exception as error:  # zipfile raises many kinds
        _logger.warning(f"the cached features {path} are damaged and computed again: {error}")
        return None
