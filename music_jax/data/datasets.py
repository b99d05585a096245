"""Which sources a config names: what is trained on, and what the backbone is probed with."""

import dataclasses
import os
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from ml_collections import config_dict

from music_jax.data import folder, packed, sources
from music_jax.data.sources import Source
from music_jax.errors import UserError


class EvaluationSources(NamedTuple):
    """Labelled images with the same classes, to train classifiers on and to test them with."""

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
    config: config_dict.ConfigDict, training: Source | None
) -> EvaluationSources | None:
    """What the backbone is probed with, or None if the config names nothing to test with.

    Args:
      config: its part `evaluation` names the sources.
      training: what `training_source` gave; None if the config names both sets.

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
    train = training
    if train is None or config.evaluation.train not in ("", config.dataset.path):
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
    """The test source with the training source's numbers for the classes of the same names."""
    if test.class_names == train.class_names:
        return test
    numbers = {name: number for number, name in enumerate(train.class_names)}
    unknown = [name for name in test.class_names if name not in numbers]
    if unknown:
        raise UserError(
            f"{test.name} has classes that {train.name} has not: {', '.join(unknown[:3])}"
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            + "; both must name their classes alike"
        )
    table = np.asarray([numbers[name] for name in test.class_names], np.int32)
    return dataclasses.replace(
        test,
        records=_Relabelled(test, table),
        image_key="image",
        label_key="label",
        num_classes=train.num_classes,
        class_names=train.class_names,
    )
