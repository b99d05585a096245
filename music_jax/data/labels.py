"""Labels of images: one class each, or several.

Where images have one class each, a label is its number, and -1 if it is unknown. Where they may
have several, a label has an element for each class: 1 if the image has the class, 0 if not, and -1
if it is unknown. An image has no label if all elements are -1.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import numpy as np

from music_jax.distributed import progress

Label = int | np.ndarray  # a number, or int8 [classes]

UNKNOWN, DAMAGED = -1, -2

_FEW = 1000  # distinct values, which are classes however few images there are
_READ_AT_ONCE = 256  # by one thread


def are_too_many(num_classes: int, num_images: int) -> bool:
    """Returns whether so many distinct values are not classes, but names or numbers of images."""
    return num_classes > max(_FEW, num_images // 2)


def by_class(label: Any, num_classes: int) -> np.ndarray:
    """Returns a label of several classes, int8 [classes].

    Args:
      label: An array with an element of -1, 0 or 1 for each class. If there are three classes or
        more, it may also be the different numbers of the image's classes, in any order.
      num_classes: Number of classes.

    Raises:
      ValueError: The label is neither.
    """
    found = np.asarray(label)
    if found.dtype == bool or not found.size:
        found = found.astype(np.int8)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"expected integers [classes]; got {found.dtype} of shape {found.shape}")
    if found.shape == (num_classes,) and np.all((found >= -1) & (found <= 1)):
        return found.astype(np.int8)
    if num_classes < 3 or np.any((found < 0) | (found >= num_classes)):
        numbers = f", or numbers of classes below {num_classes}" * (num_classes > 2)
        raise ValueError(
            f"expected {num_classes} elements of -1, 0 or 1{numbers}; got {found.tolist()!s:.100}"
        )
    result = np.zeros(num_classes, np.int8)
    result[found] = 1
    return result


def read_values(count: int, read: Callable[[int], Any], name: str) -> list:
    """Reads the label of every record of a source on several threads, with a progress bar.

    Args:
      count: Number of records.
      read: Function from an index to a label.
      name: Name of the source.

    Returns:
      The labels.
    """
    parts = [range(i, min(i + _READ_AT_ONCE, count)) for i in range(0, count, _READ_AT_ONCE)]
    found: list = []
    with (
        concurrent.futures.ThreadPoolExecutor() as pool,
        progress.bar(count, unit="img", description=f"labels of {name}", delay=1.0) as bar,
    ):
        for labels in pool.map(lambda part: [*map(read, part)], parts):
            found += labels
            bar.update(len(labels))
    return found


def has_label(labels: np.ndarray) -> np.ndarray:
    """Returns whether each image has a label: bool [images], for [images] or [images, classes]."""
    return np.any(labels >= 0, axis=tuple(range(1, labels.ndim)))


def lacks_label(labels: np.ndarray) -> np.ndarray:
    """Returns whether each image has no label, bool [images]; not so for damaged records."""
    return np.all(labels == UNKNOWN, axis=tuple(range(1, labels.ndim)))


def classes_of(label: Label) -> list[int]:
    """Returns the numbers of the classes that an image has."""
    if isinstance(label, np.ndarray) and label.ndim:
        return np.flatnonzero(label == 1).tolist()
    return [int(label)] if label >= 0 else []
