"""Decodes image files on the host.

The formats are JPEG, PNG, WebP, BMP, the first frame of a GIF, TIFF and .npy.

`read_header` checks the format and the size before anything is decoded, in loops that are bounded
for any input. simplejpeg decodes ordinary color JPEGs, OpenCV decodes everything else. The upper
eight of sixteen bits are kept for pixels of eight bits, transparency is dropped without blending
unless four channels are asked for, and the Exif orientation is applied.
"""

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import DTypeLike

from music_jax.data.arrays import array_size, is_array_file, read_array, to_pixels
from music_jax.errors import UndecodableError, UnexpectedPixelsError

# Content of a file, or numbers [height, width] or [height, width, channels].
EncodedImage = bytes | np.ndarray

# The callers report images that cannot be decoded by name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# 134 million pixels, 400 MB decoded. Pillow warns at 89 million and refuses 178 million.
MAX_PIXELS = 2**27

_MAX_JPEG_SEGMENTS = 4096
# Start-of-frame markers: 0xC0 to 0xCF except those of Huffman tables, extensions and arithmetic
# coding conditions.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset((0xC0, 0xC1, 0xC9))
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
# A marker that a segment follows: all but stuffed and fill bytes, TEM, RST0 to RST7 and SOI.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_UINT16 = struct.Struct(">H")
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112  # the tag's number in Exif
_INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # Exif's types: short and long, unsigned and signed

# Message of libjpeg-turbo if the image is complete but extra bytes precede its end marker. It
# reports the first problem, so everything before that is intact.
_DAMAGED_END = " extraneous bytes before marker 0xd9"

# A decoder passes over all pixels once per scan, however few bytes the scan has. Encoders write
# about ten scans. Decoding this many pixels takes two seconds.
_MAX_SCANS = 100
_MAX_PIXELS_OF_ALL_SCANS = 2**31

_PNG = b"\x89PNG\r\n\x1a\n"
_COMPRESSED_TEXTS = (b"zTXt", b"iTXt")
_MAX_PNG_CHUNKS = 2**16

_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by Exif orientation
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


class Header(NamedTuple):
    """Size and kind of an image file.

    Attributes:
      height: Height in pixels; for a JPEG, after its Exif orientation is applied.
      width: Width likewise.
      is_jpeg: Whether the file can be decoded at 1/2, 1/4 or 1/8 of its size.
      is_plain: Whether it is a JPEG of eight bits and three components with orientation 1.
      orientation: Exif orientation of a JPEG, 1 to 8.
      has_one_scan: Whether it is a sequential JPEG with all components in one scan.
    """

    height: int
    width: int
    is_jpeg: bool = False
    is_plain: bool = False
    orientation: int = 1
    has_one_scan: bool = False


def read_header(encoded: EncodedImage, channels: int | None = None) -> Header:
    """Reads the size of an image file, or of an image that is an array.

    Args:
      encoded: Content of the file, or the array.
      channels: Expected number of channels, if known; see `music_jax.data.arrays.read_array`.

    Raises:
      UndecodableError: The file has another format, is damaged, or has more than `MAX_PIXELS`.
    """
    try:
        if isinstance(encoded, np.ndarray):
            header = Header(*encoded.shape[:2])
        elif is_array_file(encoded):
            header = Header(*array_size(encoded, channels))
        else:
            header = _parse(encoded)
    except (struct.error, IndexError) as error:
        raise UndecodableError("its header is cut off") from error
    if header.height <= 0 or header.width <= 0:
        raise UndecodableError(f"its header says {header.width} x {header.height} pixels")
    if header.height * header.width > MAX_PIXELS:
        raise UndecodableError(
            f"its header says {header.width} x {header.height} pixels, more than the supported "
            f"{MAX_PIXELS:,}"
        )
    return header


def largest_reduction(header: Header, factor: float) -> int:
    """Returns the `reduction` at which to decode an image that will be shrunk by `factor`.

    A reduced JPEG is decoded in a fraction of the time, and still has at least the pixels wanted.
    """
    if not header.is_jpeg:
        return 1
    return next(n for n in (8, 4, 2, 1) if n <= max(factor, 1))


def decode(
    encoded: EncodedImage,
    channels: int,
    *,
    dtype: DTypeLike = np.uint8,
    header: Header | None = None,
    reduction: int = 1,
    quick: bool = False,
) -> np.ndarray:
    """Decodes an image file, or checks and converts an image that is an array already.

    Args:
      encoded: Content of the file, or numbers [height, width] or [height, width, channels].
      channels: Number of channels; files of 1 (gray) and 3 (RGB) are converted to one another.
      dtype: Type of the result: uint8, uint16 or float32.
      header: Result of `read_header`, if it was called before.
      reduction: 1; or 2, 4 or 8 to decode a JPEG at that fraction of its size.
      quick: Whether to decode most JPEGs about a tenth faster, with libjpeg-turbo's fast cosine
        transform and without interpolation of the colors. The mean difference is one or two gray
        levels, of which one is common to all pixels (red and blue are darker).

    Returns:
      Image [height, width, channels]. The sides of a JPEG are those of the header divided by
      `reduction`, rounded up. Other formats may be rotated, or differ in size from their header.

    Raises:
      UndecodableError: The file is damaged, too large, or of an unknown format; or the image has
        another number of channels or type (`UnexpectedPixelsError`), or values that are not finite.
    """
    header = header or read_header(encoded, channels)
    if isinstance(encoded, np.ndarray):
        return to_pixels(encoded, channels, dtype)
    if is_array_file(encoded):
        return to_pixels(read_array(encoded, channels), channels, dtype)
    if header.is_jpeg and channels not in (1, 3):
        raise UnexpectedPixelsError(f"it is a JPEG, which has 1 or 3 channels, not {channels}")
    size = -(-header.height // reduction), -(-header.width // reduction)
    image = None
    if header.is_plain and channels == 3:
        image = _decode_plain(encoded, header, size, reduction, quick)
    if image is None:
        image = _decode_any(encoded, channels, np.dtype(dtype), header, reduction)
    if header.is_jpeg and image.shape[:2] != size:
        raise UndecodableError(
            f"its header says {header.width} x {header.height} pixels, but its data differ"
        )
    return to_pixels(image, channels, dtype)


def _decode_plain(
    encoded: bytes, header: Header, size: tuple[int, int], reduction: int, quick: bool
) -> np.ndarray | None:
    """Decodes a plain JPEG; returns None for damage that is left to OpenCV to decode or refuse.

    If libjpeg-turbo decodes all rows and only warns, OpenCV gives the same pixels but prints the
    warning on standard error at every read. Files that OpenCV may refuse are left to it: those that
    are cut off, or may be so between two scans.
    """
    image = np.empty((*size, 3), np.uint8)
    for strict in (True, False):
        try:
            simplejpeg.decode_jpeg(
                encoded,
                "RGB",
                fastdct=quick,
                fastupsample=quick,
                min_height=size[0],
                min_width=size[1],
                min_factor=reduction,
                buffer=image,
                strict=strict,
            )
            return image
        except ValueError as error:
            is_warning = str(error).startswith("Corrupt JPEG data: ")
            is_complete = header.has_one_scan or str(error).endswith(_DAMAGED_END)
            if not (is_warning and is_complete and encoded.endswith(b"\xff\xd9")):
                break
    return None


def _decode_any(
    encoded: bytes, channels: int, dtype: np.dtype, header: Header, reduction: int
) -> np.ndarray:
    flags = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}.get(channels, cv2.IMREAD_UNCHANGED)
    if dtype != np.uint8:
        flags |= cv2.IMREAD_ANYDEPTH
    if reduction > 1:  # IMREAD_REDUCED_COLOR_2 and so on
        flags |= 8 * reduction
    if header.is_jpeg:  # rotated below: OpenCV and Pillow differ on unusual Exif data
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(without_texts(encoded), np.uint8), flags)
    except cv2.error as error:
        raise UndecodableError(f"it cannot be decoded: {error.err}") from error
    if image is None:
        raise UndecodableError(f"its {len(encoded):,} bytes cannot be decoded")
    if header.orientation > 1:
        image = _TURNS[header.orientation](image)
    if image.ndim == 2:
        return image[..., None]
    code = cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA
    return cv2.cvtColor(image, code, dst=image)


def without_texts(encoded: bytes) -> bytes:
    """Returns a PNG file without compressed texts, and any other file unchanged.

    libpng would decompress each of a thousand such texts to up to eight megabytes.

    Raises:
      UndecodableError: The file has too many chunks.
    """
    if not encoded.startswith(_PNG) or not any(kind in encoded for kind in _COMPRESSED_TEXTS):
        return encoded
    kept, at = [_PNG], len(_PNG)
    for _ in range(_MAX_PNG_CHUNKS):
        if at + 8 > len(encoded):
            return b"".join(kept)
        length, kind = struct.unpack_from(">I4s", encoded, at)
        if kind not in _COMPRESSED_TEXTS:
            kept.append(encoded[at : at + 12 + length])
        at += 12 + length
    raise UndecodableError(f"it has more than the supported {_MAX_PNG_CHUNKS:,} chunks")


def _parse(encoded: bytes) -> Header:
    if encoded.startswith(b"\xff\xd8\xff"):
        return _parse_jpeg(encoded)
    if encoded.startswith(_PNG):
        width, height = struct.unpack_from(">II", encoded, 16)
    elif encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        width, height = _webp_size(encoded)
    elif encoded.startswith(b"BM"):
        has_short_header = struct.unpack_from("<I", encoded, 14)[0] == 12
        width, height = struct.unpack_from("<HH" if has_short_header else "<ii", encoded, 18)
        height = abs(height)  # negative if the rows are stored from top to bottom
    elif encoded.startswith(b"GIF8"):
        width, height = struct.unpack_from("<HH", encoded, 6)
    else:
        raise UndecodableError("it is no JPEG, PNG, WebP, BMP, GIF, TIFF or .npy file")
    return Header(height, width)


def _webp_size(encoded: bytes) -> tuple[int, int]:
    match encoded[12:16]:
        case b"VP8X":  # three bytes for each side minus one
            bits = int.from_bytes(encoded[24:30], "little")
            return (bits & 0xFFFFFF) + 1, (bits >> 24) + 1
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", encoded, 26)
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L":  # fourteen bits for each side minus one
            (bits,) = struct.unpack_from("<I", encoded, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise UndecodableError("its header gives no size")


def _parse_jpeg(encoded: bytes) -> Header:
    at, frame, frame_at, exif = 2, None, 0, bytearray()
    for _ in range(_MAX_JPEG_SEGMENTS):
        marker, at = _next_segment(encoded, at)
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            break
        (length,) = _UINT16.unpack_from(encoded, at)
        if marker in _START_OF_FRAME and frame is None:
            frame, frame_at = marker, at
        elif marker == _APP1 and encoded[at + 2 : at + 8] == _EXIF:
            exif += encoded[at + 8 : at + length]  # more than 64 kB take several segments
        at += length
    if frame is None:
        raise UndecodableError("its header gives no size")
    length, bits, height, width, components = struct.unpack_from(">HBHHB", encoded, frame_at)
    # Decoders stop after a first scan of all components of a sequential JPEG. Nearly all files are
    # of this kind; a search for further scans would take 7 % of the time of decoding.
    has_one_scan = (
        frame in _SEQUENTIAL and marker == _START_OF_SCAN and encoded[at + 2] == components
    )
    if not has_one_scan:
        _check_scans(encoded, frame_at + length, height * width)
    orientation = _orientation(bytes(exif))
    if orientation >= 5:
        height, width = width, height
    is_plain = (bits, components, orientation) == (8, 3, 1)
    return Header(height, width, True, is_plain, orientation, has_one_scan)


def _next_segment(encoded: bytes, at: int) -> tuple[int, int]:
    """Returns the next marker and the position of its segment's length."""
    found = _MARKER.search(encoded, at)  # decoders skip bytes between segments
    return (_END_OF_IMAGE, at) if found is None else (found[1][0], found.end())


def _check_scans(encoded: bytes, at: int, pixels: int) -> None:
    """Raises if a JPEG has so many scans that decoding it would take minutes."""
    most = min(_MAX_SCANS, max(1, _MAX_PIXELS_OF_ALL_SCANS // max(pixels, 1)))
    if encoded.count(b"\xff\xda", at) <= most:
        return
    scans = 0
    for _ in range(_MAX_JPEG_SEGMENTS):
        marker, at = _next_segment(encoded, at)
        if marker == _END_OF_IMAGE:  # scans that follow the image are not decoded
            return
        scans += marker == _START_OF_SCAN
        if scans > most:
            break
        at += _UINT16.unpack_from(encoded, at)[0]
    raise UndecodableError(f"it has more than the supported {most} scans")


def _orientation(exif: bytes) -> int:
    """Reads the orientation, 1 to 8, from the first directory of Exif data, as Pillow does.

    Missing or damaged data give 1.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHI4s", exif, entry)
            if tag == _ORIENTATION:
                if values != 1 or kind not in _INTEGERS:
                    return 1
                (found,) = struct.unpack_from(order + _INTEGERS[kind], value)
                return found if found in _TURNS else 1
    except struct.error:
        pass
    return 1
