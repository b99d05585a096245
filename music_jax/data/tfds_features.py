"""Features of TFDS datasets as images and labels."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np

from music_jax.data.labels import are_too_many, by_class, read_values
from music_jax.data.order import evenly_spaced
from music_jax.data.sources import Source
from music_jax.errors import UserError

DEFAULT_LABEL_KEY = "label"  # the config's default, which a dataset need not have

_LOOKED_AT = 16  # records, to check their labels
_OUTCOMES = {"positive": 1, "negative": 0}  # in CheXpert, besides `uncertain` and `unmentioned`
_KINDS = "a ClassLabel, an int, bool or text, or an array or sequence of classes"

Read = Callable[[dict], Any]  # from a record


class Labels(NamedTuple):
    """The labels of a dataset.

    Attributes:
      read: Function from a record to its label, as `Source` takes it.
      class_names: Names of the classes.
      multi_label: Whether an image may have several classes.
      known: Labels of all images, if they have been read, int32 [images].
      missing: Reason why there are no labels, or "".
    """

    read: Read | None = None
    class_names: tuple[str, ...] = ()
    multi_label: bool = False
    known: np.ndarray | None = None
    missing: str = ""


class _Column(NamedTuple):
    """A feature as one class or several."""

    names: tuple[str, ...]
    convert: Callable[[Any], Iterable[int]]  # from a value to -1, 0 or 1 for each class


def keys_of(text: str) -> list[str]:
    """Splits a field such as `dataset.label_key` at its commas."""
    return [key.strip() for key in text.split(",")]


def find_feature(features: Any, key: str) -> Any:
    """Returns the feature at a path such as `attributes/Male`; None if there is none."""
    import tensorflow_datasets as tfds

    repeated = False
    for part in [key] if key in features else key.split("/"):
        if isinstance(features, tfds.features.Sequence):
            features, repeated = features.feature, True
        if not isinstance(features, tfds.features.FeaturesDict) or part not in features:
            return None
        features = features[part]
    return tfds.features.Sequence(features) if repeated else features


def value_at(record: dict, key: str) -> Any:
    """Returns the value of the feature at a path."""
    value: Any = record
    for part in [key] if key in record else key.split("/"):
        value = value[part]
    return value


def image_reader(features: Any, key: str, dataset: str) -> Read:
    """Returns a function from a record to its image.

    The channels of an image may be several features, whose names commas separate; all are resized
    to the size of the largest.

    Raises:
      UserError: There is no such feature, or it is no image.
    """
    keys = keys_of(key)
    for name in keys:
        feature = find_feature(features, name)
        if feature is None:
            raise UserError(
                f"dataset {dataset!r} has no feature {name!r}; it has {sorted(features)}"
            )
        if not _is_image(feature):
            usable = [name for name, feature in sorted(features.items()) if _is_image(feature)]
            advice = "none is"
            if usable:
                advice = f"name one or several of {usable} with --config.dataset.image_key=A,B"
            raise UserError(
                f"the feature {name!r} of dataset {dataset!r} is not an Image, nor a Tensor of "
                f"numbers [height, width, channels]; {advice}"
            )
    if len(keys) > 1:
        return lambda record: _stack([value_at(record, name) for name in keys])
    return lambda record: value_at(record, key)


def _is_image(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        return True
    is_tensor = isinstance(feature, tfds.features.Tensor) and len(feature.shape) in (2, 3)
    return is_tensor and np.dtype(feature.np_dtype).kind in "biuf"


def _stack(channels: list[np.ndarray]) -> np.ndarray:
    arrays = [x if x.ndim == 3 else x[..., None] for x in map(np.asarray, channels)]
    height, width = max((x.shape[:2] for x in arrays), key=np.prod)
    for i, x in enumerate(arrays):
        if x.shape[:2] != (height, width):
            x = x if x.dtype in (np.uint8, np.uint16, np.float32) else x.astype(np.float32)
            resized = cv2.resize(x, (width, height), interpolation=cv2.INTER_LINEAR)
            arrays[i] = resized.reshape(height, width, -1)
    return np.concatenate(arrays, axis=2)


def open_labels(features: Any, dataset: str, source: Source) -> Labels:
    """Finds the labels of a dataset.

    Args:
      features: Features of the dataset.
      dataset: Name of the dataset, for messages.
      source: A split without its labels. Its `label_key` is a feature, a path, or several with
        commas between. All records are read if only they tell the classes: distinct integers, or
        distinct texts.

    Raises:
      UserError: There is no such feature, or the labels of some records do not fit it.
    """
    import tensorflow_datasets as tfds

    key = source.label_key
    keys = keys_of(key)
    for part in keys:
        if find_feature(features, part) is None:
            if key in (DEFAULT_LABEL_KEY, ""):
                return Labels(missing=f"{dataset} has no feature {key!r}, only {sorted(features)}")
            raise UserError(
                f"dataset {dataset!r} has no feature {part!r}; it has {sorted(features)}"
            )
    feature = find_feature(features, key) if len(keys) == 1 else None
    if isinstance(feature, tfds.features.FeaturesDict):
        columns = [(f"{key}/{name}", name, feature[name]) for name in sorted(feature)]
    else:
        columns = [(part, part, find_feature(features, part)) for part in keys]
    if feature is not None and len(columns) == 1 and not feature.shape:
        return _one_class(feature, source)
    return _several_classes(columns, source, prefixed=len(columns) > 1)


def _one_class(feature: Any, source: Source) -> Labels:
    """Returns the labels of a scalar feature."""
    import tensorflow_datasets as tfds

    key = source.label_key

    def read(record: dict) -> Any:
        return value_at(record, key)

    if isinstance(feature, tfds.features.ClassLabel):
        return Labels(read, tuple(feature.names))
    if feature.np_dtype == np.bool_:
        return Labels(read, ("False", "True"))
    is_text = isinstance(feature, tfds.features.Text)
    if not (is_text or np.dtype(feature.np_dtype).kind in "iu"):
        return Labels(missing=f"its feature {key!r} is a {_kind(feature)}; labels are {_KINDS}")

    def distinct(record: dict) -> Any:
        value = read(record)
        return value.decode(errors="surrogateescape") if is_text else int(value)

    def has_class(value: Any) -> bool:
        return value is not None and (value != "" if is_text else value >= 0)

    values = read_values(len(source), lambda i: _try(distinct, source, i), source.name)
    classes = sorted(set(filter(has_class, values)))
    if are_too_many(len(classes), len(source)):
        return Labels(
            missing=f"its feature {key!r} has {len(classes):,} values in {len(source):,} images, "
            "too many for classes"
        )
    numbers = {value: number for number, value in enumerate(classes)}
    known = [-2 if value is None else numbers.get(value, -1) for value in values]
    return Labels(
        lambda record: numbers.get(distinct(record), -1),
        tuple(map(str, classes)),
        known=np.asarray(known, np.int32),
    )


def _try(read: Read, source: Source, index: int) -> Any:
    """Reads a record; returns None if it is damaged."""
    try:
        return read(source.record(index))
    except Exception:  # whatever TFDS raises on damage
        return None


def _several_classes(
    features: list[tuple[str, str, Any]], source: Source, *, prefixed: bool
) -> Labels:
    """Returns the labels of several features, or of one that has several classes.

    Args:
      features: Path, name and feature of each.
      source: Source, of which a few records are read.
      prefixed: Whether the names of classes begin with that of their feature.
    """
    some = evenly_spaced(len(source), _LOOKED_AT)
    examples = [x for x in (_try(lambda record: record, source, i) for i in some) if x is not None]
    columns: list[tuple[str, _Column]] = []
    for path, title, feature in features:
        values = [value_at(example, path) for example in examples]
        column = _column(title, feature, values[0] if values else (), prefixed)
        if column is None:
            return Labels(
                missing=f"its feature {path!r} is a {_kind(feature)}; labels are {_KINDS}"
            )
        try:
            for value in values:
                by_class([*column.convert(value)], len(column.names))
        except ValueError as error:
            raise UserError(
                f"the labels in the feature {path!r} of {source.name} cannot be read: {error}; "
                "name other features with --config.dataset.label_key="
            ) from error
        columns.append((path, column))

    def read(record: dict) -> np.ndarray:
        parts = (column.convert(value_at(record, path)) for path, column in columns)
        return np.fromiter(itertools.chain.from_iterable(parts), np.int8)

    names = tuple(name for _, column in columns for name in column.names)
    return Labels(read, names, multi_label=True)


def _column(title: str, feature: Any, example: Any, prefixed: bool) -> _Column | None:
    """Returns the classes of a feature; None if it is of another kind.

    A scalar of two values is one class, one of K values is K classes.
    """
    import tensorflow_datasets as tfds

    prefix = f"{title}: " if prefixed else ""
    inner = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
    if not isinstance(inner, tfds.features.Tensor) or np.dtype(inner.np_dtype).kind not in "iub":
        return None
    if isinstance(inner, tfds.features.ClassLabel):
        names = tuple(f"{prefix}{name}" for name in inner.names)
        if inner is feature:
            if len(names) == 2:
                return _Column((title,) if inner.names == ["0", "1"] else names[1:], _one)
            return _Column(names, lambda value: _numbers([value], len(names)))
        if _OUTCOMES.keys() <= set(inner.names):
            outcomes = np.asarray([_OUTCOMES.get(name, -1) for name in inner.names])
            names = tuple(f"{prefix}{i}" for i in range(len(example)))
            return _Column(names, lambda value: outcomes[np.asarray(value)])
        return _Column(names, lambda value: _numbers(value, len(names)))
    if not feature.shape:
        return _Column((title,), _one)
    if len(feature.shape) != 1 or feature.shape[0] is None:
        return None
    names = tuple(f"{prefix}{i}" for i in range(feature.shape[0]))
    return _Column(names, lambda value: value)


def _one(value: Any) -> tuple[int]:
    return (int(value),)


def _numbers(values: Any, num_classes: int) -> np.ndarray:
    """Returns the label of an image with these classes; negative numbers are unknown."""
    found = np.asarray(values, np.int64).reshape(-1)
    if np.any(found < 0):
        return np.full(num_classes, -1, np.int8)
    return np.isin(np.arange(num_classes), found).astype(np.int8)


def _kind(feature: Any) -> str:
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence):
        return f"Sequence of {_kind(feature.feature)}"
    name = type(feature).__name__
    if isinstance(feature, tfds.features.Tensor):
        return f"{name} of {np.dtype(feature.np_dtype).name}"
    return name
