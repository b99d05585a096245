"""Opens the sources that a config names: the images to train on, and those to evaluate with."""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import numpy as np
from ml_collections import config_dict

from music_jax import registry
from music_jax.config import normalize_path
from music_jax.data import hf_source, registered, tfds_source
from music_jax.data.decode import decode
from music_jax.data.folder import open_folder
from music_jax.data.loader import evaluation_batches
from music_jax.data.order import evenly_spaced
from music_jax.data.packed import is_packed, open_packed
from music_jax.data.sources import Source
from music_jax.errors import (
    MissingSplitError,
    NotMeasurableError,
    UndecodableError,
    UnexpectedPixelsError,
    UserError,
    first_of,
)

_LOOKED_AT = 8  # images
_TEST_SPLIT = "test"  # the config's default, which a dataset need not have
_VERSION = re.compile(r"\d+\.(\d+|\*)\.(\d+|\*)")
_FIELDS = ("dataset.name", "evaluation.train", "evaluation.test")


class EvaluationSources(NamedTuple):
    """Labeled images with the same classes, to train classifiers on and to test them with."""

    train: Source
    test: Source


def load_images(
    config: config_dict.ConfigDict,
    split: Literal["train", "test"] = "test",
    *,
    at_most: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Loads the images that a config names as arrays, cut as for evaluation.

        images, labels = load_images(music_jax.config.from_file("configs/digits.py"))

    Args:
      config: Config that names the dataset and the size of the images.
      split: `train` for the images to train on, `test` for those to test with.
      at_most: Maximum number of images, from the first; by default all.

    Returns:
      Images [images, size, size, channels] of `dataset.pixel_type`, and their labels as
      `Source.no_labels` describes them.

    Raises:
      UserError: The dataset does not exist or cannot be prepared, or has no images to test with.
      UnusableDataError: An image cannot be decoded.
    """
    prepare(config)
    source = evaluation_sources(config).test if split == "test" else training_source(config)
    wanted = np.arange(min(len(source), at_most or len(source)))
    (batch,) = evaluation_batches(
        source.subset(wanted),
        size=config.crop.size,
        resize_shorter_side=config.crop.eval_resize,
        channels=config.dataset.num_channels,
        dtype=config.dataset.pixel_type,
        batch_size=len(wanted),
        positions=wanted,
    )
    return batch["images"], batch["label"]


def prepare(config: config_dict.ConfigDict, fields: Collection[str] = _FIELDS) -> None:
    """Prepares the datasets of TFDS and Hugging Face that some fields of a config name.

    Raises:
      UserError: A dataset is unknown or cannot be prepared.
    """
    parts = [part for part in ("train", "test") if f"evaluation.{part}" in fields]
    named = [_dataset_split(config, config.evaluation[part]) for part in parts]
    if "dataset.name" in fields and not config.dataset.path:
        named.append((config.dataset, ""))
    for dataset in {found[0].name: found[0] for found in named if found}.values():
        _library(dataset).prepare(dataset)


def training_source(config: config_dict.ConfigDict) -> Source:
    """Opens the images to train on: those in `dataset.path`, or a split of a dataset.

    Raises:
      UserError: They do not exist or cannot be used.
    """
    dataset, path = config.dataset, config.dataset.path
    if path:
        return check_pixels(config, open_path(path))
    return check_pixels(config, _library(dataset).open_split(dataset, dataset.train_split))


def evaluation_sources(
    config: config_dict.ConfigDict, training: Source | None = None
) -> EvaluationSources:
    """Opens the images to evaluate the backbone with.

    If `evaluation.train` names no others, these are the images to train on: `training`, or else
    the result of `training_source`.

    Raises:
      NotMeasurableError: There are no images to test with, or too few labels.
      UserError: A source does not exist, or the two have different classes.
    """
    test = _test_source(config)
    if test is not None:
        test = check_pixels(config, test)
    else:
        dataset = config.dataset
        if dataset.path or not dataset.test_split:
            problem = "there are no images to test with"
        else:
            problem = f"{dataset.name} has no split {dataset.test_split!r} to test with"
        raise NotMeasurableError(
            f"{problem}; name labeled images with --config.evaluation.test=, and "
            "--config.evaluation.train= to learn from"
        )
    if normalize_path(config.evaluation.train) not in ("", normalize_path(config.dataset.path)):
        train = check_pixels(config, open_named(config, config.evaluation.train))
    else:
        train = training_source(config) if training is None else training
    for source, field, classes in ((train, "evaluation.train", 2), (test, "evaluation.test", 1)):
        if missing := _missing_labels(source, classes):
            raise NotMeasurableError(
                f"{source.name} cannot be used for evaluation: {missing}; name a labeled set with "
                f"--config.{field}=, a folder or NAME:SPLIT of TFDS"
            )
    return EvaluationSources(train, _with_classes(test, train))


def evaluation_images(config: config_dict.ConfigDict) -> Source:
    """Opens the images for measures without labels: those to test with, or else to train on.

    Raises:
      UserError: They do not exist or cannot be used.
    """
    test = _test_source(config)
    return training_source(config) if test is None else check_pixels(config, test)


def _test_source(config: config_dict.ConfigDict) -> Source | None:
    """Opens the images to test with; returns None if there are none.

    The default of `dataset.test_split` need not exist; any other split that is named must.
    """
    if config.evaluation.test:
        return open_named(config, config.evaluation.test)
    dataset = config.dataset
    if config.evaluation.train and dataset.path:
        raise UserError(
            "config.evaluation.train is given but not config.evaluation.test; name both, or "
            "neither for no probe"
        )
    if dataset.path or not dataset.test_split:
        return None
    try:
        return _library(dataset).open_split(dataset, dataset.test_split)
    except MissingSplitError:
        if dataset.test_split != _TEST_SPLIT:
            raise
        return None


def check_pixels(config: config_dict.ConfigDict, source: Source) -> Source:
    """Returns a source, after checking that an image has the config's channels and type.

    Raises:
      UserError: None of a few images has them.
    """
    problem, dataset = "", config.dataset
    for index in evenly_spaced(len(source), _LOOKED_AT):
        try:
            decode(source.example(index)[0], dataset.num_channels, dtype=dataset.pixel_type)
            return source
        except UnexpectedPixelsError as error:
            problem = problem or f"image {source.record_name(index)} of {source.name}: {error}"
        except UndecodableError:  # skipped when it is read again
            pass
    if problem:
        raise UserError(
            f"{problem}; set config.dataset.num_channels and config.dataset.pixel_type, now "
            f"{dataset.num_channels} and {dataset.pixel_type}, to those of the images"
        )
    return source


def _library(dataset: config_dict.ConfigDict) -> Any:
    """Returns the module whose `prepare` and `open_split` are for a dataset.

    Raises:
      UserError: The dataset is not registered, but has options.
    """
    if dataset.name in registry.DATASETS:
        return registered
    if dataset.options:
        raise UserError(
            f"dataset {dataset.name!r} is not registered; name the module that registers it with "
            "--import=MODULE"
        )
    return hf_source if dataset.name.startswith(hf_source.PREFIX) else tfds_source


def _missing_labels(source: Source, classes: int) -> str:
    """Returns why a source does not have images of `classes` classes, or "" if it has."""
    if source.no_classes:
        return source.no_classes
    if source.multi_label:
        return "" if source.count_classes(1) else "none of its images has a class"
    if source.num_classes < classes:
        folder = "one of two or more class folders" if classes > 1 else "a class folder"
        return f"every image must be in {folder}"
    found = source.count_classes(classes)
    if found >= classes:
        return ""
    if not found:
        return f"none of its {len(source):,} images has a label"
    return f"those of its {len(source):,} images that have a label are all of one class"


def open_path(path: str) -> Source:
    """Opens a folder of images, or the result of `music_jax.pack`.

    Raises:
      UserError: There is no such folder, or it holds nothing that can be used.
    """
    return open_packed(path) if is_packed(path) else open_folder(path)


def open_named(config: config_dict.ConfigDict, name: str, *, prepare: bool = False) -> Source:
    """Opens a folder, or a split of a dataset: `NAME:SPLIT`, or with a config and a version.

    The config has the directory of the datasets and the names of the features. With `prepare`, the
    dataset is prepared first.

    Raises:
      UserError: There is no such folder or split.
    """
    found = _dataset_split(config, name)
    if found is None:
        return open_path(name)
    dataset, split = found
    if prepare:
        _library(dataset).prepare(dataset)
    return _library(dataset).open_split(dataset, split)


def _dataset_split(
    config: config_dict.ConfigDict, name: str
) -> tuple[config_dict.ConfigDict, str] | None:
    """Returns the group `dataset` and the split that a name stands for; None for a folder."""
    *first, split = _parts(name)
    if not first and name.startswith(hf_source.PREFIX):
        raise UserError(f"{name!r} names no split; add one, as in {name}:train")
    if not first or os.path.isdir(os.path.expanduser(name)):
        return None
    dataset = config_dict.ConfigDict(config.dataset.to_dict())
    dataset.name = ":".join(first)
    if dataset.name != config.dataset.name:
        dataset.options = {}  # They are those of the other dataset.
    return dataset, split


def parse_pair(spec: str) -> tuple[str, str] | None:
    """Splits a text into the names of two sets, one to train on and one to test on.

    The names are joined by a colon. Each is an existing folder, or a split as `open_named` takes
    it. The name of a dataset is given once for two splits of it: `NAME:TRAIN:TEST`, or
    `NAME:VERSION:TRAIN:TEST`. Ambiguous text is read as two folders, or else one dataset, or else
    any two sets; `./FOLDER` is always a folder.

    Returns:
      The two names, each as `open_named` takes it; None if the text cannot be parsed.

    Example:
      >>> from music_jax.data.datasets import parse_pair
      >>> parse_pair("cifar10:3.0.2:train[:90%]:test")
      ('cifar10:3.0.2:train[:90%]', 'cifar10:3.0.2:test')
      >>> parse_pair("mnist:train:digits:1.0.0:test")
      ('mnist:train', 'digits:1.0.0:test')
      >>> parse_pair("hf:ylecun/mnist:train:test")
      ('hf:ylecun/mnist:train', 'hf:ylecun/mnist:test')
    """
    parts = _parts(spec)
    if not all(parts):
        return None
    pairs = [(":".join(parts[:i]), ":".join(parts[i:])) for i in range(1, len(parts))]
    *first, train, test = parts if len(parts) > 2 else ["", ""]
    dataset = ":".join([*first, train]), ":".join([*first, test])
    found = [pair for pair in pairs if all(map(_exists, pair))]
    found += [dataset] * all(map(_is_split, dataset))
    found += [pair for pair in pairs if all(_exists(x) or _is_split(x) for x in pair)]
    return found[0] if found else None


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _is_split(name: str) -> bool:
    """Returns whether this can be `NAME:SPLIT` or `NAME:VERSION:SPLIT`."""
    parts = _parts(name)
    if not 2 <= len(parts) <= 3 or name[0] in ":./~" or "/" in parts[-1]:
        return False
    *version, split = (_VERSION.fullmatch(part) for part in parts[1:])
    return all(version) and not split


def _parts(spec: str) -> list[str]:
    """Splits a text at colons outside brackets such as `train[:90%]`, but not after `hf`."""
    return re.split(r"(?<!^hf)(?<!:hf):(?![^\[]*\])", spec)


def _with_classes(test: Source, train: Source) -> Source:
    """Returns the test source with the training source's numbers for classes of the same names.

    Names that differ only in Unicode normalization are the same, unless one source has both forms.
    """
    if test.multi_label != train.multi_label:
        several, one = (test, train) if test.multi_label else (train, test)
        raise UserError(
            f"images of {several.name} may have several classes, those of {one.name} one; "
            "the labels of both must be of one kind"
        )
    if not (test.class_names or train.class_names):
        if test.num_classes > train.num_classes:
            raise UserError(
                f"{test.name} has labels of {test.num_classes} classes, {train.name} of "
                f"{train.num_classes}; the labels of both must mean the same classes"
            )
        return dataclasses.replace(test, num_classes=train.num_classes)
    # A number is the name of a class without one, as in packed images.
    test_names, train_names = (
        source.class_names or tuple(map(str, range(source.num_classes))) for source in (test, train)
    )
    if test_names == train_names:
        return dataclasses.replace(test, class_names=train.class_names)
    test_nfc, train_nfc = _nfc(test_names), _nfc(train_names)
    if test_nfc is not None and train_nfc is not None:
        test_names, train_names = test_nfc, train_nfc
    numbers = {name: number for number, name in enumerate(train_names)}
    unknown = [name for name in test_names if name not in numbers]
    if unknown:
        raise UserError(
            f"{test.name} has classes that {train.name} does not have: {first_of(unknown)}; give "
            "the classes of both the same names"
        )
    return dataclasses.replace(
        test,
        num_classes=train.num_classes,
        class_names=train.class_names,
        numbers=np.asarray([numbers[name] for name in test_names], np.int32),
    )


def _nfc(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Returns the names in Unicode's form NFC; None if two of them become the same."""
    found = tuple(unicodedata.normalize("NFC", name) for name in names)
    return found if len(set(found)) == len(found) else None
