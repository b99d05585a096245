"""Decoding on the host: the bytes of an image file to uint8 pixels.

simplejpeg decodes colour JPEGs as most are, OpenCV all else: JPEG (gray, CMYK, turned), PNG (8 and
16 bits, palette), WebP, BMP and the first frame of a GIF. Sixteen bits are cut to the upper eight;
transparency is dropped, so that the colour below it is seen; Exif orientation is applied.
"""

import cv2
import numpy as np
import simplejpeg

from music_jax.data.headers import Header, read_header
from music_jax.data.png import without_texts
from music_jax.errors import UndecodableError

# What cannot be decoded is reported by the caller, with the image's name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

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
) -> np.ndarray:
    """Decodes an image file.

    Args:
      encoded: the file's bytes.
      channels: 1 (gray) or 3 (RGB).
      header: what `read_header` gave, if it was called already.
      reduction: 1, or 2, 4 or 8 for a JPEG at that part of its size.
      quick: take about a tenth less time for most JPEGs, by libjpeg-turbo's fast cosine
        transform and without interpolating the colours: the mean difference is a grey level or
        two, of which one is common to all pixels (red and blue are darker).

    Returns:
      uint8 [height, width, channels]; of a JPEG, each side is that of the header divided by
      `reduction`, rounded up; others may be turned, or have another size than their header says.

    Raises:
      UndecodableError: the bytes are no whole image of a known format, or too large a one.
    """
    header = header or read_header(encoded)
    image = None
    if header.is_plain and channels == 3:
        image = _decode_plain(encoded, header, reduction, quick)
    if image is None:
        image = _decode_any(encoded, channels, reduction)
    if header.is_jpeg and image.shape[:2] != _reduced(header, reduction):
        raise UndecodableError(
            f"its header says {header.width} x {header.height} pixels, which are not what it holds"
        )
    return image


def _reduced(header: Header, reduction: int) -> tuple[int, int]:
    return -(-header.height // reduction), -(-header.width // reduction)


def _decode_plain(encoded: bytes, header: Header, reduction: int, quick: bool) -> np.ndarray | None:
    """A JPEG as most are, RGB; None if it is damaged, as OpenCV then decodes it, or refuses to."""
    height, width = _reduced(header, reduction)
    try:
        return simplejpeg.decode_jpeg(
            encoded,
            "RGB",
            fastdct=quick,
            fastupsample=quick,
            min_height=height,
            min_width=width,
            min_factor=reduction,
        )
    except ValueError:
        return None


def _decode_any(encoded: bytes, channels: int, reduction: int) -> np.ndarray:
    readable = np.frombuffer(without_texts(encoded), np.uint8)
    try:
        image = cv2.imdecode(readable, _FLAGS[channels, reduction])
    except cv2.error as error:
        raise UndecodableError(f"it cannot be decoded: {error.err}") from error
    if image is None:
        raise UndecodableError(f"its {len(encoded):,} bytes cannot be decoded")
    if channels == 1:
        return image[..., None]
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image) if reduction > 1 else image
