"""Registered datasets as sources."""

import json
from typing import Any

import numpy as np
from ml_collections import config_dict

from music_jax import registry
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.errors import UserError


def open_registered(dataset: config_dict.ConfigDict, split: str) -> Source | None:
    """Opens one split of a dataset that `music_jax.register_dataset` has registered.

    Args:
      dataset: Group `dataset` of the config.
      split: Name of the split.

    Returns:
      The source; None if the dataset has no such split.

    Raises:
      UserError: The records are not as `music_jax.register_dataset` describes them.
    """
    options = registry.options(dataset)
    name = f"{dataset.name}:{split}"
    records = registry.DATASETS[dataset.name](split, **options)
    if records is None:
        return None
    if not (hasattr(records, "__len__") and hasattr(records, "__getitem__")):
        raise UserError(
            f"the dataset {dataset.name!r} must give an object with len() and [index] for each "
            f"split; got {type(records).__name__} for {split!r}"
        )
    if not len(records):
        raise UserError(f"{name} has no images")
    first = records[0]
    if not isinstance(first, dict) or "image" not in first:
        raise UserError(
            f"the records of {name} must be dictionaries with the key 'image'; got {first!r:.100}"
        )
    labels = _labels(records, name, "label" in first)
    class_names = tuple(getattr(records, "class_names", ()))
    found = 0 if labels is None else int(labels.max()) + 1
    if class_names and found > len(class_names):
        raise UserError(f"{name} has the label {found - 1}, but {len(class_names)} class names")
    return Source(
        name=name,
        records=_Records(records, labels),
        image_key="image",
        label_key="label",
        num_classes=len(class_names) or found,
        class_names=class_names,
        no_classes="" if found else f"the records of {name} have no key 'label'",
        identity=lambda _: json.dumps([name, options], sort_keys=True).encode(),
    )


def _labels(records: Any, name: str, in_records: bool) -> np.ndarray | None:
    """Returns the labels [images], -1 for images without one; None if no image has one.

    They are the attribute `labels` of the records, or else are read from each.
    """
    if hasattr(records, "labels"):
        labels = np.asarray(records.labels)
    elif not in_records:
        return None
    else:
        found = []
        with progress.bar(
            len(records), unit="img", description=f"labels of {name}", delay=1.0
        ) as bar:
            for i in range(len(records)):
                label = records[i].get("label")
                found.append(-1 if label is None else label)
                bar.update(1)
        labels = np.asarray(found)
    if labels.shape != (len(records),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"the labels of {name} must be {len(records)} integers; got {labels.dtype} of shape "
            f"{labels.shape}"
        )
    return None if labels.max() < 0 else np.maximum(labels, -1).astype(np.int32)


class _Records:
    """Records with their labels."""

    def __init__(self, records: Any, labels: np.ndarray | None):
        self._records = records
        self.labels = labels
        if hasattr(records, "record_name"):
            self.record_name = records.record_name

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = -1 if self.labels is None else self.labels[index]
        return {"image": self._records[index]["image"], "label": label}
