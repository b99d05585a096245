"""Registered datasets as sources."""

import concurrent.futures
import json
from typing import Any

import numpy as np
from ml_collections import config_dict

from music_jax import registry
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.errors import UserError

_LOOKED_AT = 16  # records


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
    try:
        records = registry.DATASETS[dataset.name](split, **options)
    except OSError as error:
        raise UserError(f"cannot open {name}: {error}") from error
    if records is None:
        return None
    if not (hasattr(records, "__len__") and hasattr(records, "__getitem__")):
        raise UserError(
            f"the dataset {dataset.name!r} must give an object with len() and [index] for each "
            f"split; got {type(records).__name__} for {split!r}"
        )
    if not len(records):
        raise UserError(f"{name} has no images")
    labels = _labels(records, name)
    class_names = tuple(getattr(records, "class_names", ()))
    found = max(int(labels.max()) + 1, 0)
    if class_names and found > len(class_names):
        raise UserError(f"{name} has the label {found - 1}, but {len(class_names)} class names")
    content = json.dumps([name, options, class_names], sort_keys=True).encode()
    return Source(
        name=name,
        records=_Records(records, labels),
        image_key="image",
        label_key="label",
        num_classes=len(class_names) or found,
        class_names=class_names,
        no_classes="" if found else f"none of the {len(records):,} images of {name} has a label",
        identity=lambda _: content + labels.tobytes(),
    )


def _labels(records: Any, name: str) -> np.ndarray:
    """Returns the labels, int32 [images]: -1 for images without one, -2 for damaged records.

    They are the attribute `labels` of the records. Otherwise they are read from each record, unless
    a few records, evenly spaced, have no label.
    """
    if hasattr(records, "labels"):
        labels = np.asarray(records.labels)
    else:
        some = np.unique(np.linspace(0, len(records) - 1, _LOOKED_AT, dtype=np.int64))
        if all(_label(records, int(index), name) is None for index in some):
            return np.full(len(records), -1, np.int32)
        with (
            concurrent.futures.ThreadPoolExecutor() as pool,
            progress.bar(
                len(records), unit="img", description=f"labels of {name}", delay=1.0
            ) as bar,
        ):
            found = []
            for label in pool.map(lambda i: _label(records, i, name), range(len(records))):
                found.append(-1 if label is None else label)
                bar.update(1)
        labels = np.asarray(found)
    if labels.shape != (len(records),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"the labels of {name} must be {len(records)} integers; got {labels.dtype} of shape "
            f"{labels.shape}"
        )
    return np.maximum(labels, -2).astype(np.int32)


def _label(records: Any, index: int, name: str) -> Any:
    try:
        record = records[index]
    except Exception:  # Whatever the user's code raises; the image is skipped when it is read.
        return -2
    if not isinstance(record, dict) or "image" not in record:
        raise UserError(
            f"the records of {name} must be dictionaries with the key 'image'; got {record!r:.100}"
        )
    return record.get("label")


class _Records:
    """Records with their labels."""

    def __init__(self, records: Any, labels: np.ndarray):
        self._records, self.labels = records, labels

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._records[index]["image"], "label": self.labels[index]}
