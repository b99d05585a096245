"""What an image file says of itself in its first bytes: its size, before anything is decoded.

Only the formats named here are given to the decoder. Every loop is bounded, whatever the bytes.
"""

import re
import struct
from typing import NamedTuple

from music_jax.errors import UndecodableError

# 134 million pixels, 400 MB decoded; above, a file is refused unread. Pillow warns at 178 million.
MAX_PIXELS = 2**27

_MAX_JPEG_SEGMENTS = 4096
_MAX_JPEG_HEIGHT = 65_500  # libjpeg's
_MAX_EXIF_ENTRIES = 512
_ORIENTATION = 0x0112  # the tag's number in Exif
# Start-of-frame markers: 0xC0 to 0xCF without those of Huffman tables, extensions and arithmetic
# coding tables.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset((0xC0, 0xC1, 0xC9))
_START_OF_SCAN, _END_OF_IMAGE, _RESTART_INTERVAL, _APP1 = 0xDA, 0xD9, 0xDD, 0xE1
# The next marker that a segment follows: none of stuffed and fill bytes, TEM, RST0 to RST7, SOI.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_AT_ONCE = frozenset(b for n in range(256) if _MARKER.fullmatch(b := bytes((0xFF, n))))
_LENGTH, _FRAME = struct.Struct(">H"), struct.Struct(">BHHB")

# Decoders go over all pixels for each scan, however few bytes it has. What programs write has ten
# scans or so; as many pixels as this take two seconds,
# twice that if they are damaged, and so decoded by a second decoder.
_MAX_SCANS = 100
_MAX_PIXELS_OF_ALL_SCANS = 2**31


class Header(NamedTuple):
    """Size of an image as it is to be looked at, its Exif orientation applied.

    Attributes:
      height: in pixels.
      width: in pixels.
      is_jpeg: whether it can be decoded at a half, a quarter or an eighth of its size.
      is_plain: whether it is a JPEG as most are: eight bits, three components, not turned or
        mirrored by its Exif orientation.
      height_at: where a JPEG says its height in two bytes, if its upper rows can be decoded without
        those below: it is plain, with one scan, and says nothing of restart markers; else 0.
    """

    height: int
    width: int
    is_jpeg: bool = False
    is_plain: bool = False
    height_at: int = 0


def read_header(encoded: bytes) -> Header:
    """Reads the size of a JPEG, PNG, WebP, BMP or GIF file.

    The orientation is applied for JPEG only: the size of the others is not used to cut them.

    Raises:
      UndecodableError: it is none of these, is damaged, or has more than `MAX_PIXELS`.
    """
    try:
        header = _parse(encoded)
    except (struct.error, IndexError) as error:
        raise UndecodableError("its header is cut off") from error
    if header.height <= 0 or header.width <= 0:
        raise UndecodableError(f"its header says {header.width} x {header.height} pixels")
    if header.height * header.width > MAX_PIXELS:
        raise UndecodableError(
            f"its header says {header.width} x {header.height} pixels, more than the "
            f"{MAX_PIXELS:,} that are read"
        )
    return header


def _parse(encoded: bytes) -> Header:
    if encoded[:3] == b"\xff\xd8\xff":
        return _jpeg(encoded)
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        width, height = struct.unpack_from(">II", encoded, 16)
        return Header(height, width)
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return _webp(encoded)
    if encoded[:2] == b"BM":
        if struct.unpack_from("<I", encoded, 14)[0] == 12:
            width, height = struct.unpack_from("<HH", encoded, 18)
        else:
            width, height = struct.unpack_from("<ii", encoded, 18)
        return Header(abs(height), width)  # rows from the top down have a negative height
    if encoded[:4] == b"GIF8":
        width, height = struct.unpack_from("<HH", encoded, 6)
        return Header(height, width)
    raise UndecodableError("it is no JPEG, PNG, WebP, BMP or GIF file")


def _jpeg(encoded: bytes) -> Header:
    at, orientation, restarts = 2, 1, False
    for _ in range(_MAX_JPEG_SEGMENTS):
        marker, at = _next_segment(encoded, at)
        if marker in (None, _START_OF_SCAN, _END_OF_IMAGE):
            break
        (length,) = _LENGTH.unpack_from(encoded, at)
        if marker in _START_OF_FRAME:
            bits, height, width, components = _FRAME.unpack_from(encoded, at + 2)
            one_scan = False
            if marker in _SEQUENTIAL:
                one_scan, restarts_follow = _has_one_scan(encoded, at + length, components)
                restarts |= restarts_follow
            if not one_scan:
                _check_scans(encoded, at + length, height * width)
            if orientation >= 5:
                height, width = width, height
            is_plain = (bits, components, orientation) == (8, 3, 1)
            in_part = is_plain and one_scan and not restarts and height <= _MAX_JPEG_HEIGHT
            return Header(height, width, True, is_plain, at + 3 if in_part else 0)
        if marker == _APP1 and encoded[at + 2 : at + 8] == b"Exif\0\0":
            orientation = _orientation(encoded[at + 8 : at + length])
        restarts |= marker == _RESTART_INTERVAL
        at += length
    raise UndecodableError("its header gives no size")


def _next_segment(encoded: bytes, at: int) -> tuple[int | None, int]:
    """The next marker that a segment follows, None at the end, and where its length stands."""
    two = encoded[at : at + 2]  # most often one segment follows the other
    if two in _AT_ONCE:
        return two[1], at + 2
    found = _MARKER.search(encoded, at)  # decoders skip what lies between segments
    return (None, at) if found is None else (found[1][0], found.end())


def _has_one_scan(encoded: bytes, at: int, components: int) -> tuple[bool, bool]:
    """Whether the first scan of a sequential JPEG is of all components, and so the only one read.

    As in nearly all files: to look for further ones takes a fifteenth of the time of decoding.

    Returns:
      That, and whether an interval of restart markers is set before the scan.
    """
    restarts = False
    for _ in range(_MAX_JPEG_SEGMENTS):
        marker, at = _next_segment(encoded, at)
        if marker in (None, _START_OF_SCAN):
            return marker is not None and encoded[at + 2] == components, restarts
        restarts |= marker == _RESTART_INTERVAL
        at += _LENGTH.unpack_from(encoded, at)[0]
    return False, restarts


def _check_scans(encoded: bytes, at: int, pixels: int) -> None:
    """Refuses a JPEG with so many scans that decoding it would take minutes."""
    most = min(_MAX_SCANS, max(1, _MAX_PIXELS_OF_ALL_SCANS // max(pixels, 1)))
    if encoded.count(b"\xff\xda", at) <= most:  # what follows the image may have some too
        return
    scans = 0
    for _ in range(_MAX_JPEG_SEGMENTS):
        marker, at = _next_segment(encoded, at)
        if marker in (None, _END_OF_IMAGE):
            return
        scans += marker == _START_OF_SCAN
        if scans > most:
            break
        at += _LENGTH.unpack_from(encoded, at)[0]
    raise UndecodableError(f"it has more than {most} scans, more than are read")


def _orientation(exif: bytes) -> int:
    """How an Exif block says to turn the image: 2 to 8, from 5 on with its sides exchanged; else 1.

    Of a damaged block, 1.
    """
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (at,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, at)
        for entry in range(min(count, _MAX_EXIF_ENTRIES)):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, at + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if 2 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


def _webp(encoded: bytes) -> Header:
    kind = encoded[12:16]
    if kind == b"VP8X":  # width and height less one, three bytes each
        width = int.from_bytes(encoded[24:27], "little") + 1
        height = int.from_bytes(encoded[27:30], "little") + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", encoded, 26))
    elif kind == b"VP8L":  # fourteen bits each, less one
        (bits,) = struct.unpack_from("<I", encoded, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        raise UndecodableError("its header gives no size")
    if len(encoded) < 30:
        raise UndecodableError("its header is cut off")
    return Header(height, width)
