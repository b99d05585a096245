"""Hostile image files, each determined by a random generator."""

import functools
import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

_SIDES = (0, 1, 2, 3, 7, 255, 4096, 16383, 20_000, 46_341, 65_535)
_WIDE_SIDES = (*_SIDES, 2**20, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)


@functools.cache
def whole_images() -> tuple[bytes, ...]:
    """Files of every format that is read, and some of those that are not."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 37, 3)).astype(np.uint8)
    rgb = Image.fromarray(pixels)
    moving = {"save_all": True, "append_images": [rgb.rotate(90 * i) for i in range(3)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        (rgb, "JPEG", {}),
        (rgb, "JPEG", {"progressive": True, "exif": exif}),
        (rgb.convert("L"), "JPEG", {}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "PNG", {"exif": exif}),
        (rgb.convert("RGBA"), "PNG", {}),
        (rgb.quantize(16), "PNG", {"transparency": 3}),
        (rgb.convert("I;16") if hasattr(rgb, "im") else rgb, "PNG", {}),
        (rgb, "PNG", moving),
        (rgb, "WEBP", {"lossless": True, "exif": exif}),
        (rgb, "WEBP", {}),
        (rgb, "WEBP", moving),
        (rgb, "BMP", {}),
        (rgb.quantize(16), "BMP", {}),
        (rgb.quantize(16), "GIF", {}),
        (rgb.quantize(16), "GIF", moving),
        (rgb, "TIFF", {}),
        (rgb, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (rgb, "TIFF", moving),
        (rgb, "PPM", {}),
        (Image.new("RGB", (1, 1)), "PNG", {}),
        (Image.new("L", (20_000, 1)), "PNG", {}),
        (Image.new("L", (1, 20_000)), "JPEG", {}),
    ]
    files = []
    for image, kind, options in kinds:
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append(file.getvalue())
    file = io.BytesIO()
    np.save(file, pixels)
    return (*files, file.getvalue())


def hostile_image(rng: random.Random) -> bytes:
    """One file."""
    make = rng.choice(
        (_flipped, _flipped, _cut, _spliced, _resized, _resized, _rewritten_png, _exif, _special)
    )
    return make(rng, rng.choice(whole_images()))


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Bytes with one kind of damage: some changed, cut off, taken out or repeated."""
    return rng.choice((_flipped, _flipped, _cut, _spliced))(rng, content)


def _flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    reach = rng.choice((64, 400, len(changed)))
    for _ in range(rng.choice((1, 1, 2, 4, 16)) if changed else 0):
        changed[rng.randrange(min(len(changed), reach))] = rng.choice(
            (0, 255, 0x7F, 0x80, rng.randrange(256))
        )
    return bytes(changed)


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _spliced(rng: random.Random, content: bytes) -> bytes:
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    part = content[a:b]
    inserted = rng.choice(
        (b"", part * 2, part * rng.randrange(1, 9), rng.randbytes(20), part[::-1])
    )
    return content[:a] + inserted + content[b:]


def _resized(rng: random.Random, content: bytes) -> bytes:
    """Another size in the header."""
    changed = bytearray(content)
    small = rng.random() < 0.95  # others take long to decode
    height, width = (rng.choice(_SIDES[:6] if small else _SIDES) for _ in range(2))
    frame = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    if content[:2] == b"\xff\xd8" and frame > 0:
        changed[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    elif content[:3] == b"GIF":
        at = rng.choice((6, content.find(b",") + 1))
        changed[at : at + 4] = struct.pack("<HH", width, height)
    elif content[:4] == b"RIFF":
        at = rng.choice((23, 24, 26, 27))
        changed[at : at + 4] = struct.pack("<HH", width, height)
    else:
        wide = rng.choice(_WIDE_SIDES)
        at, order = (18, "<") if content[:2] == b"BM" else (16, ">")
        changed[at : at + 8] = struct.pack(order + "II", *rng.sample((wide, rng.choice(_SIDES)), 2))
    return bytes(changed)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file, with the checksum that belongs to it."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _rewritten_png(rng: random.Random, content: bytes) -> bytes:
    """Chunks that are damaged, repeated or out of order but have the right checksums."""
    if content[:4] != b"\x89PNG":
        return _flipped(rng, content)
    chunks, at = [], 8
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        chunks.append((kind, content[at + 8 : at + 8 + length]))
        at += 12 + length
    text = zlib.compress(bytes(rng.choice((10, 10**5))))
    extra = rng.choice((b"zTXt", b"iTXt", b"tEXt", b"iCCP", b"eXIf", b"fcTL", b"acTL", b"fdAT"))
    chunks.insert(rng.randrange(len(chunks) + 1), (extra, b"k\0\0" + text))
    for _ in range(rng.randrange(4)):
        i = rng.randrange(len(chunks))
        kind, data = chunks[i]
        if kind == b"IHDR" and rng.random() < 0.9:
            data = data[:8] + _flipped(rng, data[8:])
        else:
            data = mutated(rng, data)
        chunks[i] = (kind, data)
    if rng.random() < 0.2:
        rng.shuffle(chunks)
    return content[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def _exif(rng: random.Random, content: bytes) -> bytes:
    """Exif that points to anywhere."""
    entries = b"".join(
        struct.pack("<HHII", 0x0112, rng.randrange(14), rng.getrandbits(31), rng.getrandbits(31))
        for _ in range(rng.randrange(5))
    )
    count, where = rng.choice((0, 1, 3, 65535)), rng.choice((8, 8, 8, 0, 2**32 - 1))
    exif = b"II*\0" + struct.pack("<IH", where, count) + entries
    if content[:2] == b"\xff\xd8":
        exif = b"Exif\0\0" + mutated(rng, exif)
        return content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]
    if content[:4] == b"\x89PNG":
        return content[:33] + png_chunk(b"eXIf", exif) + content[33:]
    return _flipped(rng, content)


def _special(rng: random.Random, content: bytes) -> bytes:
    return rng.choice((_noise, _scans, _empty_frame, _texts))(rng, content)


def _noise(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(20)] + rng.randbytes(rng.randrange(200))


def _scans(rng: random.Random, content: bytes) -> bytes:
    return scan_bomb(rng.randrange(1, 200), rng.choice((8, 64)), rng.choice(("L", "RGB")))


def _empty_frame(rng: random.Random, content: bytes) -> bytes:
    return b"\xff\xd8" + b"\xff" * rng.randrange(10_000) + rng.choice((b"", b"\0", content[2:]))


def _texts(rng: random.Random, content: bytes) -> bytes:
    return text_bomb(rng.choice((b"zTXt", b"iTXt")), rng.randrange(1, 30), 10**6)


@functools.cache
def _progressive(side: int, mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, "JPEG", progressive=True)
    return file.getvalue()


def scan_bomb(scans: int, side: int, mode: str = "L") -> bytes:
    """A progressive JPEG whose last scan is repeated so many times, gray (`L`) or in color."""
    whole = _progressive(side, mode)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + b"\xff\xd9"


def text_bomb(kind: bytes, count: int, size: int) -> bytes:
    """A PNG with so many texts, each so many bytes when decompressed."""
    text = (b"k\0\0" if kind == b"zTXt" else b"k\0\1\0\0\0") + zlib.compress(bytes(size), 9)
    whole = whole_images()[4]
    return whole[:33] + png_chunk(kind, text) * count + whole[33:]
