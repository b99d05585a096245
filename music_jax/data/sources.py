"""Random access to the encoded images of a dataset."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable

import numpy as np

from music_jax.data.decode import EncodedImage
from music_jax.data.labels import DAMAGED, Label, by_class, classes_of, read_values
from music_jax.data.order import evenly_spaced
from music_jax.errors import UndecodableError, raising

_FINGERPRINTED = 64  # images whose contents a fingerprint depends on


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a dataset, by index.

    Attributes:
      name: Name of the dataset and the split, for messages.
      size: Number of images.
      read: Function from an index to a record, a dictionary of the image, encoded or as an array,
        and of the label, unless it is one of `known_labels`.
      image_key: Key of the image in a record.
      label_key: Key of the label: an integer, or what `labels.by_class` takes if `multi_label`.
      num_classes: Number of classes; 0 if the images have no labels.
      class_names: Names of the classes, if they have any.
      no_classes: Reason why the images have no labels, or "".
      identity: Function that returns bytes which distinguish the records without reading them, such
        as the names and sizes of files; with `True` also their modification times.
      known_labels: Labels of all records, if they are known without reading any.
      numbers: Number of the class that each label of the records stands for; None if it is the
        label itself.
      multi_label: Whether an image may have several classes; see `music_jax.data.labels`.
      record_name: Function from an index to the name of an image, such as its path in a folder.
      whole_size: Number of images in the whole split, if these are a part of it.
    """

    name: str
    size: int
    read: Callable[[int], dict]
    image_key: str = "image"
    label_key: str = "label"
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    no_classes: str = ""
    identity: Callable[[bool], bytes] = lambda _: b""
    known_labels: np.ndarray | None = None
    numbers: np.ndarray | None = None
    multi_label: bool = False
    record_name: Callable[[int], str] = str
    whole_size: int | None = None

    def __len__(self) -> int:
        return self.size

    def subset(self, indices: np.ndarray) -> "Source":
        """Returns the images at some indices, in this order."""
        return dataclasses.replace(
            self,
            size=len(indices),
            read=lambda i: self.read(int(indices[i])),
            identity=lambda times: self.identity(times) + np.asarray(indices, np.int64).tobytes(),
            known_labels=None if self.known_labels is None else self.known_labels[indices],
            record_name=lambda i: self.record_name(int(indices[i])),
            whole_size=self.split_size,
        )

    @property
    def split_size(self) -> int:
        """Number of images in the whole split, of which these may be a part."""
        return self.size if self.whole_size is None else self.whole_size

    def no_labels(self, count: int) -> np.ndarray:
        """Returns the labels of images without one: int32 [count], or int8 [count, classes]."""
        if self.multi_label:
            return np.full((count, self.num_classes), -1, np.int8)
        return np.full(count, -1, np.int32)

    def fingerprint(self, *, times: bool) -> str:
        """Returns a hash that changes when images are renamed, replaced, added or removed.

        It depends on the source's identity and on the contents of a few images, evenly spaced. Take
        it before the images are read: it describes the files at the time of the first call.

        Args:
          times: Whether the hash may also change when a file is only copied or touched. Then it
            changes with any change of a file.
        """
        digest = hashlib.sha256(self.identity(times))
        digest.update(len(self).to_bytes(8, "little"))
        for index in evenly_spaced(len(self), _FINGERPRINTED):
            try:
                content = bytes(self.example(index)[0])
            except UndecodableError:
                content = b"unreadable"
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def record(self, index: int) -> dict:
        """Returns the record of an image.

        Raises:
          UndecodableError: The record is damaged.
        """
        with raising(UndecodableError, "its record cannot be read"):
            return self.read(index)

    def example(self, index: int) -> tuple[EncodedImage, Label]:
        """Returns the encoded image and its label; see `music_jax.data.labels`.

        Raises:
          UndecodableError: The record is damaged, or its label is not one of the classes.
        """
        record = self.record(index)
        label = self._label_of(index, record)
        encoded = record.get(self.image_key)
        if isinstance(encoded, np.ndarray) and encoded.dtype.kind in "biuf":
            if encoded.ndim in (2, 3):
                return encoded, label
        elif isinstance(encoded, bytes):
            return encoded, label
        raise UndecodableError(
            "its record holds neither an encoded image nor an array of numbers [height, width, "
            "channels]"
        )

    def count_classes(self, at_most: int) -> int:
        """Returns how many classes have images; reading stops once `at_most` are found."""
        labels: Iterable[Label] = map(self._read_label, range(len(self)))
        if self.known_labels is not None:
            labels = self._renumbered(self.known_labels)
        found: set[int] = set()
        for label in labels:
            found.update(classes_of(label))
            if len(found) >= at_most:
                break
        return len(found)

    def labels(self) -> np.ndarray:
        """Returns the labels of all images without decoding any.

        The labels of a folder are known. Those of other sources are in the records, all of which
        are read: for ImageNet as TFDS stores it, this takes one to three minutes.

        Returns:
          int32 [images], or int8 [images, classes] if `multi_label`; -1 for images without a label,
          -2 for damaged records.
        """
        if self.known_labels is not None:
            return self._renumbered(self.known_labels)
        found = self.no_labels(len(self))
        if self.num_classes:
            for i, label in enumerate(read_values(len(self), self._read_label, self.name)):
                found[i] = label
        return found

    def _label_of(self, index: int, record: dict) -> Label:
        if not self.num_classes:
            return -1
        num_classes = self.num_classes if self.numbers is None else len(self.numbers)
        known = self.known_labels
        try:
            found = record[self.label_key] if known is None else known[index]
            if self.multi_label:
                return self._renumbered(by_class(found, num_classes)[None])[0]
            label = int(found)
        except Exception as error:  # whatever a damaged record holds in place of a label
            raise UndecodableError(
                f"its record lacks a label: {type(error).__name__}: {error}"
            ) from error
        if not -1 <= label < num_classes:
            raise UndecodableError(f"its label {label} is none of {num_classes} classes")
        return label if self.numbers is None or label < 0 else int(self.numbers[label])

    def _renumbered(self, labels: np.ndarray) -> np.ndarray:
        """Returns labels of records with the numbers that stand for their classes."""
        if self.numbers is None:
            return labels
        if not self.multi_label:
            return np.where(labels >= 0, self.numbers[np.maximum(labels, 0)], labels)
        found = self.no_labels(len(labels))
        found[:, self.numbers] = labels
        return found

    def _read_label(self, index: int) -> Label:
        """Returns the label of an image, as `labels` does."""
        try:
            return self._label_of(index, self.record(index))
        except UndecodableError:
            return DAMAGED
