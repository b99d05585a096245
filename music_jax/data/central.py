"""The view of an image file that features are computed from outside of training."""

import numpy as np

from music_jax.data.crops import center_crop
from music_jax.data.decode import decode, largest_reduction
from music_jax.data.headers import read_header


def central_view(
    encoded: bytes, *, size: int, resize_shorter_side: int, channels: int
) -> np.ndarray:
    """Decodes an image file, resizes its shorter side and cuts the central square.

    Args:
      encoded: the file's bytes.
      size: side of the square, in pixels.
      resize_shorter_side: what the shorter side becomes first, at least `size`.
      channels: 1 (gray) or 3 (RGB).

    Returns:
      uint8 [size, size, channels].

    Raises:
      UndecodableError: the bytes are no whole image of a known format, or too large a one.
    """
    header = read_header(encoded)
    shrink = min(header.height, header.width) / resize_shorter_side
    reduction = largest_reduction(header, shrink)
    image = decode(encoded, channels, header=header, reduction=reduction)
    return center_crop(image, size, resize_shorter_side)
