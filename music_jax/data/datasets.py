"""Which sources a config names: what is trained on, and what the backbone is probed with."""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from ml_collections import config_dict

from music_jax.config.values import normalize_path
from music_jax.data import folder, packed, sources
from music_jax.data.sources import Source
from music_jax.errors import NotMeasurableError, UserError

_TEST_SPLIT = "test"  # the config's default: a dataset need not have it
_VERSION = re.compile(r"\d+\.(\d+|\*)\.(\d+|\*)")


class EvaluationSources(NamedTuple):
    """Labeled images with the same classes, to train classifiers on and to test them with."""

    train: Source
    test: Source


_FIELDS = ("dataset.name", "evaluation.train", "evaluation.test")


def prepare(config: config_dict.ConfigDict, fields: Collection[str] = _FIELDS) -> None:
    """Prepares the TFDS datasets that a config names.

    Args:
      config: The config.
      fields: Fields whose datasets are prepared; others are left as they are.

    Raises:
      UserError: as `sources.prepare`.
    """
    parts = [part for part in ("train", "test") if f"evaluation.{part}" in fields]
    named = [_tfds_set(config, config.evaluation[part]) for part in parts]
    if "dataset.name" in fields and not config.dataset.path:
        named.append((config.dataset, ""))
    for dataset in {found[0].name: found[0] for found in named if found}.values():
        sources.prepare(dataset)


def training_source(config: config_dict.ConfigDict) -> Source:
    """What is trained on: the images below `dataset.path`, or a split of a TFDS dataset.

    Raises:
      UserError: it is not there or cannot be used.
    """
    if config.dataset.path:
        return open_path(config.dataset.path)
    return sources.open_source(config.dataset, config.dataset.train_split)


def evaluation_sources(
    config: config_dict.ConfigDict, training: Source | None = None
) -> EvaluationSources:
    """Opens what the backbone is probed with.

    Args:
      config: its part `evaluation` names the sources.
      training: what `training_source` gave, if it was opened before; else it is opened only if
        `evaluation.train` does not name other images.

    Raises:
      NotMeasurableError: there are no images to test with, or too few labels.
      UserError: a source is not there, or the two have different classes.
    """
    test = _test_source(config)
    if test is None:
        raise NotMeasurableError(
            _no_test_images(config) + "; name labeled images with --config.evaluation.test=, and "
            "--config.evaluation.train= to learn from"
        )
    if normalize_path(config.evaluation.train) not in ("", normalize_path(config.dataset.path)):
        train = open_named(config, config.evaluation.train)
    else:
        train = training_source(config) if training is None else training
    for source, field, classes in ((train, "evaluation.train", 2), (test, "evaluation.test", 1)):
        if missing := _missing_labels(source, classes):
            raise NotMeasurableError(
                f"{source.name} cannot be evaluated with: {missing}; name a labeled set with "
                f"--config.{field}=, a folder or NAME:SPLIT of TFDS"
            )
    return EvaluationSources(train, _with_classes(test, train))


def evaluation_images(config: config_dict.ConfigDict) -> Source:
    """Opens what is measured without labels: the images to test with, or else of the training.

    Raises:
      UserError: they are not there.
    """
    test = _test_source(config)
    return training_source(config) if test is None else test


def _test_source(config: config_dict.ConfigDict) -> Source | None:
    """The images to test with; None if there are none.

    The default of `dataset.test_split` need not be there; any other split that is named must.
    """
    if config.evaluation.test:
        return open_named(config, config.evaluation.test)
    dataset = config.dataset
    if config.evaluation.train and dataset.path:
        raise UserError(
            "config.evaluation.train is given but not config.evaluation.test; name both, or "
            "none for no probe"
        )
    if dataset.path or not dataset.test_split:
        return None
    if dataset.test_split == _TEST_SPLIT and not sources.has_split(dataset, _TEST_SPLIT):
        return None
    return sources.open_source(dataset, dataset.test_split)


def _no_test_images(config: config_dict.ConfigDict) -> str:
    if config.dataset.path or not config.dataset.test_split:
        return "there are no images to test with"
    return f"{config.dataset.name} has no split {config.dataset.test_split!r} to test with"


def _missing_labels(source: Source, classes: int) -> str:
    """What a source lacks to be evaluated with; nothing if it has images of so many classes."""
    if source.no_classes:
        return source.no_classes
    if source.num_classes < classes:
        few = "one of two or more class folders" if classes > 1 else "a class folder"
        return f"every image must lie in {few}"
    found = source.count_classes(classes)
    if found >= classes:
        return ""
    if not found:
        return f"none of its {len(source):,} images has a label"
    return f"those of its {len(source):,} images that have a label are all of one class"


def open_path(path: str) -> Source:
    """Opens a folder of images, or what `music_jax.pack` made of one.

    Raises:
      UserError: there is no such folder, or nothing in it that can be used.
    """
    return packed.open_packed(path) if packed.is_packed(path) else folder.open_folder(path)


def open_named(config: config_dict.ConfigDict, name: str, *, prepare: bool = False) -> Source:
    """Opens a folder, or a split of a TFDS dataset: `NAME:SPLIT`, or with a config and a version.

    Args:
      config: its part `dataset` says where TFDS's files are and how their features are called.
      name: the folder, or dataset and split.
      prepare: prepares a TFDS dataset first, if it is not yet.

    Raises:
      UserError: it is neither.
    """
    found = _tfds_set(config, name)
    if found and prepare:
        sources.prepare(found[0])
    return sources.open_source(*found) if found else open_path(name)


def _tfds_set(
    config: config_dict.ConfigDict, name: str
) -> tuple[config_dict.ConfigDict, str] | None:
    """The `dataset` part and the split that a name stands for; None if it is a folder."""
    *first, split = _parts(name)
    if not first or os.path.isdir(os.path.expanduser(name)):
        return None
    dataset = config_dict.ConfigDict(config.dataset.to_dict())
    dataset.name = ":".join(first)
    return dataset, split


def parse_pair(spec: str) -> tuple[str, str] | None:
    """Divides the names of two sets, to learn from and to test on, that a colon joins.

    Each is a folder that is there, or a split of TFDS as `open_named` takes it. Of two splits of
    one dataset its name is given once: `NAME:TRAIN:TEST`, or `NAME:VERSION:TRAIN:TEST`. Where a
    text can be read in several ways, it is two folders, or else one dataset, or else any two sets;
    `./FOLDER` is always a folder.

    Returns:
      The two names, each as `open_named` takes it; None if there is no way to read the text.

    Example:
      >>> from music_jax.data.datasets import parse_pair
      >>> parse_pair("cifar10:3.0.2:train[:90%]:test")
      ('cifar10:3.0.2:train[:90%]', 'cifar10:3.0.2:test')
      >>> parse_pair("mnist:train:digits:1.0.0:test")
      ('mnist:train', 'digits:1.0.0:test')
    """
    parts = _parts(spec)
    if not all(parts):
        return None
    pairs = [(":".join(parts[:i]), ":".join(parts[i:])) for i in range(1, len(parts))]
    for pair in pairs:
        if all(map(_is_there, pair)):
            return pair
    *first, train, test = parts if len(parts) > 2 else ["", ""]
    if _is_split([*first, train]) and _is_split([*first, test]):
        return ":".join([*first, train]), ":".join([*first, test])
    for pair in pairs:
        if all(_is_there(name) or _is_split(_parts(name)) for name in pair):
            return pair
    return None


def _is_there(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _is_split(parts: list[str]) -> bool:
    """Whether these may be the parts of a split of TFDS: `NAME:SPLIT` or `NAME:VERSION:SPLIT`."""
    if not 2 <= len(parts) <= 3 or parts[0][:1] in ("", ".", "/", "~"):
        return False
    *version, split = parts[1:]
    if "/" in split or _VERSION.fullmatch(split):
        return False
    return all(map(_VERSION.fullmatch, version))


def _parts(spec: str) -> list[str]:
    """The parts between colons that are not in brackets, as in `train[:90%]`."""
    parts, depth = [""], 0
    for character in spec:
        depth += (character == "[") - (character == "]")
        if character == ":" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


class _Relabeled:
    """Records whose labels are replaced by a table."""

    def __init__(self, source: Source, table: np.ndarray):
        self._source, self._table = source, table

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        encoded, label = self._source.example(index)
        return {"image": encoded, "label": self._table[label] if label >= 0 else -1}

    def record_name(self, index: int) -> str:
        return self._source.record_name(index)

    @property
    def labels(self) -> np.ndarray | None:
        known = getattr(self._source.records, "labels", None)
        return None if known is None else np.where(known >= 0, self._table[known], -1)


def _with_classes(test: Source, train: Source) -> Source:
    """The test source with the training source's numbers for the classes of the same names.

    Names that differ in Unicode normalization alone are the same, unless one source has both forms.
    """
    if test.class_names == train.class_names:
        return test
    test_names, train_names = (_alike(source.class_names) for source in (test, train))
    if test_names is None or train_names is None:
        test_names, train_names = test.class_names, train.class_names
    numbers = {name: number for number, name in enumerate(train_names)}
    unknown = [name for name in test_names if name not in numbers]
    if unknown:
        raise UserError(
            f"{test.name} has classes that {train.name} has not: {', '.join(unknown[:3])}"
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            + "; both must name their classes alike"
        )
    table = np.asarray([numbers[name] for name in test_names], np.int32)
    return dataclasses.replace(
        test,
        records=_Relabeled(test, table),
        image_key="image",
        label_key="label",
        num_classes=train.num_classes,
        class_names=train.class_names,
    )


def _alike(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names in Unicode's form NFC; None if two of them are the same then."""
    found = tuple(unicodedata.normalize("NFC", name) for name in names)
    return found if len(set(found)) == len(found) else None
