"""Random access to a dataset's encoded images; here, those of any TFDS builder."""

import concurrent.futures
import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ml_collections import config_dict

import music_jax.workdir.files  # noqa: F401  (corrects the paths that TFDS uses)
from music_jax.data.host_tensorflow import import_tensorflow
from music_jax.distributed import progress
from music_jax.errors import UndecodableError, UserError

_TFDS_FEATURES = "tensorflow_datasets.core.features."
_feature_lock = threading.RLock()
_KEPT_BYTES = 64 * 2**20  # of a dataset whose records stay in memory
_LABEL_KEY = "label"  # the config's default: a dataset need not have it
_LABELS_AT_ONCE = 256  # read by one thread
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

    @property
    def labels(self) -> np.ndarray | None:
        known = _known_labels(self.records)
        return None if known is None else known[self.indices]


def _known_labels(records: Any) -> np.ndarray | None:
    return getattr(records, "labels", None)


def _record_name(records: Any, index: int) -> str:
    return getattr(records, "record_name", str)(index)


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a dataset, by index.

    Attributes:
      name: the dataset and the split, for messages.
      records: `len()` and `[index]`, giving dictionaries that hold the encoded image and the label;
        `record_name(index)`, if it is there, says what an image is called, and the array `labels`
        holds the labels where they are known without reading records.
      image_key: where a record holds the encoded image's bytes.
      label_key: where it holds the integer label.
      num_classes: how many labels there are; 0 where the images have none.
      class_names: what the labels are called, if they have names.
      no_classes: why the images have no labels, if that needs an explanation.
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
    no_classes: str = ""
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
        label = self._label_of(record)
        encoded = record.get(self.image_key)
        if not isinstance(encoded, bytes):
            raise UndecodableError("its record holds no encoded image")
        return encoded, label

    def _label_of(self, record: dict) -> int:
        if not self.num_classes:
            return -1
        try:
            label = int(record[self.label_key])
        except Exception as error:  # whatever stands there in place of a label
            raise UndecodableError(
                f"its record lacks a label: {type(error).__name__}: {error}"
            ) from error
        if not -1 <= label < self.num_classes:
            raise UndecodableError(f"its label {label} is none of {self.num_classes} classes")
        return label

    def count_classes(self, at_most: int) -> int:
        """Counts the classes that images have, and stops reading once there are so many."""
        if (known := _known_labels(self.records)) is not None:
            return min(len(np.unique(known[known >= 0])), at_most)
        found: set[int] = set()
        for index in range(len(self) if self.num_classes else 0):
            if len(found) >= at_most:
                break
            found.update(label for label in self._labels([index]) if label >= 0)
        return len(found)

    def labels(self) -> np.ndarray:
        """The labels of all images.

        No image is decoded. A folder's labels are known; those of other sources are in the records,
        all of which are read: ImageNet as TFDS stores it in one to three minutes.

        Returns:
          int32 [images], -1 where an image has none and -2 where the record is damaged.
        """
        if (known := _known_labels(self.records)) is not None:
            return known
        if not self.num_classes:
            return np.full(len(self), -1, np.int32)
        parts = np.array_split(np.arange(len(self)), -(-len(self) // _LABELS_AT_ONCE))
        found = []
        with (
            concurrent.futures.ThreadPoolExecutor() as pool,
            progress.bar(len(self), unit="img", description=f"labels of {self.name}") as bar,
        ):
            for labels in pool.map(self._labels, parts):
                found += labels
                bar.update(len(labels))
        return np.asarray(found, np.int32)

    def _labels(self, indices: Iterable[int]) -> list[int]:
        """The labels of some images, as `labels` gives them."""
        found = []
        for index in indices:
            try:
                found.append(self._label_of(self.record(int(index))))
            except UndecodableError:
                found.append(-2)
        return found

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

    The labels are those of a ClassLabel feature. Where `dataset.label_key` names a feature of
    another kind, or is "" or the default and there is no such feature, the images have no labels.

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
    features = dict(builder.info.features.items())
    for key in (dataset.image_key, dataset.label_key):
        if key not in features and key not in (_LABEL_KEY, ""):
            raise UserError(
                f"dataset {dataset.name!r} has no feature {key!r}; it has {sorted(features)}"
            )
    if not isinstance(features.get(dataset.image_key), tfds.features.Image):
        raise UserError(
            f"the feature {dataset.image_key!r} of dataset {dataset.name!r} is not an Image; name "
            f"one of {sorted(features)} that is, with --config.dataset.image_key="
        )
    label, names, no_classes = features.get(dataset.label_key), (), ""
    if label is None:
        no_classes = f"{dataset.name} has no feature {dataset.label_key!r}"
    elif isinstance(label, tfds.features.ClassLabel):
        names = tuple(label.names)
    else:
        kind = type(label).__name__
        no_classes = f"its feature {dataset.label_key!r} is a {kind}, not a ClassLabel"
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
                f"does that, and so does naming it here with --config.dataset.name={dataset.name}; "
                "where it has been elsewhere, say so with --config.dataset.data_dir=DIR"
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
        num_classes=len(names),
        class_names=names,
        no_classes=no_classes,
        identity=lambda _: json.dumps([builder.info.full_name, split, shards]).encode(),
    )


def has_split(dataset: config_dict.ConfigDict, split: str) -> bool:
    """Whether a TFDS dataset has a split of this name."""
    return split in _builder(dataset).info.splits


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
    if not (dataset.data_dir or "TFDS_DATA_DIR" in os.environ) and os.path.expanduser("~") == "~":
        raise UserError(
            "this user has no home directory to keep datasets in; set HOME, or name a place with "
            "--config.dataset.data_dir=DIR"
        )
    try:
        if (
            ":" in dataset.name
            and tfds.core.naming.parse_builder_name_kwargs(dataset.name)[0].namespace
        ):
            raise UserError(
                f"dataset {dataset.name!r} is a community dataset of TFDS, whose code would be "
                "downloaded and run; give the name of one that TFDS itself has"
            )
        with _known_features_only():
            builder = tfds.builder(
                dataset.name,
                data_dir=_expanded(dataset.data_dir),
                file_format="array_record",
            )
            _ = builder.info.features  # a dataset without code reads them from its files here
            return builder
    except UserError:
        raise
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        nearest = difflib.get_close_matches(dataset.name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"TFDS knows no dataset {dataset.name!r}{hint}") from error
    except Exception as error:  # whatever TFDS raises on an unknown version or damaged metadata
        raise UserError(
            f"cannot open dataset {dataset.name!r}: {' '.join(str(error).split())}"
        ) from error


@contextlib.contextmanager
def _known_features_only() -> Iterator[None]:
    """Keeps TFDS from importing a module because a dataset's features.json names a class in it.

    Classes of TFDS itself, and those that are imported already, are found as ever.
    """
    import tensorflow_datasets as tfds

    connector = tfds.features.FeatureConnector
    with _feature_lock:
        original = connector.__dict__["cls_from_name"]

        def known_class(cls: Any, name: str) -> Any:
            if name not in cls._registered_features and not name.startswith(_TFDS_FEATURES):
                raise UserError(
                    f"the features.json of a dataset names the class {name!r}, which is not one of "
                    "TFDS; if you trust it, import its module before"
                )
            return original.__func__(cls, name)

        connector.cls_from_name = classmethod(known_class)
        try:
            yield
        finally:
            connector.cls_from_name = original


def _expanded(directory: str | None) -> str | None:
    return os.path.expanduser(directory) if directory else None


def _hide_accelerators_from_tensorflow(name: str) -> None:
    """Most builders prepare with TensorFlow, which would take the accelerators' memory from JAX."""
    try:
        import_tensorflow()
    except ImportError as error:
        raise UserError(
            f"preparing dataset {name!r} needs TensorFlow once; `pip install tensorflow`, or put "
            "array_record files prepared elsewhere into --config.dataset.data_dir"
        ) from error
