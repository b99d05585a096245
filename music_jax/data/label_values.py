"""Labels as files and columns hold them: whole numbers, or names of classes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_MAX_CLASSES = 2**20  # larger numbers, such as hashes, are not those of classes


class Labels(NamedTuple):
    """Labels of all images, and their classes."""

    labels: np.ndarray  # int32 [images], -1 for images without one
    num_classes: int
    class_names: tuple[str, ...]  # empty if the labels are numbers
    no_classes: str  # why the images have no labels, or ""


def number_labels(values: Sequence[Any], what: str) -> Labels:
    """Returns the labels for values that are whole numbers, texts or None.

    Numbers are taken as they are. Texts are numbered in the order of the sorted names.

    Args:
      values: The value of each image; negative numbers, empty texts and None stand for no label.
      what: Where the values come from, for the reason why there are no labels.
    """
    values = [None if value == "" else value for value in values]
    reason = ""
    kinds = {type(value) for value in values} - {type(None)}
    found = set(values) - {None} if kinds <= {int, bool} or kinds == {str} else set()
    if kinds and not found:
        kind_names = ", ".join(sorted(kind.__name__ for kind in kinds))
        reason = f"the labels in {what} are neither whole numbers nor texts, but {kind_names}"
    elif not found or (kinds != {str} and max(found) < 0):
        reason = f"none of the {len(values):,} images has a label in {what}"
    elif kinds != {str} and max(found) >= _MAX_CLASSES:
        reason = f"the largest label in {what}, {max(found)}, is not the number of a class"
    if reason:
        return Labels(np.full(len(values), -1, np.int32), 0, (), reason)
    if kinds == {str}:
        names = tuple(sorted(found))
        numbers = {name: number for number, name in enumerate(names)} | {None: -1}
        return Labels(np.asarray([numbers[v] for v in values], np.int32), len(names), names, "")
    labels = np.asarray([-1 if v is None or v < 0 else v for v in values], np.int32)
    return Labels(labels, int(labels.max()) + 1, (), "")
