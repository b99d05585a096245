"""Which sources a config names: what is trained on, and what the backbone is probed with."""

import dataclasses
import os
import unicodedata
from typing import NamedTuple

import numpy as np
from ml_collections import config_dict

from music_jax.data import folder, packed, sources
from music_jax.data.sources import Source
from music_jax.errors import UserError
from music_jax.paths import normalized


class EvaluationSources(NamedTuple):
    """Labelled images with the same classes, to train classifiers on and to test them with."""

    train: Source
    test: Source


def prepare(config: config_dict.ConfigDict) -> None:
    """Prepares every TFDS dataset that a config names.

    Raises:
      UserError: as `sources.prepare`.
    """
    named = [_tfds_set(config, spec) for spec in (config.evaluation.train, config.evaluation.test)]
    if not config.dataset.path:
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
    config: config_dict.ConfigDict, training: Source
) -> EvaluationSources | None:
    """What the backbone is probed with, or None if the config names nothing to test with.

    Args:
      config: its part `evaluation` names the sources.
      training: what `training_source` gave.

    Raises:
      UserError: a source is not there, has no labels, or the two have different classes.
    """
    if not config.evaluation.test and config.dataset.path:
        if config.evaluation.train:
            raise UserError(
                "config.evaluation.train is given but not config.evaluation.test; name both, or "
                "none for no probe"
            )
        return None
    train, test = training, None
    if normalized(config.evaluation.train) not in ("", normalized(config.dataset.path)):
        train = open_named(config, config.evaluation.train)
    if config.evaluation.test:
        test = open_named(config, config.evaluation.test)
    else:
        test = sources.open_source(config.dataset, config.dataset.test_split)
    for source, field in ((train, "evaluation.train"), (test, "evaluation.test")):
        if source.num_classes < 2:
            raise UserError(
                f"{source.name} cannot be evaluated with: every image must lie in one of two or "
                f"more class folders; name a labelled set with --config.{field}=, a folder or "
                "NAME:SPLIT of TFDS"
            )
    return EvaluationSources(train, _with_classes(test, train))


def open_path(path: str) -> Source:
    """Opens a folder of images, or what `music_jax.pack` made of one.

    Raises:
      UserError: there is no such folder, or nothing in it that can be used.
    """
    return packed.open_packed(path) if packed.is_packed(path) else folder.open_folder(path)


def open_named(config: config_dict.ConfigDict, name: str, *, prepare: bool = False) -> Source:
    """Opens a folder, or a split of a TFDS dataset written `NAME:SPLIT`.

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
    """The `dataset` part and the split that `NAME:SPLIT` stands for; None if it is a folder."""
    if ":" not in name or os.path.isdir(os.path.expanduser(name)):
        return None
    dataset = config_dict.ConfigDict(config.dataset.to_dict())
    dataset.name, _, split = name.partition(":")
    return dataset, split


class _Relabelled:
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
        records=_Relabelled(test, table),
        image_key="image",
        label_key="label",
        num_classes=train.num_classes,
        class_names=train.class_names,
    )


def _alike(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names in Unicode's form NFC; None if two of them are the same then."""
    found = tuple(unicodedata.normalize("NFC", name) for name in names)
    return found if len(set(found)) == len(found) else None
