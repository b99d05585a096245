"""Cutting views out of images, on the host."""

import dataclasses
import math
from typing import NamedTuple

import cv2
import numpy as np


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


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


_TRIES = 10
NUMBERS_PER_BOX = 2 * _TRIES + 2  # area and aspect ratio of each try, then top and left


def draw_boxes(
    heights: np.ndarray, widths: np.ndarray, crop: Crop, numbers: np.ndarray
) -> np.ndarray:
    """Draws a random part of each of many images, as torchvision's `RandomResizedCrop` does.

    Area and aspect ratio are drawn at most ten times; if none fits, the largest centered part
    within the range of aspect ratios is taken.

    Args:
      heights: of the images, [n].
      widths: of the images, [n].
      crop: the ranges to draw from.
      numbers: uniform in [0, 1), [n, NUMBERS_PER_BOX]; each row gives one part.

    Returns:
      int64 [n, 4], the fields of `Box`.
    """
    low, high = crop.scale
    log_low, log_high = (math.log(r) for r in crop.aspect_ratio)
    h, w = heights[:, None], widths[:, None]
    areas = h * w * (low + (high - low) * numbers[:, :_TRIES])
    ratios = np.exp(log_low + (log_high - log_low) * numbers[:, _TRIES : 2 * _TRIES])
    tried_w, tried_h = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (tried_w > 0) & (tried_w <= w) & (tried_h > 0) & (tried_h <= h)  # [n, tries]
    first = fits.argmax(axis=1)[:, None]
    any_fits = fits.any(axis=1)
    ratio = np.clip(widths / heights, *crop.aspect_ratio)
    largest_w = np.minimum(widths, np.maximum(1, np.rint(heights * ratio)))
    largest_h = np.minimum(heights, np.maximum(1, np.rint(widths / ratio)))
    box_w = np.where(any_fits, np.take_along_axis(tried_w, first, axis=1)[:, 0], largest_w)
    box_h = np.where(any_fits, np.take_along_axis(tried_h, first, axis=1)[:, 0], largest_h)
    top = np.where(any_fits, (heights - box_h + 1) * numbers[:, -2], (heights - box_h) // 2)
    left = np.where(any_fits, (widths - box_w + 1) * numbers[:, -1], (widths - box_w) // 2)
    return np.stack([top, left, box_h, box_w], axis=1).astype(np.int64)


def cut(image: np.ndarray, box: Box, out: np.ndarray, *, reduction: int = 1) -> None:
    """Cuts a part out of an image and resizes it to a square: quickly, for training.

    Halves the part, each pixel the mean of four, while it is twice as large as the square or more,
    then interpolates bilinearly. Averaging over every pixel at once, as `resize` does, takes five
    to ten times as long; the mean difference is one gray level.

    Args:
      image: uint8 [height, width, channels].
      box: the part, in pixels of the image before it was reduced.
      out: uint8 [size, size, channels], contiguous; the square is written there.
      reduction: by how much smaller than that the image is.
    """
    top, left, height, width = box
    if reduction > 1:
        height = -(-(top + height) // reduction) - top // reduction
        width = -(-(left + width) // reduction) - left // reduction
        top, left = top // reduction, left // reduction
    part = image[top : top + height, left : left + width]
    size = out.shape[0]
    while height >= 2 * size and width >= 2 * size:
        height, width = height // 2, width // 2
        part = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
    if (height, width) == (size, size):
        out[:] = part.reshape(out.shape)
    else:
        cv2.resize(part, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)


def center_crop(image: np.ndarray, size: int, resize_shorter_side: int) -> np.ndarray:
    """Resizes the shorter side, then cuts the central square: the usual view for evaluation.

    Args:
      image: uint8 [height, width, channels].
      size: side of the square to cut.
      resize_shorter_side: what the shorter side becomes first, at least `size`.

    Returns:
      uint8 [size, size, channels].
    """
    image = _without_far_ends(image)
    height, width = image.shape[:2]
    ratio = resize_shorter_side / min(height, width)
    new_height = max(round(height * ratio), size)
    new_width = max(round(width * ratio), size)
    image = resize(image, new_height, new_width)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return image[top : top + size, left : left + size]


def _without_far_ends(image: np.ndarray) -> np.ndarray:
    """The middle of a long strip of an image, which enlarged as a whole might fill the memory."""
    for axis in (0, 1):
        longer, shorter = image.shape[axis], image.shape[1 - axis]
        cut_off = (longer - 4 * shorter) // 2
        if longer > 16 * shorter:
            image = image.take(range(cut_off, longer - cut_off), axis)
    return image


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [h, w, channels]: by area where it shrinks (no aliasing), else bilinear."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] * image.shape[1] > height * width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(image, (width, height), interpolation=method)
    return resized.reshape(height, width, image.shape[2])
