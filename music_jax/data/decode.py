"""Decoding on the host: the bytes of an image file to uint8 pixels.

simplejpeg decodes color JPEGs as most are, OpenCV all else: JPEG (gray, CMYK, turned), PNG (8 and
16 bits, palette), WebP, BMP and the first frame of a GIF. Sixteen bits are cut to the upper eight;
transparency is dropped, so that the color below it is seen; Exif orientation is applied.
"""

import re
import struct
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg

from music_jax.data.headers import Header, read_header
from music_jax.data.png import without_texts
from music_jax.errors import UndecodableError

# What cannot be decoded is reported by the caller, with the image's name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# Of JPEGs, which `headers` knows how to turn and for which it and OpenCV do not always agree.
_NOT_TURNED = cv2.IMREAD_IGNORE_ORIENTATION
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}

_FLAGS = {
    (1, 1): cv2.IMREAD_GRAYSCALE,
    (1, 2): cv2.IMREAD_REDUCED_GRAYSCALE_2,
    (1, 4): cv2.IMREAD_REDUCED_GRAYSCALE_4,
    (1, 8): cv2.IMREAD_REDUCED_GRAYSCALE_8,
    (3, 1): cv2.IMREAD_COLOR_RGB,
    (3, 2): cv2.IMREAD_REDUCED_COLOR_2,  # these give BGR
    (3, 4): cv2.IMREAD_REDUCED_COLOR_4,
    (3, 8): cv2.IMREAD_REDUCED_COLOR_8,
}

# What libjpeg-turbo says where an image is whole, but its file goes on before it ends. It tells the
# first thing that it found wrong, so that it found nothing before this.
_MORE_FOLLOWS = re.compile(r"\d+ extraneous bytes before marker 0xd9$")
_DAMAGED_DATA = "Corrupt JPEG data: "
_END = b"\xff\xd9"
_HEIGHT = struct.Struct(">H")
_ROWS_OF_BLOCKS = 16  # that are encoded together, in most JPEGs


def use_one_thread() -> None:
    """Keeps OpenCV from starting threads of its own beside those that call it."""
    cv2.setNumThreads(0)


def largest_reduction(header: Header, factor: float) -> int:
    """By how much an image may be decoded smaller where it is to be shrunk by `factor`.

    A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the time. It then still
    has at least the pixels that are wanted, and is shrunk the rest of the way.

    Returns:
      1, 2, 4 or 8.
    """
    if not header.is_jpeg:
        return 1
    return next(n for n in (8, 4, 2, 1) if n <= max(factor, 1))


def decode(
    encoded: bytes,
    channels: int,
    *,
    header: Header | None = None,
    reduction: int = 1,
    quick: bool = False,
    rows: int | None = None,
) -> np.ndarray:
    """Decodes an image file.

    Args:
      encoded: the file's bytes.
      channels: 1 (gray) or 3 (RGB).
      header: what `read_header` gave, if it was called already.
      reduction: 1, or 2, 4 or 8 for a JPEG at that part of its size.
      quick: take about a tenth less time for most JPEGs, by libjpeg-turbo's fast cosine
        transform and without interpolating the colors: the mean difference is a gray level or
        two, of which one is common to all pixels (red and blue are darker).
      rows: with `quick`, how many of the upper rows are needed, at least 1, of the image before it
        is reduced; by default all. Where it saves time, only these and some more are decoded. What
        the decoder would find wrong below them then passes unnoticed, as does damage in them that
        shows at the end of the data alone; a file that is cut off does not.

    Returns:
      uint8 [height, width, channels]; of a JPEG, each side is that of the header (but of the rows
      those that were decoded) divided by `reduction`, rounded up; others may be turned, or have
      another size than their header says.

    Raises:
      UndecodableError: the bytes are no whole image of a known format, or too large a one.
    """
    header = header or read_header(encoded)
    image = None
    if header.is_plain and channels == 3:
        if quick and rows is not None and header.height_at:
            image = _decode_upper(encoded, header, rows, reduction)
            if image is not None:
                return image
        image = _decode_plain(encoded, header, reduction, quick)
    if image is None:
        image = _decode_any(encoded, channels, header, reduction)
    if header.is_jpeg and image.shape[:2] != _reduced(header, reduction):
        raise UndecodableError(
            f"its header says {header.width} x {header.height} pixels, which are not what it holds"
        )
    return image


def _reduced(header: Header, reduction: int) -> tuple[int, int]:
    return -(-header.height // reduction), -(-header.width // reduction)


def _decode_upper(encoded: bytes, header: Header, rows: int, reduction: int) -> np.ndarray | None:
    """The upper rows of a plain JPEG, quickly; None if all are needed, or anything is found wrong.

    The decoder is told that the image is only so high, and passes over what is left of the file.
    """
    rows = -(-rows // _ROWS_OF_BLOCKS) * _ROWS_OF_BLOCKS
    if rows >= header.height:
        return None
    at = header.height_at
    encoded = b"".join((encoded[:at], _HEIGHT.pack(rows), encoded[at + _HEIGHT.size :]))
    header = header._replace(height=rows)
    upper = np.empty((*_reduced(header, reduction), 3), np.uint8)
    try:
        _decode_with_turbo(encoded, header, reduction, True, upper)
    except ValueError as error:
        if not _MORE_FOLLOWS.search(str(error)):
            return None
    return upper


def _decode_plain(encoded: bytes, header: Header, reduction: int, quick: bool) -> np.ndarray | None:
    """A JPEG as most are, RGB; None if it is damaged so that OpenCV may decode it or refuse to."""
    image = np.empty((*_reduced(header, reduction), 3), np.uint8)
    try:
        return _decode_with_turbo(encoded, header, reduction, quick, image)
    except ValueError as error:
        return image if _is_decoded(encoded, header, str(error)) else None


def _is_decoded(encoded: bytes, header: Header, error: str) -> bool:
    """Whether all rows were decoded in spite of an error, as OpenCV would do it.

    OpenCV would tell the damage on standard error, at every read. An error that ends decoding would
    be the one that is told: what is told of damaged data was passed over, up to the last row. What
    OpenCV refuses is left to it: a file that is cut off, or could be so between two scans.
    """
    if not (error.startswith(_DAMAGED_DATA) and encoded.endswith(_END)):
        return False
    if not (header.height_at or _MORE_FOLLOWS.search(error)):
        return False
    try:  # what is wrong before the data is told before they are looked at
        return simplejpeg.decode_jpeg_header(encoded)[:2] == (header.height, header.width)
    except ValueError:
        return False


def _decode_with_turbo(
    encoded: bytes, header: Header, reduction: int, quick: bool, out: np.ndarray | None = None
) -> np.ndarray:
    height, width = _reduced(header, reduction)
    return simplejpeg.decode_jpeg(
        encoded,
        "RGB",
        fastdct=quick,
        fastupsample=quick,
        min_height=height,
        min_width=width,
        min_factor=reduction,
        buffer=out,
    )


def _decode_any(encoded: bytes, channels: int, header: Header, reduction: int) -> np.ndarray:
    readable = np.frombuffer(without_texts(encoded), np.uint8)
    flags = _FLAGS[channels, reduction] | (_NOT_TURNED if header.is_jpeg else 0)
    try:
        image = cv2.imdecode(readable, flags)
    except cv2.error as error:
        raise UndecodableError(f"it cannot be decoded: {error.err}") from error
    if image is None:
        raise UndecodableError(f"its {len(encoded):,} bytes cannot be decoded")
    if header.orientation > 1:
        image = _TURNS[header.orientation](image)
    if channels == 1:
        return image[..., None]
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image) if reduction > 1 else image
