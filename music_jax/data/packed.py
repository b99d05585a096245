"""Packed images: array_record shards beside an index, made by `music_jax.pack`.

A record is the label, a little-endian int32, followed by an image file. `index.json` names the
shards, in order, and the classes; a directory that has one is a packed dataset. Until it is whole
its index says so, and beside each shard that is finished lies a JSON file with what it holds.
"""

import bisect
import itertools
import json
import os
import stat
import struct
from typing import Any

from etils import epath

from music_jax.config.values import normalize_path
from music_jax.data.folder import MAX_FILE_BYTES
from music_jax.data.shards import largest_chunk
from music_jax.data.sources import Source
from music_jax.distributed.progress import escape_surrogates
from music_jax.errors import UndecodableError, UserError
from music_jax.workdir.directory import check_utf8
from music_jax.workdir.files import read_json

INDEX_FILE = "index.json"
FORMAT = "music_jax packed images, version 1"
_SUFFIX = ".array_record"
_LABEL_BYTES = 4


def is_packed(path: str) -> bool:
    """Whether a directory has the index of a packed dataset."""
    return os.path.isfile(os.path.join(os.path.expanduser(path), INDEX_FILE))


def read_index(path: str) -> dict[str, Any]:
    """Reads and checks the index of a packed dataset.

    Raises:
      UserError: it is no index, or one that does not name shards in the same directory.
    """
    file = epath.Path(path).expanduser() / INDEX_FILE
    try:
        index = read_json(file)
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}, not {FORMAT!r}")
        shards = [str(shard["file"]) for shard in index["shards"]]
        for name in shards:
            if "/" in name or name.startswith(".") or not name.isprintable():
                raise ValueError("a shard lies in another directory")
            if not name.endswith(_SUFFIX):
                raise ValueError(f"a shard's name does not end with {_SUFFIX}")
        if len(set(shards)) < len(shards):
            raise ValueError("a shard is named twice")
        if not all(isinstance(name, str) for name in index["class_names"]):
            raise ValueError("a class has no name")
        if not isinstance(index["complete"], bool):
            raise ValueError("'complete' is neither true nor false")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no index of packed images: {error!r}") from error
    return index


def open_packed(path: str) -> Source:
    """Opens a packed dataset.

    Raises:
      UserError: it was not packed to the end, or its files are damaged.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    index = read_index(path)
    if not index["complete"]:
        raise UserError(f"{path!r} is not packed to the end; run music_jax.pack again to go on")
    root = epath.Path(path).expanduser()
    check_utf8(os.fspath(root))
    files = [os.fspath(root / shard["file"]) for shard in index["shards"]]
    stamps = []
    try:
        for name in files:
            status = os.lstat(name)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{os.path.basename(name)} is a link or no file")
            stamps.append((status.st_size, status.st_mtime_ns))
        records = _Records(files, [ArrayRecordDataSource([name]) for name in files])
        if len(records) != index["num_images"]:
            raise ValueError(f"they hold {len(records)} images, not {index['num_images']}")
    except Exception as error:  # whatever the reader raises on damage
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot read the shards of {path!r}: {reason}") from error
    names = tuple(index["class_names"])

    def identity(times: bool) -> bytes:
        said = [index["shards"], index["class_names"], [size for size, _ in stamps]]
        return json.dumps([*said, stamps] if times else said).encode()

    return Source(
        name=escape_surrogates(normalize_path(path)),
        records=records,
        image_key="image",
        label_key="label",
        num_classes=len(names),
        class_names=names,
        identity=identity,
    )


def encode_record(image: bytes, label: int) -> bytes:
    """The record of an image file and its label, -1 if it has none."""
    return struct.pack("<i", label) + image


class _Records:
    """The records of all shards; one of a shard is read once all of it are known to be small."""

    def __init__(self, files: list[str], shards: list[Any]):
        self._files, self._shards = files, shards
        self._ends = list(itertools.accumulate(map(len, shards)))
        self._wrong: list[str | None] = [None] * len(shards)  # None: not checked yet

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = bisect.bisect_right(self._ends, index)
        wrong = self._wrong[shard]
        if wrong is None:
            wrong = self._wrong[shard] = _wrong_with(self._files[shard])
        if wrong:
            raise UndecodableError(f"its shard {wrong}")
        record = self._shards[shard][index - self._ends[shard] + len(self._shards[shard])]
        return {"image": record[4:], "label": struct.unpack_from("<i", record)[0]}


def _wrong_with(shard: str) -> str:
    """Why no record of a shard is read, if anything: one that is larger than any image."""
    try:
        size = largest_chunk(shard)
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    if size > MAX_FILE_BYTES + _LABEL_BYTES:
        return f"has a record of {size:,} bytes, and images have {MAX_FILE_BYTES:,} at most"
    return ""
