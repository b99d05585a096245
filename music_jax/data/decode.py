"""Decodes image files on the host: JPEG, PNG, WebP, BMP, and the first frame of a GIF.

`read_header` checks the format and the size before anything is decoded, in loops that are bounded
for any input. simplejpeg decodes ordinary color JPEGs, OpenCV decodes everything else. The upper
eight of sixteen bits are kept, transparency is dropped without blending, and the Exif orientation
is applied.
"""

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from music_jax.errors import UndecodableError

EncodedImage = bytes | np.ndarray  # content of a file, or uint8 [height, width, channels]

# The caller reports images that cannot be decoded, by name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# 134 million pixels, 400 MB decoded. Pillow warns at 89 million and refuses 178 million.
MAX_PIXELS = 2**27

_MAX_JPEG_SEGMENTS = 4096
# Start-of-frame markers: 0xC0 to 0xCF except those of Huffman tables, extensions and arithmetic
# coding conditions.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset((0xC0, 0xC1, 0xC9))
_START_OF_SCAN, _END_OF_IMAGE, _RESTART_INTERVAL, _APP1 = 0xDA, 0xD9, 0xDD, 0xE1
_MAX_JPEG_HEIGHT = 65_500  # libjpeg's
_ROWS_PER_BLOCK = 16  # encoded together in most JPEGs
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
_FLAGS = {  # by channels and reduction
    (1, 1): cv2.IMREAD_GRAYSCALE,
    (1, 2): cv2.IMREAD_REDUCED_GRAYSCALE_2,
    (1, 4): cv2.IMREAD_REDUCED_GRAYSCALE_4,
    (1, 8): cv2.IMREAD_REDUCED_GRAYSCALE_8,
    (3, 1): cv2.IMREAD_COLOR_RGB,
    (3, 2): cv2.IMREAD_REDUCED_COLOR_2,  # these three give BGR
    (3, 4): cv2.IMREAD_REDUCED_COLOR_4,
    (3, 8): cv2.IMREAD_REDUCED_COLOR_8,
}


class Header(NamedTuple):
    """Size and kind of an image file.

    Attributes:
      height: Height in pixels; for a JPEG, after its Exif orientation is applied.
      width: Width likewise.
      is_jpeg: Whether the file can be decoded at 1/2, 1/4 or 1/8 of its size.
      is_plain: Whether it is a JPEG of eight bits and three components with orientation 1.
      orientation: Exif orientation of a JPEG, 1 to 8.
      height_at: Position of the height in a JPEG whose upper rows can be decoded alone: a plain one
        with a single scan and no restart markers. 0 in any other file.
    """

    height: int
    width: int
    is_jpeg: bool = False
    is_plain: bool = False
    orientation: int = 1
    height_at: int = 0


def use_one_thread() -> None:
    """Keeps OpenCV from starting threads of its own."""
    cv2.setNumThreads(0)


def read_header(encoded: EncodedImage) -> Header:
    """Reads the size of a JPEG, PNG, WebP, BMP or GIF file, or of an image that is an array.

    Raises:
      UndecodableError: The file has another format, is damaged, or has more than `MAX_PIXELS`.
    """
    try:
        header = Header(*encoded.shape[:2]) if isinstance(encoded, np.ndarray) else _parse(encoded)
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
    header: Header | None = None,
    reduction: int = 1,
    quick: bool = False,
    rows: int | None = None,
) -> np.ndarray:
    """Decodes an image file, or returns an image that is an array already.

    Args:
      encoded: Content of the file, or uint8 [height, width, channels].
      channels: 1 (gray) or 3 (RGB).
      header: Result of `read_header`, if it was called before.
      reduction: 1; or 2, 4 or 8 to decode a JPEG at that fraction of its size.
      quick: Whether to decode most JPEGs about a tenth faster, with libjpeg-turbo's fast cosine
        transform and without interpolation of the colors. The mean difference is one or two gray
        levels, of which one is common to all pixels (red and blue are darker).
      rows: Number of upper rows, before the reduction, that are needed; by default all. With
        `quick` the rest is not decoded where that saves time, and damage in it passes unnoticed.

    Returns:
      uint8 [height, width, channels]. The sides of a JPEG are those of the header divided by
      `reduction`, rounded up, unless lower rows are not decoded. Other formats may be rotated, or
      differ in size from their header.

    Raises:
      UndecodableError: The file is damaged, too large, or of an unknown format.
    """
    header = header or read_header(encoded)
    if isinstance(encoded, np.ndarray):
        if encoded.shape[2] != channels:
            raise UndecodableError(f"it has {encoded.shape[2]} channels, not {channels}")
        return encoded
    size = _reduced(header.height, reduction), _reduced(header.width, reduction)
    image = None
    if header.is_plain and channels == 3:
        if quick and rows is not None and header.height_at:
            image = _decode_upper(encoded, header, rows, reduction)
            if image is not None:
                return image
        image = np.empty((*size, 3), np.uint8)
        try:
            _decode_plain(encoded, image, reduction, quick)
        except ValueError as error:
            if not _is_decoded(encoded, header, str(error)):
                image = None  # OpenCV decodes it or refuses it
    if image is None:
        image = _decode_any(encoded, channels, header, reduction)
    if header.is_jpeg and image.shape[:2] != size:
        raise UndecodableError(
            f"its header says {header.width} x {header.height} pixels, but its data differ"
        )
    return image


def _reduced(side: int, reduction: int) -> int:
    return -(-side // reduction)


def _decode_upper(encoded: bytes, header: Header, rows: int, reduction: int) -> np.ndarray | None:
    """Decodes the upper rows of a plain JPEG; returns None if all are needed or one is damaged.

    The header is changed to a smaller height, so that the decoder skips the rest of the file.
    """
    rows = _ROWS_PER_BLOCK * -(-rows // _ROWS_PER_BLOCK)
    if rows >= header.height:
        return None
    at = header.height_at
    encoded = b"".join((encoded[:at], _UINT16.pack(rows), encoded[at + _UINT16.size :]))
    image = np.empty((_reduced(rows, reduction), _reduced(header.width, reduction), 3), np.uint8)
    try:
        _decode_plain(encoded, image, reduction, True)
    except ValueError as error:
        if not str(error).endswith(_DAMAGED_END):
            return None
    return image


def _decode_plain(encoded: bytes, out: np.ndarray, reduction: int, quick: bool) -> None:
    """Decodes a plain JPEG to RGB; raises ValueError if anything in it is damaged."""
    simplejpeg.decode_jpeg(
        encoded,
        "RGB",
        fastdct=quick,
        fastupsample=quick,
        min_height=out.shape[0],
        min_width=out.shape[1],
        min_factor=reduction,
        buffer=out,
    )


def _is_decoded(encoded: bytes, header: Header, error: str) -> bool:
    """Returns whether libjpeg-turbo decoded all rows and only warned of damaged data.

    OpenCV gives the same pixels, but prints the warning on standard error at every read. Files that
    OpenCV may refuse are left to it: those that are cut off, or may be so between two scans.
    """
    if not (error.startswith("Corrupt JPEG data: ") and encoded.endswith(b"\xff\xd9")):
        return False
    if not (header.height_at or error.endswith(_DAMAGED_END)):
        return False
    try:  # a problem before the data is reported without decoding them
        return simplejpeg.decode_jpeg_header(encoded)[:2] == (header.height, header.width)
    except ValueError:
        return False


def _decode_any(encoded: bytes, channels: int, header: Header, reduction: int) -> np.ndarray:
    flags = _FLAGS[channels, reduction]
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
    if channels == 1:
        return image[..., None]
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image) if reduction > 1 else image


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
        raise UndecodableError("it is no JPEG, PNG, WebP, BMP or GIF file")
    return Header(height, width)


def _webp_size(encoded: bytes) -> tuple[int, int]:
    if len(encoded) < 30:
        raise UndecodableError("its header is cut off")
    kind = encoded[12:16]
    if kind == b"VP8X":  # three bytes for each side minus one
        width, height = (int.from_bytes(encoded[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", encoded, 26))
    elif kind == b"VP8L":  # fourteen bits for each side minus one
        (bits,) = struct.unpack_from("<I", encoded, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        raise UndecodableError("its header gives no size")
    return width, height


def _parse_jpeg(encoded: bytes) -> Header:
    at, frame, frame_at, exif, has_restarts = 2, None, 0, [], False
    for _ in range(_MAX_JPEG_SEGMENTS):
        marker, at = _next_segment(encoded, at)
        if marker in (None, _START_OF_SCAN, _END_OF_IMAGE):
            break
        (length,) = _UINT16.unpack_from(encoded, at)
        if marker in _START_OF_FRAME and frame is None:
            frame, frame_at = marker, at
        elif marker == _APP1 and encoded[at + 2 : at + 8] == _EXIF:
            exif.append(encoded[at + 8 : at + length])  # more than 64 kB take several segments
        has_restarts |= marker == _RESTART_INTERVAL
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
    orientation = _orientation(b"".join(exif))
    if orientation >= 5:
        height, width = width, height
    is_plain = (bits, components, orientation) == (8, 3, 1)
    is_divisible = is_plain and has_one_scan and not has_restarts and height <= _MAX_JPEG_HEIGHT
    return Header(height, width, True, is_plain, orientation, frame_at + 3 if is_divisible else 0)


def _next_segment(encoded: bytes, at: int) -> tuple[int | None, int]:
    """Returns the next marker, or None at the end, and the position of its segment's length."""
    found = _MARKER.search(encoded, at)  # decoders skip bytes between segments
    return (None, at) if found is None else (found[1][0], found.end())


def _check_scans(encoded: bytes, at: int, pixels: int) -> None:
    """Raises if a JPEG has so many scans that decoding it would take minutes."""
    most = min(_MAX_SCANS, max(1, _MAX_PIXELS_OF_ALL_SCANS // max(pixels, 1)))
    if encoded.count(b"\xff\xda", at) <= most:
        return
    scans = 0
    for _ in range(_MAX_JPEG_SEGMENTS):
        marker, at = _next_segment(encoded, at)
        if marker in (None, _END_OF_IMAGE):  # scans that follow the image are not decoded
            return
        scans += marker == _START_OF_SCAN
        if scans > most:
            break
        at += _UINT16.unpack_from(encoded, at)[0]
    raise UndecodableError(f"it has more than the supported {most} scans")


def _orientation(exif: bytes) -> int:
    """Reads the orientation, 1 to 8, from the first directory of Exif data, as Pillow does.

    Missing or damaged data give 1, without the warnings that Pillow prints.
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
