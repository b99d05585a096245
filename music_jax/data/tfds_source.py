"""TFDS datasets as sources, and their preparation."""

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import config_dict

import music_jax.workdir.files  # noqa: F401  (corrects the paths that TFDS uses)
from music_jax.data.sources import Source
from music_jax.data.tfds_features import image_reader, keys_of, open_labels
from music_jax.errors import MissingSplitError, UserError, one_line

_FEATURES = "tensorflow_datasets.core.features."
_feature_lock = threading.RLock()
_MAX_CACHED_BYTES = 64 * 2**20  # largest dataset whose records stay in memory


def open_split(dataset: config_dict.ConfigDict, split: str) -> Source:
    """Opens one split of a TFDS dataset that `prepare` has prepared.

    The images have no labels if `dataset.label_key` names a feature that is no label, or is "" or
    the default and there is no such feature; see `music_jax.data.tfds_features`.

    Args:
      dataset: Group `dataset` of the config.
      split: TFDS split such as `train` or `train[:90%]`.

    Raises:
      MissingSplitError: The dataset has no such split.
      UserError: The dataset was not prepared; the image or the label does not exist; or the format
        of the files does not allow random access.
    """
    import tensorflow_datasets as tfds

    builder = _builder(dataset)
    features = builder.info.features
    image_keys = keys_of(dataset.image_key)
    channels = image_keys if len(image_keys) > 1 else []  # of which an array is made
    decoders = {
        key: tfds.decode.SkipDecoding()
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
        and key not in channels
        and feature.np_dtype != np.float32  # whose bytes TFDS packs in those of four channels
    }
    try:
        records = builder.as_data_source(split=split, decoders=decoders)
    except Exception as error:  # whatever TFDS raises on an unknown split or damaged metadata
        if isinstance(error, NotImplementedError):  # the format has no random access
            problem = (
                f"{dataset.name!r} was prepared at {builder.data_path} in a format without random "
                "access; prepare it again elsewhere with --config.dataset.data_dir=DIR, which "
                "writes array_record files"
            )
        elif not builder.is_prepared():
            problem = (
                f"dataset {dataset.name!r} was not prepared in {builder.data_path}; name it with "
                f"--config.dataset.name={dataset.name} to prepare it, or give the directory where "
                "it was prepared with --config.dataset.data_dir=DIR"
            )
        else:
            problem = (
                f"cannot read split {split!r} of {dataset.name!r}, which has the splits "
                f"{sorted(builder.info.splits)}: {one_line(error)}"
            )
        is_missing = builder.is_prepared() and split not in builder.info.splits
        raise (MissingSplitError if is_missing else UserError)(problem) from error
    read_image = image_reader(features, dataset.image_key, dataset.name)
    read = records.__getitem__
    if builder.info.dataset_size <= _MAX_CACHED_BYTES:
        read = functools.cache(read)  # reading a record takes longer than decoding its image
    shards = [[s.name, s.num_bytes, list(s.shard_lengths)] for s in builder.info.splits.values()]
    stored = Source(
        name=f"{dataset.name}:{split}",
        size=len(records),
        read=read,
        image_key=dataset.image_key,
        label_key=dataset.label_key,
        identity=lambda _: json.dumps([builder.info.full_name, split, shards]).encode(),
    )
    labels = open_labels(features, dataset.name, stored)
    derive = {stored.image_key: read_image}
    if labels.read is not None:
        derive[stored.label_key] = labels.read

    def read_derived(index: int) -> dict:
        record = read(index)
        return record | {key: value_of(record) for key, value_of in derive.items()}

    return dataclasses.replace(
        stored,
        read=read_derived,
        num_classes=len(labels.class_names),
        class_names=labels.class_names,
        no_classes=labels.missing,
        known_labels=labels.known,
        multi_label=labels.multi_label,
    )


def prepare(dataset: config_dict.ConfigDict) -> None:
    """Writes the dataset's array_record files if they do not exist, downloading as TFDS does.

    Args:
      dataset: Group `dataset` of the config: `name`, `data_dir` (None for TFDS's own default),
        `manual_dir` (None for `downloads/manual` in it) and `try_gcs`.

    Raises:
      UserError: The dataset is unknown, cannot be written, or needs TensorFlow to be prepared while
        it is not installed.
    """
    import tensorflow_datasets as tfds

    builder = _builder(dataset)
    if builder.is_prepared():
        return
    manual_dir = os.path.expanduser(dataset.manual_dir or "") or None
    if manual_dir is not None:
        from music_jax.data.builders import idx_builder

        builder = idx_builder(builder, manual_dir) or builder
    if not type(builder).__module__.startswith("music_jax.data."):
        try:  # most other datasets import it
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            import tensorflow as tf

            for kind in ("GPU", "TPU"):  # hides them: TensorFlow would reserve their memory
                with contextlib.suppress(RuntimeError):  # TensorFlow is in use already
                    tf.config.set_visible_devices([], kind)
        except ImportError as error:
            raise UserError(
                f"preparing dataset {dataset.name!r} needs TensorFlow once; `pip install "
                "tensorflow`, or put array_record files prepared elsewhere into "
                "--config.dataset.data_dir"
            ) from error
    options = tfds.download.DownloadConfig(
        try_download_gcs=dataset.try_gcs,
        manual_dir=manual_dir,
    )
    try:
        builder.download_and_prepare(download_config=options, file_format="array_record")
    except UserError:
        raise
    except Exception as error:  # whatever TFDS raises on missing or damaged files
        if _builder(dataset).is_prepared():  # by another process in the meantime
            return
        if isinstance(error, OSError):
            advice = "choose another place with --config.dataset.data_dir=DIR"
        else:
            advice = "another place for such files is --config.dataset.manual_dir=DIR"
        raise UserError(
            f"cannot prepare dataset {dataset.name!r} in {builder.data_path}: {one_line(error)}; "
            f"{advice}"
        ) from error


def _builder(dataset: config_dict.ConfigDict) -> Any:
    import tensorflow_datasets as tfds

    import music_jax.data.builders  # noqa: F401  (registers the datasets of this package)

    if not dataset.name:
        raise UserError(
            "no dataset is named: give a TFDS name, such as mnist5k, with --config.dataset.name=, "
            "or a folder of images with --config.dataset.path="
        )
    if not (dataset.data_dir or "TFDS_DATA_DIR" in os.environ) and os.path.expanduser("~") == "~":
        raise UserError(
            "this user has no home directory to keep datasets in; set HOME, or give a directory "
            "with --config.dataset.data_dir=DIR"
        )
    try:
        if tfds.core.naming.parse_builder_name_kwargs(dataset.name)[0].namespace:
            raise UserError(
                f"dataset {dataset.name!r} is a community dataset of TFDS, whose code would be "
                "downloaded and run; give the name of one that TFDS itself has"
            )
        with _known_features_only():
            data_dir = os.path.expanduser(dataset.data_dir or "") or None
            builder = tfds.builder(dataset.name, data_dir=data_dir, file_format="array_record")
            _ = builder.info.features  # a dataset without code reads them from its files here
            return builder
    except UserError:
        raise
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        nearest = difflib.get_close_matches(dataset.name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"TFDS has no dataset {dataset.name!r}{hint}") from error
    except Exception as error:  # whatever TFDS raises on an unknown version or damaged metadata
        raise UserError(f"cannot open dataset {dataset.name!r}: {one_line(error)}") from error


@contextlib.contextmanager
def _known_features_only() -> Iterator[None]:
    """Keeps TFDS from importing a module because a dataset's features.json names a class in it.

    Classes of TFDS itself, and those that were imported before, are still found.
    """
    import tensorflow_datasets as tfds

    connector = tfds.features.FeatureConnector
    with _feature_lock:
        original = connector.__dict__["cls_from_name"]

        def known_class(cls: Any, name: str) -> Any:
            if name not in cls._registered_features and not name.startswith(_FEATURES):
                raise UserError(
                    f"the features.json of a dataset names the class {name!r}, which is not one of "
                    "TFDS; if you trust it, import its module first"
                )
            return original.__func__(cls, name)

        connector.cls_from_name = classmethod(known_class)
        try:
            yield
        finally:
            connector.cls_from_name = original
