"""Reads images that are arrays of any number of channels: in records, .npy files and TIFF files.

An .npy file holds [height, width] or [height, width, channels]. A TIFF file holds the samples of a
pixel together or in planes, uncompressed or compressed by DEFLATE (or, with `imagecodecs`, by LZW).
If a pixel of its first page has one sample, all pages are the channels, unless they differ in shape
or type: then it is the first page.
"""

import functools
import io
import json
import logging
import math
import zlib
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import DTypeLike

from music_jax.errors import UndecodableError, UnexpectedPixelsError, raising

PIXEL_TYPES = ("uint8", "uint16", "float32")

_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_BYTES = 2**29  # decoded, as much as decode.MAX_PIXELS of four bytes
_MAX_PAGES = 2**12
_MAX_PARTS = 2**18  # strips or tiles of a page
_MAX_TILE_BYTES = 2**26
_NUMBERS = "biuf"  # kinds of dtypes
_DEFLATE = (8, 32946)  # numbers of compressions in TIFF
_COMPRESSIONS = (1, 5, *_DEFLATE)  # none, LZW
# Gray and RGB; others, such as palettes and gray with white as 0, are not values of channels.
_PHOTOMETRICS = (1, 2)


def is_array_file(encoded: bytes) -> bool:
    """Returns whether these are the bytes of an .npy or TIFF file."""
    return encoded.startswith((_NPY, *_TIFF))


def array_size(encoded: bytes, channels: int | None = None) -> tuple[int, int]:
    """Returns the height and width of an .npy or TIFF file, from its header.

    Args:
      encoded: Content of the file.
      channels: Expected number of channels, if known; see `read_array`.

    Raises:
      UndecodableError: The file is damaged, too large or of an unsupported kind.
    """
    if encoded.startswith(_NPY):
        height, width, *_ = _npy_header(encoded).shape
        return height, width
    with _open_tiff(encoded) as tiff:
        shape, axes = _layout(tiff, channels)
        return shape[axes[0]], shape[axes[1]]


def read_array(encoded: bytes, channels: int | None = None) -> np.ndarray:
    """Reads an .npy or TIFF file.

    Args:
      encoded: Content of the file.
      channels: Expected number of channels. A TIFF file that `tifffile` wrote from an array without
        naming its axes has them last if only the last axis has this length, else first.

    Returns:
      Array [height, width] or [height, width, channels] of the file's type.

    Raises:
      UndecodableError: The file is damaged, too large or of an unsupported kind.
    """
    if encoded.startswith(_NPY):
        header = _npy_header(encoded)
        count = math.prod(header.shape)
        values = np.frombuffer(encoded, header.dtype, count, header.offset)
        return values.reshape(header.shape, order=header.order)
    with _open_tiff(encoded) as tiff:
        shape, axes = _layout(tiff, channels)
        with raising(UndecodableError, "it cannot be decoded"):
            count = shape[0] if len(shape) > tiff.pages[0].ndim else 1
            pages = []
            for i in range(count):
                _check_parts(encoded, tiff.pages[i])
                pages.append(tiff.pages[i].asarray(maxworkers=1))
        image = np.stack(pages) if len(shape) > pages[0].ndim else pages[0]
        return image.transpose(axes)


def to_pixels(image: np.ndarray, channels: int, dtype: DTypeLike) -> np.ndarray:
    """Returns an image with the expected number of channels and type, checked.

    Types are converted where every value is kept. float32 takes all types of numbers, rounded.

    Args:
      image: Array [height, width] or [height, width, channels].
      channels: Expected number of channels; 1 and 3 are converted to one another.
      dtype: Expected type.

    Raises:
      UndecodableError: The image does not fit, or has values that are not finite.
    """
    image = image[..., None] if image.ndim == 2 else image
    dtype, found = np.dtype(dtype), image.shape[2]
    if found != channels and {found, channels} != {1, 3}:
        raise UnexpectedPixelsError(
            f"it has {found} channels, not {channels}; its [height, width, channels] are "
            f"{list(image.shape)}"
        )
    is_any = dtype == np.float32 and image.dtype.kind in _NUMBERS
    if not (is_any or np.can_cast(image.dtype, dtype)):
        raise UnexpectedPixelsError(f"its values are {image.dtype}, not {dtype}")
    with np.errstate(over="ignore"):  # becomes infinite
        image = np.ascontiguousarray(image, dtype)
    if dtype.kind == "f" and not np.isfinite(image).all():
        raise UndecodableError("it has values that are not finite")
    if (found, channels) == (1, 3):
        return np.repeat(image, 3, axis=2)
    if (found, channels) == (3, 1):
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    return image


class _NpyHeader(NamedTuple):
    """Header of an .npy file."""

    shape: tuple[int, ...]
    order: Any  # "C" or "F"
    dtype: np.dtype
    offset: int  # of the values, in bytes


def _npy_header(encoded: bytes) -> _NpyHeader:
    file = io.BytesIO(encoded)
    with raising(UndecodableError, "it is not a valid .npy file"):
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read(file)
    _check_shape(shape, dtype)
    if math.prod(shape) * dtype.itemsize > len(encoded) - file.tell():
        raise UndecodableError("it is cut off")
    return _NpyHeader(shape, "F" if is_fortran else "C", dtype, file.tell())


def _check_shape(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind not in _NUMBERS:
        raise UndecodableError(f"its values are of type {dtype}, not numbers")
    if len(shape) not in (2, 3) or not all(type(size) is int and size >= 0 for size in shape):
        raise UndecodableError(
            f"it has the shape {list(shape)}, not [height, width] or [height, width, channels]"
        )
    if (size := math.prod(shape) * dtype.itemsize) > _MAX_BYTES:
        raise UndecodableError(f"its {size:,} bytes of pixels are more than {_MAX_BYTES:,}")


@functools.cache
def _tifffile() -> Any:
    import tifffile

    logging.getLogger("tifffile").disabled = True  # The callers report such images by name.
    return tifffile


def _open_tiff(encoded: bytes) -> Any:
    tifffile = _tifffile()
    with raising(UndecodableError, "it is not a valid TIFF file"):
        return tifffile.TiffFile(io.BytesIO(encoded))


def _layout(tiff: Any, channels: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape of the first page, or of all of them, and its axes (y, x[, channels])."""
    with raising(UndecodableError, "it is not a valid TIFF file"):
        page = tiff.pages[0]
        shape, dtype, axes = page.shape, page.dtype, page.axes
        if page.photometric not in _PHOTOMETRICS:
            raise UndecodableError(
                "its pixels are not gray with black as 0, RGB or values of channels"
            )
        if page.bitspersample == 1:  # which would be 0 and 1, nearly black
            raise UndecodableError("its pixels have 1 bit; convert it to PNG")
        if page.compression not in _COMPRESSIONS:
            raise UndecodableError(f"its compression {page.compression} is not supported")
        if axes == "YX":
            count = _count_pages(tiff)
            shape = (count, *shape) if count > 1 else shape
            axes = "SYX" if count > 1 else axes
            if count > 1 and shape[0] != channels == shape[2] and _is_array(page, shape):
                axes = "YXS"
        if axes not in ("YX", "YXS", "SYX") or dtype is None:
            raise UndecodableError(f"its axes {axes} are not those of an image")
    _check_shape(shape, dtype)
    return shape, tuple(axes.index(axis) for axis in "YXS" if axis in axes)


def _count_pages(tiff: Any) -> int:
    """Returns the number of pages if all are like the first, else 1, as for a thumbnail."""
    first = tiff.pages[0]
    for i in range(1, _MAX_PAGES):
        try:
            page = tiff.pages[i]
        except IndexError:
            return i
        if (page.shape, page.dtype, page.compression, page.photometric) != (
            *(first.shape, first.dtype),
            *(first.compression, first.photometric),
        ):
            return 1
    raise UndecodableError(f"it has {_MAX_PAGES:,} pages or more")


def _is_array(page: Any, shape: tuple[int, ...]) -> bool:
    """Returns whether `tifffile` wrote an array of this shape, whose axes it was not told."""
    try:
        return tuple(json.loads(page.description)["shape"]) == shape
    except (ValueError, KeyError, TypeError):
        return False


def _check_parts(encoded: bytes, page: Any) -> None:
    """Raises if decoding the strips or tiles of a page would take too much memory or time."""
    size, counts = math.prod(page.chunks) * page.dtype.itemsize, page.databytecounts
    if size > max(page.nbytes, _MAX_TILE_BYTES):
        raise UndecodableError(f"it has tiles of {size:,} bytes")
    if not len(counts) == len(page.dataoffsets) == math.prod(page.chunked) <= _MAX_PARTS:
        raise UndecodableError(f"it has {len(counts):,} strips or tiles")
    if sum(counts) > len(encoded):
        raise UndecodableError("its strips or tiles are larger than the file")
    for offset, count in zip(page.dataoffsets, counts, strict=True):
        if page.compression not in _DEFLATE:
            break
        found = zlib.decompressobj().decompress(encoded[offset : offset + count], size + 1)
        if len(found) > size:
            raise UndecodableError("its data are larger than its header says")
