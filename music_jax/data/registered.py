"""Registered datasets as sources."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import config_dict

from music_jax import registry
from music_jax.data.labels import DAMAGED, MAX_CLASSES, UNKNOWN, by_class, read_values
from music_jax.data.order import evenly_spaced
from music_jax.data.sources import Source
from music_jax.errors import MissingSplitError, UserError

_LOOKED_AT = 16  # records


def prepare(dataset: config_dict.ConfigDict) -> None:
    """Does nothing: a registered dataset prepares itself when a split is opened."""


def open_split(dataset: config_dict.ConfigDict, split: str) -> Source:
    """Opens one split of a dataset that `music_jax.register_dataset` has registered.

    Args:
      dataset: Group `dataset` of the config.
      split: Name of the split.

    Raises:
      MissingSplitError: The dataset has no such split.
      UserError: The records are not as `music_jax.register_dataset` describes them.
    """
    options = registry.options(dataset)
    name = f"{dataset.name}:{split}"
    try:
        records = registry.DATASETS[dataset.name](split, **options)
    except OSError as error:
        raise UserError(f"cannot open {name}: {error}") from error
    if records is None:
        raise MissingSplitError(f"the dataset {dataset.name!r} has no split {split!r}")
    if not (hasattr(records, "__len__") and hasattr(records, "__getitem__")):
        raise UserError(
            f"the dataset {dataset.name!r} must give an object with len() and [index] for each "
            f"split; got {type(records).__name__} for {split!r}"
        )
    if not len(records):
        raise UserError(f"{name} has no images")
    class_names = tuple(map(str, getattr(records, "class_names", None) or ()))
    labels = _labels(records, name, len(class_names))
    multi_label = labels.ndim == 2
    if multi_label:
        class_names = class_names or tuple(map(str, range(labels.shape[1])))
        found = len(class_names)
    else:
        found = max(int(labels.max()) + 1, 0)
    if class_names and found > len(class_names):
        raise UserError(f"{name} has the label {found - 1}, but {len(class_names)} class names")
    content = json.dumps([name, options, class_names], sort_keys=True).encode()
    return Source(
        name=name,
        size=len(records),
        read=lambda index: {"image": records[index]["image"]},
        num_classes=len(class_names) or found,
        class_names=class_names,
        no_classes="" if found else f"none of the {len(records):,} images of {name} has a label",
        identity=lambda _: content + labels.tobytes(),
        known_labels=labels,
        multi_label=multi_label,
    )


def _labels(records: Any, name: str, num_names: int) -> np.ndarray:
    """Returns the labels: -1 for images without one, -2 for damaged records.

    They are the attribute `labels` of the records. Otherwise they are read from each record, unless
    a few records, evenly spaced, have no label.

    Args:
      records: Records.
      name: Name of the split, for messages.
      num_names: Number of class names; 0 if the classes have no names.

    Returns:
      int32 [images]; or int8 [images, classes] if a label is a list or an array.
    """
    if hasattr(records, "labels"):
        found = records.labels
        if not isinstance(found, np.ndarray) or found.dtype == object:
            found = [UNKNOWN if _is_negative(label) else label for label in found]
        elif found.ndim == 1 and np.issubdtype(found.dtype, np.signedinteger):
            found = np.maximum(found, UNKNOWN)
    else:
        some = evenly_spaced(len(records), _LOOKED_AT)
        if all(_label(records, index, name) is None for index in some):
            return np.full(len(records), UNKNOWN, np.int32)
        found = read_values(len(records), lambda i: _label(records, i, name), name)
    if not isinstance(found, np.ndarray) or found.dtype == object:
        found = [UNKNOWN if label is None else label for label in found]
        if len(found) == len(records) and any(np.ndim(label) for label in found):
            return _several_classes(found, name, num_names)
    labels = np.asarray(found)
    if labels.ndim == 2 and len(labels) == len(records):
        return _several_classes(labels, name, num_names)
    if labels.shape != (len(records),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"the labels of {name} must be {len(records)} integers, or lists of integers; got "
            f"{labels.dtype} of shape {labels.shape}"
        )
    if labels.max() >= MAX_CLASSES:
        raise UserError(
            f"{name} has the label {labels.max()}; labels are the numbers of classes, below "
            f"{MAX_CLASSES:,}"
        )
    return labels.astype(np.int32)


def _several_classes(labels: Sequence[Any] | np.ndarray, name: str, num_names: int) -> np.ndarray:
    """Returns labels that are lists or arrays, int8 [images, classes]."""
    lengths = {len(label) for label in labels if np.ndim(label)}
    if not num_names and len(lengths) > 1:
        raise UserError(
            f"the labels of {name} are lists of {min(lengths)} to {max(lengths)} integers: for "
            "lists of the numbers of classes, give its records the attribute class_names; other "
            "lists need one element of -1, 0 or 1 for each class"
        )
    num_classes = num_names or max(lengths)
    found = np.full((len(labels), num_classes), UNKNOWN, np.int8)
    for i, label in enumerate(labels):
        try:
            if np.ndim(label) or label >= 0:
                found[i] = by_class(label, num_classes)
            else:
                found[i] = label
        except (ValueError, TypeError) as error:
            raise UserError(f"the label {i} of {name} cannot be used: {error}") from error
    return found


def _label(records: Any, index: int, name: str) -> Any:
    try:
        record = records[index]
    except Exception:  # Whatever the user's code raises; the image is skipped when it is read.
        return DAMAGED
    if not isinstance(record, dict) or "image" not in record:
        raise UserError(
            f"the records of {name} must be dictionaries with the key 'image'; got {record!r:.100}"
        )
    label = record.get("label")
    return UNKNOWN if _is_negative(label) else label


def _is_negative(label: Any) -> bool:
    return isinstance(label, (int, np.integer)) and bool(label < 0)
