"""Labels of images: one class each, or several.

Where images have one class each, a label is its number, and -1 if it is unknown. Where they may
have several, a label has an element for each class: 1 if the image has the class, 0 if not, and -1
if it is unknown. An image has no label if all elements are -1.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from music_jax.data.parallel import map_ranges

Label = int | np.ndarray  # a number, or int8 [classes]

UNKNOWN, DAMAGED = -1, -2

MAX_CLASSES = 2**20  # larger numbers, such as hashes, are not those of classes
_MAX_MATRIX_BYTES = 2**32  # of labels by class, an int8 for each image and class
_FEW = 1000  # distinct values, which are classes however few images there are


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
    parts = map_ranges(lambda part: [*map(read, part)], count, description=f"labels of {name}")
    return [*itertools.chain.from_iterable(parts)]


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


class Labels(NamedTuple):
    """Labels of all images, and their classes."""

    labels: np.ndarray  # int32 [images], or int8 [images, classes]
    num_classes: int
    class_names: tuple[str, ...]  # empty if the labels are numbers
    no_classes: str  # why the images have no labels, or ""
    multi_label: bool = False


def number_labels(values: Sequence[Any], what: str, names: Sequence[str] = ()) -> Labels:
    """Returns the labels for values that are whole numbers, texts, lists of one of them, or None.

    Numbers are taken as they are. Texts are numbered in the order of the sorted names. Lists have
    the classes of an image; or an element of -1, 0 or 1 for each class, if all of them are such
    numbers and have the same length, and the classes have no names.

    Args:
      values: The value of each image; negative numbers, empty texts and None stand for no label.
      what: Where the values come from, for the reason why there are no labels.
      names: Names of the classes, if numbers stand for them.
    """
    values = [None if value == "" else value for value in values]
    reason = ""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {list}:
        return _number_lists(values, what, names)
    found = set(values) - {None} if kinds <= {int, bool} or kinds == {str} else set()
    if kinds and not found:
        kind_names = ", ".join(sorted(kind.__name__ for kind in kinds))
        reason = f"the labels in {what} are neither whole numbers nor texts, but {kind_names}"
    elif not found or (kinds != {str} and max(found) < 0):
        reason = f"none of the {len(values):,} images has a label in {what}"
    elif kinds != {str} and max(found) >= MAX_CLASSES:
        reason = f"the largest label in {what}, {max(found)}, is not the number of a class"
    elif are_too_many(len(found), len(values)):
        reason = f"the {len(found):,} values in {what} are too many for classes of {len(values):,}"
    if reason:
        return Labels(np.full(len(values), -1, np.int32), 0, (), reason)
    if kinds == {str}:
        texts = tuple(sorted(found))
        numbers = {name: number for number, name in enumerate(texts)} | {None: -1}
        return Labels(np.asarray([numbers[v] for v in values], np.int32), len(texts), texts, "")
    labels = np.asarray([-1 if v is None or v < 0 else v for v in values], np.int32)
    count = int(labels.max()) + 1
    if count <= len(names):
        return Labels(labels, len(names), tuple(names), "")
    return Labels(labels, count, (), "")


def _number_lists(values: Sequence[Any], what: str, names: Sequence[str]) -> Labels:
    lists = [value for value in values if value is not None]
    none = Labels(np.full(len(values), -1, np.int32), 0, (), "")
    items = [item for value in lists for item in value]
    if any(isinstance(item, list) for item in items):
        return none._replace(no_classes=f"the labels in {what} are lists of lists")
    single = number_labels(items, what, names)
    if single.no_classes:
        return none._replace(no_classes=single.no_classes)
    lengths = {len(value) for value in lists}
    is_by_class = not single.class_names and single.num_classes <= 2 and len(lengths) == 1
    num_classes = max(lengths) if is_by_class else single.num_classes
    if len(values) * num_classes > _MAX_MATRIX_BYTES:
        return none._replace(
            no_classes=f"labels of {num_classes:,} classes for {len(values):,} images take too "
            f"much memory in {what}"
        )
    names = single.class_names or tuple(map(str, range(num_classes)))
    labels = np.full((len(values), num_classes), UNKNOWN, np.int8)
    start = 0
    for i, value in enumerate(values):
        if value is None:
            continue
        numbers = single.labels[start : start + len(value)]
        start += len(value)
        labels[i] = numbers if is_by_class else 0
        if not is_by_class:
            labels[i, numbers[numbers >= 0]] = 1
    return Labels(labels, num_classes, tuple(names), "", multi_label=True)
