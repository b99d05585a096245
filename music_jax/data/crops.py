"""Decoding and cropping on the host, with OpenCV: encoded bytes to uint8 crops."""

import dataclasses
import math

import cv2
import numpy as np

from music_jax.errors import UnusableDataError


@dataclasses.dataclass(frozen=True)
class Crop:
    """How training views are cut.

    Attributes:
      size: side of the square view, in pixels.
      scale: range of the crop's share of the image's area; (1, 1) takes the whole image.
      aspect_ratio: range of the crop's width over its height.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """Decodes an image file to uint8 [height, width, channels]; channels are 1 (gray) or 3 (RGB).

    Raises:
      UnusableDataError: the bytes are no image that OpenCV can read.
    """
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    buffer = np.frombuffer(encoded, np.uint8)
    image = cv2.imdecode(buffer, flag) if buffer.size else None
    if image is None:
        raise UnusableDataError(f"{len(encoded)} bytes cannot be decoded as an image")
    return image.reshape(image.shape[0], image.shape[1], channels)


def random_resized_crop(image: np.ndarray, crop: Crop, rng: np.random.Generator) -> np.ndarray:
    """A random part of the image, resized to a square: torchvision's `RandomResizedCrop`.

    Area and aspect ratio are drawn at most ten times; if none fits, the largest centred crop
    within the range of aspect ratios is taken.

    Args:
      image: uint8 [height, width, channels].
      crop: the ranges to draw from and the size to reach.
      rng: gives the same crop for the same state.

    Returns:
      uint8 [size, size, channels].
    """
    height, width = image.shape[:2]
    if crop.scale == (1.0, 1.0) and crop.aspect_ratio == (1.0, 1.0) and height == width:
        return resize(image, crop.size, crop.size)
    top, left, crop_height, crop_width = _draw_box(height, width, crop, rng)
    part = image[top : top + crop_height, left : left + crop_width]
    return resize(part, crop.size, crop.size)


def _draw_box(
    height: int, width: int, crop: Crop, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    low, high = (math.log(r) for r in crop.aspect_ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*crop.scale)
        ratio = math.exp(rng.uniform(low, high))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    ratio = min(max(width / height, crop.aspect_ratio[0]), crop.aspect_ratio[1])
    crop_width = min(width, max(1, round(height * ratio)))
    crop_height = min(height, max(1, round(width / ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def center_crop(image: np.ndarray, size: int, resize_shorter_side: int) -> np.ndarray:
    """Resizes the shorter side, then cuts the central square: the usual view for evaluation.

    Args:
      image: uint8 [height, width, channels].
      size: side of the square to cut.
      resize_shorter_side: what the shorter side becomes first, at least `size`.

    Returns:
      uint8 [size, size, channels].
    """
    height, width = image.shape[:2]
    ratio = resize_shorter_side / min(height, width)
    new_height = max(round(height * ratio), size)
    new_width = max(round(width * ratio), size)
    image = resize(image, new_height, new_width)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return image[top : top + size, left : left + size]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [h, w, channels]: by area where it shrinks (no aliasing), else bilinear."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] * image.shape[1] > height * width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(image, (width, height), interpolation=method)
    return resized.reshape(height, width, image.shape[2])
