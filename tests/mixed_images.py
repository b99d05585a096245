"""Folders of image files of every kind that is read, some of them broken, as people have them."""

import io
import pathlib

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
