"""Shows images of any number of channels and any type as pictures."""

from collections.abc import Sequence

import numpy as np

_DEVIATIONS = 2.0  # from the mean to black and to white


def shown_channels(images: np.ndarray) -> np.ndarray:
    """Returns the channels that are shown: the first three, or one if there are fewer."""
    return images[..., : 3 if images.shape[-1] >= 3 else 1]


def as_pictures(
    normalized: np.ndarray, *, mean: Sequence[float], std: Sequence[float], pixel_type: str
) -> np.ndarray:
    """Returns normalized images as pictures, with their first three channels as red, green, blue.

    Args:
      normalized: Floating [..., height, width, channels].
      mean: Mean of each channel.
      std: Standard deviation of each channel.
      pixel_type: Type of the images. Values of other types than uint8 are shown from two standard
        deviations below the mean to two above.

    Returns:
      uint8 [..., height, width, 3], or 1 of one or two channels.
    """
    values = normalized.astype(np.float32)
    if pixel_type == "uint8":
        values = values * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    else:
        values = values / np.float32(2 * _DEVIATIONS) + np.float32(0.5)
    return np.round(255 * np.clip(shown_channels(values), 0, 1)).astype(np.uint8)
