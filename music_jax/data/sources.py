"""Random access to a dataset's encoded images; here, those of any TFDS builder."""

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import config_dict

from music_jax.errors import UndecodableError, UserError
from music_jax.host_tensorflow import import_tensorflow

_KEPT_BYTES = 64 * 2**20  # of a dataset whose records stay in memory
_FINGERPRINTED = 64  # images whose contents a fingerprint depends on


@dataclasses.dataclass(frozen=True)
class _Selected:
    records: Any
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.records[int(self.indices[index])]

    def record_name(self, index: int) -> str:
        return _record_name(self.records, int(self.indices[index]))


def _record_name(records: Any, index: int) -> str:
    return getattr(records, "record_name", str)(index)


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a dataset, by index.

    Attributes:
      name: the dataset and the split, for messages.
      records: `len()` and `[index]`, giving dictionaries that hold the encoded image and the label;
        `record_name(index)`, if it is there, says what an image is called.
      image_key: where a record holds the encoded image's bytes.
      label_key: where it holds the integer label.
      num_classes: how many labels there are; 0 where the images have none.
      class_names: what the labels are called, if they have names.
      identity: what tells the records from others without reading them, such as the names and sizes
        of files; with `True` also the times at which these were modified.
      subset_of: images of the split that these are some of; None if they are all.
    """

    name: str
    records: Any
    image_key: str
    label_key: str
    num_classes: int
    class_names: tuple[str, ...] = ()
    identity: Callable[[bool], bytes] = lambda _: b""
    subset_of: int | None = None

    def __len__(self) -> int:
        return len(self.records)

    def subset(self, indices: np.ndarray) -> "Source":
        """The samples at these indices, in this order."""
        return dataclasses.replace(
            self,
            records=_Selected(self.records, indices),
            identity=lambda times: self.identity(times) + np.asarray(indices, np.int64).tobytes(),
            subset_of=self.split_size,
        )

    @property
    def split_size(self) -> int:
        """How many images the whole split has."""
        return len(self) if self.subset_of is None else self.subset_of

    def fingerprint(self, *, times: bool) -> str:
        """Returns a hash that changes when images are renamed, replaced, added or removed.

        It depends on the source's identity and on the contents of a few images, evenly spread.

        Args:
          times: Whether it may also change when a file was only copied or touched. Then no change
            of a file goes unnoticed.
        """
        digest = hashlib.sha256(self.identity(times))
        digest.update(len(self).to_bytes(8, "little"))
        for index in np.unique(np.linspace(0, len(self) - 1, _FINGERPRINTED, dtype=np.int64)):
            try:
                content = self.example(int(index))[0]
            except UndecodableError:
                content = b"unreadable"
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def record(self, index: int) -> dict:
        """What the records hold of an image.

        Raises:
          UndecodableError: the record is damaged.
        """
        try:
            return self.records[index]
        except UndecodableError:
            raise
        except Exception as error:  # whatever a format's reader raises on damage
            raise UndecodableError(
                f"its record cannot be read: {' '.join(str(error).split())[:300]}"
            ) from error

    def example(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label, -1 if it has none.

        Raises:
          UndecodableError: the record is damaged, or its label is none of the classes.
        """
        record = self.record(index)
        try:
            encoded, label = record[self.image_key], int(record[self.label_key])
        except Exception as error:  # whatever stands there in place of a label
            raise UndecodableError(
                f"its record lacks an image or a label: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(encoded, bytes):
            raise UndecodableError("its record holds no encoded image")
        if not -1 <= label < max(self.num_classes, 1):
            raise UndecodableError(f"its label {label} is none of {self.num_classes} classes")
        return encoded, label

    def record_name(self, index: int) -> str:
        """What an image is called: its path in a folder, else its index."""
        return _record_name(self.records, index)


class _Kept:
    """Records of a small dataset, each read and parsed once, which costs more than to decode it."""

    def __init__(self, records: Any):
        self._records = records
        self._kept: dict[int, dict] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        record = self._kept.get(index)
        if record is None:
            record = self._kept[index] = self._records[index]
        return record


def open_source(dataset: config_dict.ConfigDict, split: str) -> Source:
    """Opens one split of a TFDS dataset, which `prepare` has prepared.

    Args:
      dataset: the config's `dataset` part.
      split: a TFDS split such as `train` or `train[:90%]`.

    Returns:
      The split's source.

    Raises:
      UserError: the dataset has not been prepared, the split, the image or the label does not
        exist, or the files on disk are of a format without random access.
    """
    import tensorflow_datasets as tfds

    builder = _builder(dataset)
    features = builder.info.features
    for key in (dataset.image_key, dataset.label_key):
        if key not in features:
            raise UserError(
                f"dataset {dataset.name!r} has no feature {key!r}; it has {sorted(features)}"
            )
    try:
        still_encoded = {
            key: tfds.decode.SkipDecoding()
            for key, feature in features.items()
            if isinstance(feature, tfds.features.Image)
        }
        records = builder.as_data_source(split=split, decoders=still_encoded)
    except NotImplementedError as error:  # What TFDS raises for a format without random access.
        raise UserError(
            f"{dataset.name!r} was prepared at {builder.data_path} in a format without random "
            "access; prepare it again elsewhere with --config.dataset.data_dir=DIR, which writes "
            "array_record files"
        ) from error
    except Exception as error:  # whatever TFDS raises on an unknown split or damaged metadata
        if not builder.is_prepared():
            raise UserError(
                f"dataset {dataset.name!r} has not been prepared in {builder.data_path}: training "
                "does that; where it has been elsewhere, say so with --config.dataset.data_dir=DIR"
            ) from error
        raise UserError(
            f"cannot read split {split!r} of {dataset.name!r}, which has the splits "
            f"{sorted(builder.info.splits)}: {' '.join(str(error).split())}"
        ) from error
    shards = [[s.name, s.num_bytes, list(s.shard_lengths)] for s in builder.info.splits.values()]
    return Source(
        name=f"{dataset.name}:{split}",
        records=_Kept(records) if builder.info.dataset_size <= _KEPT_BYTES else records,
        image_key=dataset.image_key,
        label_key=dataset.label_key,
        num_classes=features[dataset.label_key].num_classes,
        class_names=tuple(features[dataset.label_key].names),
        identity=lambda _: json.dumps([builder.info.full_name, split, shards]).encode(),
    )


def prepare(dataset: config_dict.ConfigDict) -> None:
    """Writes the dataset's array_record files if they are not there yet, downloading as TFDS does.

    Args:
      dataset: the config's `dataset` part: `name`, `data_dir` (None for TFDS's own default),
        `manual_dir` (None for `downloads/manual` in it) and `try_gcs`.

    Raises:
      UserError: no such dataset, no room or permission to write it, or TensorFlow is needed to
        prepare it and is not installed.
    """
    import tensorflow_datasets as tfds

    builder = _builder(dataset)
    if builder.is_prepared():
        return
    if not type(builder).__module__.startswith("music_jax.data."):
        _hide_accelerators_from_tensorflow(dataset.name)
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                try_download_gcs=dataset.try_gcs, manual_dir=_expanded(dataset.manual_dir)
            ),
            file_format="array_record",
        )
    except UserError:
        raise
    except Exception as error:  # whatever TFDS raises on files to be placed by hand, or damaged
        if _builder(dataset).is_prepared():  # by another process, which was faster
            return
        if isinstance(error, OSError):
            raise UserError(
                f"cannot prepare dataset {dataset.name!r} in {builder.data_path}: {error}; choose "
                "another place with --config.dataset.data_dir=DIR"
            ) from error
        raise UserError(
            f"cannot prepare dataset {dataset.name!r}: {' '.join(str(error).split())}; another "
            "place for such files is --config.dataset.manual_dir=DIR"
        ) from error


def _builder(dataset: config_dict.ConfigDict) -> Any:
    import tensorflow_datasets as tfds

    import music_jax.data.builders
    import music_jax.data.shapes  # noqa: F401  (both register ours with TFDS)

    if not dataset.name:
        raise UserError(
            "no dataset is named: give a TFDS name, such as mnist5k, with --config.dataset.name=, "
            "or a folder of images with --config.dataset.path="
        )
    try:
        return tfds.builder(
            dataset.name,
            data_dir=_expanded(dataset.data_dir),
            file_format="array_record",
        )
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        nearest = difflib.get_close_matches(dataset.name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"TFDS knows no dataset {dataset.name!r}{hint}") from error
    except Exception as error:  # whatever TFDS raises on an unknown version or damaged metadata
        raise UserError(
            f"cannot open dataset {dataset.name!r}: {' '.join(str(error).split())}"
        ) from error


def _expanded(directory: str | None) -> str | None:
    return directory and os.path.expanduser(directory)


def _hide_accelerators_from_tensorflow(name: str) -> None:
    """Most builders prepare with TensorFlow, which would take the accelerators' memory from JAX."""
    try:
        import_tensorflow()
    except ImportError as error:
        raise UserError(
            f"preparing dataset {name!r} needs TensorFlow once; `pip install tensorflow`, or put "
            "array_record files prepared elsewhere into --config.dataset.data_dir"
        ) from error
