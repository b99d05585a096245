"""Reads arrays from files that anyone may have written: numbers, or a `ValueError`."""

import io
import math
import pathlib
import zipfile
from typing import IO

import numpy as np
from etils import epath

from music_jax.workdir.json_files import read_bytes

_MAX_BYTES = 1 << 26
_MAX_ARRAYS = 64
_READ_AT_ONCE = 1 << 24  # bytes
_ENTRY = b"PK\x01\x02"  # begins what a zip file's directory says of one of its files


def read_npz(
    path: pathlib.Path | epath.Path, *, max_bytes: int = _MAX_BYTES
) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file as `np.savez` writes it, by name.

    Nothing in it is compressed, so that the arrays take no more memory than the file does.

    Args:
      path: File on a disk or in a bucket.
      max_bytes: Size from which on the file is refused.

    Raises:
      OSError: it cannot be read, is larger, or is no file but a pipe or a device.
      ValueError: it is no .npz file, or damaged.
    """
    content = read_bytes(path, max_bytes=max_bytes)
    try:
        if content.count(_ENTRY) > _MAX_ARRAYS:
            raise ValueError(f"it has more than {_MAX_ARRAYS} arrays")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("its arrays are compressed")
            if sum(entry.file_size for entry in entries) > len(content):
                raise ValueError("its arrays are larger than the file")
            arrays = {}
            for entry in entries:
                with archive.open(entry) as file:
                    name = entry.filename.removesuffix(".npy")
                    arrays[name] = read_npy(file, max_bytes=entry.file_size)
            return arrays
    except Exception as error:  # zipfile and NumPy have many
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"it is no whole .npz file: {reason}") from error


def read_npy(file: IO[bytes], *, max_bytes: int) -> np.ndarray:
    """Reads an array of numbers from an .npy file.

    Args:
      file: File, open for binary reading.
      max_bytes: Size of the array from which on it is refused, before memory is taken for it.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no .npy file, damaged, larger, or holds no numbers.
    """
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its header is of another version than that of arrays of numbers")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except OSError:
        raise
    except Exception as error:  # it is parsed as Python's literals are: SyntaxError, MemoryError
        raise ValueError(f"it is no whole .npy file: {' '.join(str(error).split())}") from error
    size = math.prod(shape) * dtype.itemsize
    if dtype.kind not in "biuf" or not dtype.isnative or min(shape, default=0) < 0:
        raise ValueError("it is no array of numbers")
    if size > max_bytes:
        raise ValueError(f"its array of {size:,} bytes is larger than the {max_bytes:,} expected")
    array = np.empty(shape, dtype, order="F" if fortran else "C")
    if size:
        left = array.reshape(-1, order="A").view(np.uint8)
        while len(left):
            part = file.read(min(len(left), _READ_AT_ONCE))  # a bucket's files have no readinto
            if not part:
                raise ValueError("it ends early")
            left[: len(part)] = np.frombuffer(part, np.uint8)
            left = left[len(part) :]
    return array
