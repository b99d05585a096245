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
_ORIENTATION = 0x0112  # the tag's number in Exif
_INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # types of values in Exif: short and long, signed
# Start-of-frame markers: 0xC0 to 0xCF without those of Huffman tables, extensions and arithmetic
# coding tables.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset((0xC0, 0xC1, 0xC9))
_START_OF_SCAN, _END_OF_IMAGE, _RESTART_INTERVAL, _APP1 = 0xDA, 0xD9, 0xDD, 0xE1
# The next marker that a segment follows: none of stuffed and fill bytes, TEM, RST0 to RST7, SOI.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_AT_ONCE = frozenset(b for n in range(256) if _MARKER.fullmatch(b := bytes((0xFF, n))))
_LENGTH, _FRAME = struct.Struct(">H"), struct.Struct(">HBHHB")
_EXIF = b"Exif\0\0"

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
      orientation: how a JPEG is to be turned and mirrored, 1 (not at all) to 8 as Exif counts.
      height_at: where a JPEG says its height in two bytes, if its upper rows can be decoded without
        those below: it is plain, with one scan, and says nothing of restart markers; else 0.
    """

    height: int
    width: int
    is_jpeg: bool = False
    is_plain: bool = False
    orientation: int = 1
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
    at, frame, frame_at, exif, restarts = 2, None, 0, [], False
    for _ in range(_MAX_JPEG_SEGMENTS):
        marker, at = _next_segment(encoded, at)
        if marker in (None, _START_OF_SCAN, _END_OF_IMAGE):
            break
        if marker in _START_OF_FRAME and frame is None:
            frame, frame_at = marker, at
        elif marker == _APP1 and encoded[at + 2 : at + 8] == _EXIF:
            exif.append((at + 8, at + _LENGTH.unpack_from(encoded, at)[0]))
        restarts |= marker == _RESTART_INTERVAL
        at += _LENGTH.unpack_from(encoded, at)[0]
    if frame is None:
        raise UndecodableError("its header gives no size")
    length, bits, height, width, components = _FRAME.unpack_from(encoded, frame_at)
    # A first scan of all components is the only one of a sequential JPEG that is read, as in nearly
    # all files: to look for further ones takes a fifteenth of the time of decoding.
    one_scan = frame in _SEQUENTIAL and marker == _START_OF_SCAN and encoded[at + 2] == components
    if not one_scan:
        _check_scans(encoded, frame_at + length, height * width)
    # An Exif block of more than 64 kB goes on in the next segments; so does one that is repeated.
    orientation = _orientation(b"".join(encoded[start:end] for start, end in exif)) if exif else 1
    height_at = frame_at + 3
    if orientation >= 5:
        height, width = width, height
    is_plain = (bits, components, orientation) == (8, 3, 1)
    in_part = is_plain and one_scan and not restarts and height <= _MAX_JPEG_HEIGHT
    return Header(height, width, True, is_plain, orientation, height_at if in_part else 0)


def _next_segment(encoded: bytes, at: int) -> tuple[int | None, int]:
    """The next marker that a segment follows, None at the end, and where its length stands."""
    two = encoded[at : at + 2]  # most often one segment follows the other
    if two in _AT_ONCE:
        return two[1], at + 2
    found = _MARKER.search(encoded, at)  # decoders skip what lies between segments
    return (None, at) if found is None else (found[1][0], found.end())


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
    """Reads how Exif says to turn an image: 2 to 8, from 5 on with its sides exchanged, or else 1.

    As in Pillow, the first directory counts, and in it a whole number. Damaged Exif gives 1.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        entries = exif[at + 2 : at + 2 + 12 * count]
        whole = entries[: len(entries) // 12 * 12]
        for tag, kind, values, value in struct.iter_unpack(f"{order}HHI4s", whole):
            if tag == _ORIENTATION:
                integer = struct.Struct(order + _INTEGERS.get(kind, ""))
                if not 1 <= values * integer.size <= len(value):
                    return 1
                (found,) = integer.unpack_from(value)
                return found if 2 <= found <= 8 else 1
    except struct.error:
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
