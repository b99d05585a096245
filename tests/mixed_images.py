"""Folders of image files of all supported formats, some of them broken."""

import io
import pathlib
import struct
import zlib

import cv2
import numpy as np
from PIL import Image

_KINDS = (
    (".jpg", "JPEG", "RGB"),
    (".JPEG", "JPEG", "L"),
    (".jpeg", "JPEG", "CMYK"),
    (".png", "PNG", "RGB"),
    (".PNG", "PNG", "RGBA"),
    (".webp", "WEBP", "RGB"),
    (".bmp", "BMP", "RGB"),
    (".gif", "GIF", "P"),
)


def write_mixed(folder: pathlib.Path, count: int, *, broken_every: int, seed: int = 0) -> set[str]:
    """Writes images in two classes, dark and bright; every so many of them is broken.

    Gives the relative paths of the broken ones.
    """
    rng = np.random.default_rng(seed)
    broken = set()
    for i in range(count):
        suffix, format, mode = _KINDS[i % len(_KINDS)]
        name = f"{('bright', 'dark')[i % 2]}/{i:04d}{suffix}"
        noise = rng.random((48, 64, 3))
        low = 0 if i % 2 else 128
        pixels = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, low, low + 127, 32)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(file, format)
        content = file.getvalue()
        if i % broken_every == broken_every - 1:
            broken.add(name)
            content = (content[: len(content) // 2], b"", b"<html>", bytes(900))[i % 4]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return broken


def write_odd(folder: pathlib.Path, count: int, *, seed: int = 0) -> set[str]:
    """Writes rarer images, of each kind in turn, into the two classes, and links among them.

    Gives the relative paths of those that are to be skipped: headers that promise more than is
    decoded.
    """
    rng = np.random.default_rng(seed)
    outside = folder.parent / f"outside of {folder.name}.png"
    Image.new("L", (8, 8)).save(outside)
    to_skip = set()
    for i in range(count):
        class_name, value = (("bright", 200), ("dark", 50))[i % 2]
        kinds = _odd_files(value, rng)
        kind = sorted(kinds)[i // 2 % len(kinds)]
        path = folder / class_name / f"odd {i} {kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = kinds[kind]
        if content is not None:
            path.write_bytes(content)
        elif kind == "out.png":
            path.symlink_to(outside)
        else:
            (path.parent / f"target {i}.png").write_bytes(kinds["gray16.png"] or b"")
            path.symlink_to(f"target {i}.png")
        if "bomb" in kind:
            to_skip.add(f"{class_name}/{path.name}")
    return to_skip


def _odd_files(value: int, rng: np.random.Generator) -> dict[str, bytes | None]:
    """Contents by kind, of about one brightness; None for a link."""
    pixels = np.clip(value + rng.normal(0, 20, (40, 56, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    darker = Image.fromarray(pixels // 2)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter

    def saved(image: Image.Image, format: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, format, **options)
        return file.getvalue()

    def encoded(suffix: str, array: np.ndarray) -> bytes:
        return cv2.imencode(suffix, array)[1].tobytes()

    frames = {"save_all": True, "append_images": [darker, darker], "duration": 50}
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return {
        "gray16.png": encoded(".png", pixels[..., 0].astype(np.uint16) * 257),
        "color16.png": encoded(".png", pixels.astype(np.uint16) * 257),
        "gray and alpha.png": saved(image.convert("LA"), "PNG"),
        "palette.png": saved(image.convert("P"), "PNG"),
        "two colors.png": saved(image.convert("1"), "PNG"),
        "alpha.webp": saved(image.convert("RGBA"), "WEBP", lossless=True),
        "animated.webp": saved(image, "WEBP", **frames),
        "animated.gif": saved(image, "GIF", **frames),
        "animated.png": saved(image, "PNG", **frames),
        "turned.jpg": saved(image, "JPEG", exif=exif),
        "progressive.jpg": saved(image, "JPEG", progressive=True),
        "one pixel.png": saved(image.resize((1, 1)), "PNG"),
        "line.png": encoded(".png", np.full((1, 20_000, 3), value, np.uint8)),
        "column.bmp": encoded(".bmp", np.full((20_000, 1, 3), value, np.uint8)),
        "bomb.png": b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk,
        "bomb.jpg": _promising(saved(image, "JPEG"), 65_000),
        "inside.png": None,
        "out.png": None,
    }


def _promising(jpeg: bytes, side: int) -> bytes:
    """Returns a JPEG whose header has a larger size."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", side, side) + jpeg[at + 4 :]
