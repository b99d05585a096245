"""Packed images: array_record shards and an index, which `packing.pack` writes.

A record is the label, a little-endian int32, followed by an image file. If images may have several
classes (`multi_label` in the index), the label is an int8 for each class. `index.json` names the
shards, in order, and the classes; a directory that holds one is a packed dataset. While packing is
in progress, `complete` is false in the index.
"""

import bisect
import functools
import itertools
import json
import os
import re
import stat
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from music_jax.config import normalize_path
from music_jax.data.folder import MAX_FILE_BYTES
from music_jax.data.sources import Source
from music_jax.distributed.progress import escape_surrogates
from music_jax.errors import UndecodableError, UserError, raising
from music_jax.workdir.directory import check_utf8
from music_jax.workdir.files import read_json

INDEX_FILE = "index.json"
FORMAT = "music_jax packed images, version 1"
_SHARD = re.compile(r"images-\d+-of-\d+\.array_record")

# An array_record file has Riegeli's format: chunks of records, each after a header with the size of
# the chunk, and a shorter header at every 64 KiB, even within a chunk.
_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_CHUNK_HEADER = struct.Struct("<5Q")  # hash, size, hash, type and number of records, decoded size


def is_packed(path: str) -> bool:
    """Returns whether a directory has the index of a packed dataset."""
    return os.path.isfile(os.path.join(os.path.expanduser(path), INDEX_FILE))


def open_packed(path: str) -> Source:
    """Opens a packed dataset.

    Raises:
      UserError: Packing was not finished, or the files are damaged.
    """
    index = read_index(epath.Path(path).expanduser())
    root = os.path.expanduser(path)
    if not index["complete"]:
        written = sum(_SHARD.fullmatch(name) is not None for name in os.listdir(root))
        raise UserError(
            f"{path!r} is not fully packed: it has {written:,} of {num_shards(index):,} shards; "
            "rerun music_jax.pack with the same arguments (each --worker, if there are several)"
        )
    check_utf8(root)
    files = [os.path.join(root, shard["file"]) for shard in index["shards"]]
    with raising(UserError, f"cannot read the shards of {path!r}"):
        states = [os.lstat(file) for file in files]
        if not all(stat.S_ISREG(state.st_mode) for state in states):
            raise ValueError("one of them is a link or no file")
        kind = label_type(index["class_names"] if index["multi_label"] else None)
        records = _Records(files, [ArrayRecordDataSource([file]) for file in files], kind)
        if len(records) != index["num_images"]:
            raise ValueError(f"they hold {len(records)} images, not {index['num_images']}")
    names = tuple(index["class_names"])
    content = [index["shards"], index["class_names"], [state.st_size for state in states]]
    stamps = [(state.st_size, state.st_mtime_ns) for state in states]
    return Source(
        name=escape_surrogates(normalize_path(path)),
        size=len(records),
        read=records.read,
        num_classes=len(names),
        class_names=names,
        identity=lambda times: json.dumps([*content, stamps] if times else content).encode(),
        multi_label=index["multi_label"],
    )


def label_type(classes: Sequence[str] | None) -> np.dtype:
    """Returns the type of a label in a record; `classes` are those of which images have several."""
    return np.dtype("<i4") if classes is None else np.dtype((np.int8, (len(classes),)))


def read_index(directory: epath.Path) -> dict[str, Any]:
    """Reads and checks the index of a packed dataset.

    Raises:
      UserError: It is no index, or does not name shards in the same directory.
    """
    file = directory / INDEX_FILE
    try:
        index = read_json(file)
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}, not {FORMAT!r}")
        if not all(_SHARD.fullmatch(shard["file"]) for shard in index["shards"]):
            raise ValueError("a shard has another name than those that are written")
        if not all(isinstance(name, str) for name in index["class_names"]):
            raise ValueError("a class has no name")
        index["complete"] = bool(index["complete"])
        index["multi_label"] = bool(index.get("multi_label"))
        if not (index["complete"] or index["source_images"] > 0 < index["shard_size"]):
            raise ValueError("it has no number of images or of images per shard")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no index of packed images: {error!r}") from error
    return index


def num_shards(index: dict[str, Any]) -> int:
    """Returns the number of shards that packing writes."""
    return -(-index["source_images"] // index["shard_size"])


class _Records:
    """Records of all shards; each shard is checked before one of its records is read."""

    def __init__(self, files: list[str], shards: list[Any], label_type: np.dtype):
        self._files, self._shards, self._label_type = files, shards, label_type
        self._ends = list(itertools.accumulate(map(len, shards)))
        self._problem = functools.cache(_shard_problem)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> dict[str, Any]:
        """Returns the record of an image."""
        shard = bisect.bisect_right(self._ends, index)
        label_type = self._label_type
        if problem := self._problem(self._files[shard], label_type.itemsize):
            raise UndecodableError(problem)
        record = self._shards[shard][index - self._ends[shard] + len(self._shards[shard])]
        label = np.frombuffer(record, label_type, 1)[0]
        return {"image": record[label_type.itemsize :], "label": label}


def _shard_problem(file: str, label_bytes: int) -> str:
    """Returns why a shard cannot be read, such as a record larger than any image; "" if it can."""
    try:
        size = largest_chunk(file)
    except (OSError, ValueError) as error:
        return f"its shard cannot be read: {error}"
    if size > MAX_FILE_BYTES + label_bytes:
        return (
            f"its shard has a record of {size:,} bytes, and images have {MAX_FILE_BYTES:,} at most"
        )
    return ""


def largest_chunk(path: str) -> int:
    """Returns the decompressed size in bytes of the largest chunk of an array_record file.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is no array_record file.
    """
    largest = offset = 0
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        size = os.fstat(descriptor).st_size
        while offset < size:
            header = os.pread(descriptor, _CHUNK_HEADER.size + _BLOCK_HEADER, offset)
            before = -offset % _BLOCK  # bytes up to the next block
            header = header[:before] + header[before + _BLOCK_HEADER :]
            if len(header) < _CHUNK_HEADER.size:
                raise ValueError("it ends early")
            _, encoded, _, records, decoded = _CHUNK_HEADER.unpack(header[: _CHUNK_HEADER.size])
            largest = max(largest, decoded)
            end = _skip_bytes(offset, _CHUNK_HEADER.size + encoded)
            offset = max(end, offset + (records >> 8))
            if 0 < offset % _BLOCK <= _BLOCK_HEADER:  # no chunk begins in a block's header
                offset += _BLOCK_HEADER + 1 - offset % _BLOCK
    finally:
        os.close(descriptor)
    return largest


def _skip_bytes(offset: int, count: int) -> int:
    """Returns the offset `count` bytes after another, not counting the headers of blocks."""
    used = max(offset % _BLOCK - _BLOCK_HEADER, 0)  # of its block, before `offset`
    blocks, rest = divmod(used + count, _BLOCK - _BLOCK_HEADER)
    start = offset - offset % _BLOCK
    # A chunk that ends with a block ends before the next one's header.
    return start + blocks * _BLOCK + (_BLOCK_HEADER + rest if rest else 0)
