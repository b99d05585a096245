"""Arrays that take long to compute, kept below the workdir; deleting them loses nothing."""

import hashlib
import json
import logging
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from music_jax.distributed.mesh import is_main_process
from music_jax.workdir.files import (
    bucket_errors,
    check_is_file,
    new_file,
    read_json,
    read_npy,
    write_json,
)

_logger = logging.getLogger(__name__)

_INDEX = "index.json"
_FORMAT = 1


class Expected(NamedTuple):
    """What an array can be.

    Attributes:
      shape: Its shape, with the largest possible number of rows.
      dtype: Its type.
      values: Range of its integers; None for any values.
    """

    shape: tuple[int, ...]
    dtype: Any
    values: range | None = None

    @property
    def max_bytes(self) -> int:
        """Size of the largest such array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def allows(self, array: np.ndarray) -> bool:
        """Whether an array is one of these, apart from the number of its rows."""
        if array.dtype != self.dtype or array.ndim == 0 or array.shape[1:] != self.shape[1:]:
            return False
        if self.values is None or not array.size:
            return True
        return self.values.start <= array.min() and array.max() < self.values.stop


class ArrayCache:
    """Directories of .npy files, each named by what its arrays were computed from."""

    def __init__(self, directory: epath.Path):
        """Opens the cache; the directory is made when something is kept in it."""
        self._directory = directory

    def get(
        self,
        name: str,
        key: dict[str, Any],
        compute: Callable[[], dict[str, np.ndarray]],
        *,
        expected: dict[str, Expected],
    ) -> dict[str, np.ndarray]:
        """The arrays that were kept for a key, or else computes and keeps them.

        What is there but damaged is computed again, as is what cannot be read. Where the disk is
        full, nothing is kept and a line says so.

        Args:
          name: first part of the directory's name, for people.
          key: all that the arrays depend on, as JSON holds it.
          compute: what gives the arrays, called by all processes of a run or by none.
          expected: what `compute` can give, by name; all arrays have equally many rows.

        Returns:
          The arrays by name.
        """
        text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
        entry = self._directory / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        arrays = _read(entry, expected)
        if _all_processes(arrays is not None) and arrays is not None:
            return arrays
        arrays = compute()
        if is_main_process():
            try:
                _write(entry, json.loads(text), arrays)
            except OSError as error:
                _logger.info(f"features are not kept for the next time: {error}")
        return arrays


def _read(entry: epath.Path, expected: dict[str, Expected]) -> dict[str, np.ndarray] | None:
    if not (entry / _INDEX).exists():
        return None
    try:
        index = read_json(entry / _INDEX)
        found = {}
        for name, like in expected.items():
            check_is_file(entry / f"{name}.npy")
            path = entry / f"{name}.npy"
            with bucket_errors(path), path.open("rb") as file:
                array = read_npy(file, max_bytes=like.max_bytes)
            if _checksum(array) != index["crc32"][name]:
                raise ValueError(f"{name}.npy has changed")
            if not like.allows(array):
                raise ValueError(f"{name}.npy holds something else")
            found[name] = array
        if len({len(array) for array in found.values()}) > 1:
            raise ValueError("the arrays do not have as many rows as each other")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        _logger.info(f"features in {entry} are damaged and are computed again: {error}")
        return None


def _write(entry: epath.Path, key: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    if entry.exists():
        entry.rmtree()
    entry.mkdir(parents=True)
    for name, array in arrays.items():
        with new_file(entry / f"{name}.npy") as file:
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    checksums = {name: _checksum(array) for name, array in arrays.items()}
    # Written last: without it, nothing is there.
    write_json(entry / _INDEX, {"key": key, "crc32": checksums})


def _checksum(array: np.ndarray) -> int:
    described = f"{array.dtype.str}{array.shape}".encode()
    return zlib.crc32(content_bytes(array), zlib.crc32(described))


def content_bytes(array: np.ndarray) -> memoryview:
    """What an array holds, in C order, as bytes."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _all_processes(here: bool) -> bool:
    """Whether it is so on all processes."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.asarray(here))))
