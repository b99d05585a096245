"""Parquet files with a column of images as sources, read a few rows at a time.

Rows are found from the start of their row group, so that reading is fast in order only.
"""

import bisect
import collections
import hashlib
import itertools
import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from music_jax.data.file_patterns import expand
from music_jax.data.folder import MAX_FILE_BYTES
from music_jax.data.labels import number_labels
from music_jax.data.sources import Source
from music_jax.distributed.progress import escape_surrogates
from music_jax.errors import (
    UndecodableError,
    UnusableDataError,
    UserError,
    one_line,
    raising,
    require_extra,
)

_logger = logging.getLogger(__name__)

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")  # columns that are tried in turn
_LABELS = ("label", "labels", "cls", "class")
_BATCH_ROWS, _KEPT_BATCHES = 16, 8  # threads read rows almost in order
_READ_BYTES = 1 << 20


def open_parquet(pattern: str, *, image_key: str | None, label_key: str | None) -> Source:
    """Opens Parquet files with the same columns.

    The images are a column of binary values, or of the structs of Hugging Face with a field
    `bytes`. The labels are a column of whole numbers or of texts.

    Args:
      pattern: Pattern of file names, see `file_patterns.expand`.
      image_key: Column of the images; by default the only one that can be it, or one of `_IMAGES`.
      label_key: Column of the labels; by default the first of `_LABELS` that exists.

    Raises:
      UserError: There are no such files or columns.
      UnusableDataError: A file is damaged, or no Parquet file.
    """
    with require_extra("export"):
        import pyarrow  # noqa: F401
    files = expand(pattern)
    name = f"parquet:{escape_surrogates(pattern)}"
    groups: list[tuple[int, int]] = []  # file and row group
    sizes: list[int] = []
    labels: list[Any] = []
    image = _image_column(name, _open(files[0]).schema_arrow, image_key)
    label = _label_column(name, _open(files[0]).schema_arrow, label_key)
    if label == image[0]:  # All labels are read into memory.
        raise UserError(f"the column {label!r} holds the images; --label_key= must name another")
    for number, path in enumerate(files):
        with _open(path) as file, raising(UnusableDataError, f"cannot read {path!r}"):
            for group in range(file.num_row_groups):
                groups.append((number, group))
                sizes.append(file.metadata.row_group(group).num_rows)
            if label is not None:
                labels += file.read(columns=[label]).column(label).to_pylist()
            if file.schema_arrow.field(image[0]).type != image[1]:
                raise ValueError(f"its column {image[0]!r} has another type")
    if not sum(sizes):
        raise UserError(f"{name} has no rows")
    class_names = _class_names(_open(files[0]).schema_arrow, label)
    found = number_labels(labels, f"the column {label!r} of {name}", class_names)
    no_classes = found.no_classes
    if label is None:
        no_classes = f"{name} has no column of labels; name one with --label_key="
    _logger.info(
        f"{name}: {sum(sizes):,} images in the column {image[0]!r}, {found.num_classes:,} classes, "
        f"{len(files):,} files"
    )
    rows = _Rows(files, groups, sizes, image[0], found.labels)
    return Source(
        name=name,
        size=sum(sizes),
        read=rows.read,
        num_classes=found.num_classes,
        class_names=found.class_names,
        no_classes=no_classes,
        identity=rows.identity,
        known_labels=None if label is None else found.labels,
        multi_label=found.multi_label,
    )


def _open(path: str) -> Any:
    import pyarrow.parquet as pq

    with raising(UnusableDataError, f"cannot read {path!r}"):
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES)


def _image_column(name: str, schema: Any, image_key: str | None) -> tuple[str, Any]:
    """Returns the name of the column of images, and its type."""
    import pyarrow as pa

    def is_binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = {}
    for field in schema:
        kind, is_struct = field.type, pa.types.is_struct(field.type)
        if is_struct and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if is_binary(kind):
            found[field.name] = field.type
    known = [column for column in _IMAGES if column in found]
    chosen = image_key or next(iter(found if len(found) == 1 else known), "")
    if chosen not in found:
        raise UserError(
            f"{name} has no column{f' {image_key!r}' if image_key else ''} of image files; its "
            f"columns are {schema.names[:20]}, and {sorted(found)} hold files: name one with "
            "--image_key="
        )
    return chosen, found[chosen]


def _label_column(name: str, schema: Any, label_key: str | None) -> str | None:
    if label_key and label_key not in schema.names:
        raise UserError(f"{name} has no column {label_key!r}; it has {schema.names[:20]}")
    return label_key or next((column for column in _LABELS if column in schema.names), None)


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """Returns the names of the classes that Hugging Face stores in the schema, if it does."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        return tuple(map(str, info.get("feature", info)["names"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return ()


class _Rows:
    """Rows of Parquet files; the last few that were read stay in memory."""

    def __init__(
        self,
        files: list[str],
        groups: list[tuple[int, int]],
        sizes: list[int],
        column: str,
        labels: np.ndarray,
    ):
        self._files, self._groups, self._sizes, self._column = files, groups, sizes, column
        self._ends = list(itertools.accumulate(sizes))
        self._labels = labels  # none without a column of labels
        self._states = [os.stat(file) for file in files]
        self._lock = threading.Lock()
        self._kept: collections.deque[tuple[int, Any]] = collections.deque(maxlen=_KEPT_BATCHES)
        self._group, self._next = -1, 0  # row group that is being read, and its next row
        self._batches: Iterator[Any] = iter(())
        self._damage: dict[int, tuple[int, str]] = {}  # row from which a row group is damaged

    def read(self, index: int) -> dict[str, Any]:
        """Returns the record of an image."""
        with self._lock:
            value = self._value(index)
        if isinstance(value, dict):
            value = value.get("bytes")
        if not value:
            raise UndecodableError("its cell of the table holds no file")
        if len(value) > MAX_FILE_BYTES:
            raise UndecodableError(f"its {len(value):,} bytes are more than {MAX_FILE_BYTES:,}")
        return {"image": value}

    def identity(self, times: bool) -> bytes:
        """Hashes the sizes of row groups and files and the labels, and if `times` the times."""
        digest = hashlib.sha256(json.dumps([self._groups, self._sizes]).encode())
        digest.update(self._labels.tobytes())
        digest.update(str([state.st_size for state in self._states]).encode())
        if times:
            digest.update(str([state.st_mtime_ns for state in self._states]).encode())
        return digest.digest()

    def _value(self, index: int) -> Any:
        group = bisect.bisect_right(self._ends, index)
        start = self._ends[group] - self._sizes[group]  # index of its first row
        damaged_from, problem = self._damage.get(group, (self._sizes[group], ""))
        if index - start >= damaged_from:
            raise UndecodableError(problem)
        for first, column in self._kept:
            if first <= index < first + len(column):
                return column[index - first].as_py()
        if group != self._group or index < self._next:
            self._group, self._next = group, start
            self._batches = self._read_group(*self._groups[group])
        try:
            while True:
                column = next(self._batches)
                first, self._next = self._next, self._next + len(column)
                self._kept.append((first, column))
                if index < self._next:
                    return column[index - first].as_py()
        except Exception as error:  # whatever pyarrow raises on damage, or StopIteration
            self._group = -1
            is_end = isinstance(error, StopIteration)
            reason = "it ends early" if is_end else one_line(error, 300)
            problem = f"its row group cannot be read: {reason}"
            self._damage[group] = (self._next - start, problem)
            raise UndecodableError(problem) from error

    def _read_group(self, file: int, group: int) -> Iterator[Any]:
        with _open(self._files[file]) as opened:
            for batch in opened.iter_batches(_BATCH_ROWS, [group], [self._column]):
                yield batch.column(0)
