"""Cuts views out of images: random boxes for training, the central square for evaluation."""

import dataclasses
import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import DTypeLike

from music_jax.data.decode import EncodedImage, decode, largest_reduction, read_header

_AVERAGED_CHANNELS = 4  # by OpenCV at once, at most
_TRIES = 10  # at drawing a box
NUMBERS_PER_BOX = 2 * _TRIES + 2  # area and aspect ratio of each try, then top and left


@dataclasses.dataclass(frozen=True)
class Crop:
    """Settings of the random crops of training views.

    Attributes:
      size: Side of the square view, in pixels.
      scale: Range of the crop's share of the image's area; (1, 1) takes the entire image.
      aspect_ratio: Range of the crop's width divided by its height.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_boxes(
    heights: np.ndarray, widths: np.ndarray, crop: Crop, numbers: np.ndarray
) -> np.ndarray:
    """Draws a random box in each of many images, as torchvision's `RandomResizedCrop` does.

    Area and aspect ratio are drawn up to ten times. If no box fits, the largest centered box within
    the range of aspect ratios is taken.

    Args:
      heights: Heights of the images, [n].
      widths: Widths of the images, [n].
      crop: Ranges to draw from.
      numbers: Uniform numbers in [0, 1), [n, NUMBERS_PER_BOX]; each row gives one box.

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
    """Cuts a box out of an image and resizes it to a square, fast enough for training.

    Halves the box, each pixel the mean of four, while it is at least twice as large as the square,
    then interpolates bilinearly. Averaging over all pixels at once, as `resize` does, takes five
    to ten times as long; the mean difference is one gray level.

    Args:
      image: uint8, uint16 or float32 [height, width, channels].
      box: Box, in pixels of the image at full size.
      out: Array [size, size, channels] of this type, contiguous; receives the square.
      reduction: Factor by which decoding has reduced the image.
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
        part = _resize(part, height, width, cv2.INTER_AREA)
    if (height, width) == (size, size):
        out[:] = part
    elif image.shape[2] <= _AVERAGED_CHANNELS:
        cv2.resize(part, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)
    else:
        out[:] = _resize(part, size, size, cv2.INTER_LINEAR)


def central_view(
    encoded: EncodedImage,
    *,
    size: int,
    resize_shorter_side: int,
    channels: int,
    dtype: DTypeLike = np.uint8,
) -> np.ndarray:
    """Decodes an image file, and cuts the central view for evaluation as `center_crop` does.

    Returns:
      Image [size, size, channels] of this type.

    Raises:
      UndecodableError: The file is damaged, too large, or of an unknown format.
    """
    header = read_header(encoded, channels)
    reduction = largest_reduction(header, min(header[:2]) / resize_shorter_side)
    image = decode(encoded, channels, dtype=dtype, header=header, reduction=reduction)
    return center_crop(image, size, resize_shorter_side)


def center_crop(image: np.ndarray, size: int, resize_shorter_side: int) -> np.ndarray:
    """Resizes the shorter side of [height, width, channels], then cuts the central square.

    Args:
      image: Image.
      size: Side of the square, in pixels.
      resize_shorter_side: Length to which the shorter side is resized, at least `size`.
    """
    for axis in (0, 1):  # enlarging a long strip completely could fill the memory
        longer, shorter = image.shape[axis], image.shape[1 - axis]
        if longer > 16 * shorter:
            cut_off = (longer - 4 * shorter) // 2
            image = image.take(range(cut_off, longer - cut_off), axis)
    height, width = image.shape[:2]
    ratio = resize_shorter_side / min(height, width)
    new_height, new_width = max(round(height * ratio), size), max(round(width * ratio), size)
    image = resize(image, new_height, new_width)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return image[top : top + size, left : left + size]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes [h, w, channels], by area where it shrinks (no aliasing), else bilinearly."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] * image.shape[1] > height * width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return _resize(image, height, width, method)


def _resize(image: np.ndarray, height: int, width: int, method: int) -> np.ndarray:
    parts = [
        cv2.resize(image[..., i : i + _AVERAGED_CHANNELS], (width, height), interpolation=method)
        for i in range(0, image.shape[2], _AVERAGED_CHANNELS)
    ]
    parts = [part.reshape(height, width, -1) for part in parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
