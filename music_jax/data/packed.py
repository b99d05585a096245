"""Packed images: array_record shards and an index, which `pack` writes and `open_packed` reads.

A record is the label, a little-endian int32, followed by an image file. If images may have several
classes (`multi_label` in the index), the label is an int8 for each class. `index.json` names the
shards, in order, and the classes; a directory that holds one is a packed dataset. While packing is
in progress, `complete` is false in the index.
"""

import bisect
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
import os
import re
import stat
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from music_jax.config import normalize_path
from music_jax.data.arrays import PIXEL_TYPES
from music_jax.data.crops import resize
from music_jax.data.decode import EncodedImage, decode, largest_reduction, read_header
from music_jax.data.folder import MAX_FILE_BYTES
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed import progress, usable_cores
from music_jax.distributed.progress import escape_surrogates
from music_jax.errors import UndecodableError, UserError
from music_jax.workdir.directory import check_utf8
from music_jax.workdir.files import PREFIX, new_path, read_json, write_new

_logger = logging.getLogger(__name__)

_INDEX_FILE = "index.json"
_FORMAT = "music_jax packed images, version 1"
_SHARD = re.compile(r"images-\d+-of-\d+\.array_record")
_IMAGES_PER_THREAD = 64  # packed ahead of the writer

# An array_record file has Riegeli's format: chunks of records, each after a header with the size of
# the chunk, and a shorter header at every 64 KiB, even within a chunk.
_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_CHUNK_HEADER = struct.Struct("<5Q")  # hash, size, hash, type and number of records, decoded size


def is_packed(path: str) -> bool:
    """Returns whether a directory has the index of a packed dataset."""
    return os.path.isfile(os.path.join(os.path.expanduser(path), _INDEX_FILE))


def open_packed(path: str) -> Source:
    """Opens a packed dataset.

    Raises:
      UserError: Packing was not finished, or the files are damaged.
    """
    index = _read_index(epath.Path(path).expanduser())
    if not index["complete"]:
        raise UserError(f"{path!r} is not fully packed; rerun music_jax.pack to finish it")
    root = os.path.expanduser(path)
    check_utf8(root)
    files = [os.path.join(root, shard["file"]) for shard in index["shards"]]
    try:
        states = [os.lstat(file) for file in files]
        if not all(stat.S_ISREG(state.st_mode) for state in states):
            raise ValueError("one of them is a link or no file")
        label_type = _label_type(index["class_names"] if index["multi_label"] else None)
        records = _Records(files, [ArrayRecordDataSource([file]) for file in files], label_type)
        if len(records) != index["num_images"]:
            raise ValueError(f"they hold {len(records)} images, not {index['num_images']}")
    except Exception as error:  # whatever the reader raises on damage
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot read the shards of {path!r}: {reason}") from error
    names = tuple(index["class_names"])
    content = [index["shards"], index["class_names"], [state.st_size for state in states]]
    stamps = [(state.st_size, state.st_mtime_ns) for state in states]
    return Source(
        name=escape_surrogates(normalize_path(path)),
        records=records,
        num_classes=len(names),
        class_names=names,
        identity=lambda times: json.dumps([*content, stamps] if times else content).encode(),
        multi_label=index["multi_label"],
    )


def _label_type(classes: Sequence[str] | None) -> np.dtype:
    """Returns the type of a label in a record; `classes` are those of which images have several."""
    return np.dtype("<i4") if classes is None else np.dtype((np.int8, (len(classes),)))


def _read_index(directory: epath.Path) -> dict[str, Any]:
    """Reads and checks the index of a packed dataset.

    Raises:
      UserError: It is no index, or does not name shards in the same directory.
    """
    file = directory / _INDEX_FILE
    try:
        index = read_json(file)
        if index["format"] != _FORMAT:
            raise ValueError(f"its format is {index['format']!r}, not {_FORMAT!r}")
        if not all(_SHARD.fullmatch(shard["file"]) for shard in index["shards"]):
            raise ValueError("a shard has another name than those that are written")
        if not all(isinstance(name, str) for name in index["class_names"]):
            raise ValueError("a class has no name")
        index["complete"] = bool(index["complete"])
        index["multi_label"] = bool(index.get("multi_label"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no index of packed images: {error!r}") from error
    return index


def _write_index(directory: epath.Path, index: dict[str, Any]) -> None:
    write_new(directory / _INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())


class _Records:
    """Records of all shards; each shard is checked before one of its records is read."""

    def __init__(self, files: list[str], shards: list[Any], label_type: np.dtype):
        self._files, self._shards, self._label_type = files, shards, label_type
        self._ends = list(itertools.accumulate(map(len, shards)))
        self._problem = functools.cache(_shard_problem)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
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


@dataclasses.dataclass(frozen=True)
class Packing:
    """Settings of packing.

    Attributes:
      shorter_side: Length to which the shorter side is shrunk, in pixels.
      encoding: `jpeg`, which keeps the files of images that are small enough; `raw` for
        uncompressed pixels (BMP), which need no decoding and about eight times the space; or `npy`
        for pixels of any number of channels and type.
      quality: JPEG quality, 1 to 100.
      channels: Number of channels; 1 (gray) or 3 (RGB) except for `npy`.
      pixel_type: uint8; for `npy` also uint16 or float32.
      shard_size: Number of images of the source in one shard.
    """

    shorter_side: int = 320
    encoding: str = "jpeg"
    quality: int = 90
    channels: int = 3
    pixel_type: str = "uint8"
    shard_size: int = 4096

    def __post_init__(self) -> None:
        is_picture = self.encoding != "npy"
        channels = ((1, 3), "one of 1, 3") if is_picture else (range(1, 2**14 + 1), "at least 1")
        types = PIXEL_TYPES[:1] if is_picture else PIXEL_TYPES
        more = ", or any with --encoding=npy" if is_picture else ""
        for name, allowed, expected in (
            ("shorter_side", range(1, 2**14 + 1), "from 1 to 16384"),
            ("encoding", ("jpeg", "raw", "npy"), "one of jpeg, raw, npy"),
            ("quality", range(1, 101), "from 1 to 100"),
            ("channels", channels[0], channels[1] + more),
            ("pixel_type", types, f"one of {', '.join(types)}{more}"),
            ("shard_size", range(1, 2**24 + 1), "from 1 to 16777216"),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"--{name} must be {expected}; got {getattr(self, name)!r}")


def pack(
    source: Source,
    directory: epath.Path,
    packing: Packing,
    *,
    max_skipped_share: float = 0.01,
    num_threads: int | None = None,
) -> int:
    """Packs a source, or resumes an earlier call with the same arguments.

    Args:
      source: Images.
      directory: Directory for the shards and the index; empty, or from such an earlier call.
      packing: Settings of packing.
      max_skipped_share: Largest share of images that cannot be decoded. They are listed in
        skipped.jsonl.
      num_threads: Number of threads; by default one per core.

    Returns:
      Number of packed images.

    Raises:
      UserError: The directory holds something else, or cannot be written to.
      UnusableDataError: Too many images cannot be decoded.
    """
    cv2.setNumThreads(0)  # Images are decoded on threads of their own.
    index = {
        "format": _FORMAT,
        "complete": False,
        "source": source.name,
        "source_images": len(source),
        "source_fingerprint": source.fingerprint(times=False),
        **dataclasses.asdict(packing),
        "class_names": list(source.class_names),
        "shards": [],
    }
    if source.multi_label:
        index["multi_label"] = True
    label_type = _label_type(source.class_names if source.multi_label else None)
    if _start(directory, index):
        return int(_read_index(directory)["num_images"])
    source = dataclasses.replace(source, name=index["source"])
    skipped = SkippedImages(directory, max_share=max_skipped_share)
    num_shards = -(-len(source) // packing.shard_size)
    threads = num_threads or usable_cores()
    options = grain.ReadOptions(threads, prefetch_buffer_size=threads * _IMAGES_PER_THREAD)

    def make_record(key: int) -> bytes | None:  # Grain leaves out None
        try:
            encoded, label = source.example(key)
            return np.asarray(label, label_type.base).tobytes() + shrink(encoded, packing)
        except UndecodableError as error:
            skipped.add(source, key, str(error))
            return None

    shards: list[dict[str, Any]] = []
    with progress.bar(len(source), unit="img", description="packing") as bar:
        for k in range(num_shards):
            name = f"images-{k:05d}-of-{num_shards:05d}.array_record"
            stop = min((k + 1) * packing.shard_size, len(source))
            count = _count_images(directory / name)
            if count is None:
                keys = grain.MapDataset.range(k * packing.shard_size, stop)
                records = keys.map(make_record).to_iter_dataset(options)
                count = _write_shard(directory / name, records, bar)
            bar.update(stop - bar.n)
            shards.append({"file": name, "images": count})
    num_images = sum(shard["images"] for shard in shards)
    index |= {"complete": True, "num_images": num_images, "shards": shards}
    _write_index(directory, index)
    if len(skipped):
        _logger.warning(skipped.summary())
    return num_images


def _start(directory: epath.Path, index: dict[str, Any]) -> bool:
    """Writes the index, or checks that the existing one is equal; returns whether it is complete.

    If the existing one spells the name of the same source differently, `index` takes that name.
    """
    check_utf8(os.fspath(directory))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for temporary in directory.glob(f"{PREFIX}*"):  # from a call that was killed
            temporary.unlink()
        if not (directory / _INDEX_FILE).exists():
            if any(directory.iterdir()):
                raise UserError(
                    f"{directory} is not empty, and holds no packed images to resume; give "
                    "another --output"
                )
            _write_index(directory, index)
            return False
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error}") from error
    existing = {"pixel_type": PIXEL_TYPES[0]} | _read_index(directory)  # unlike older versions
    if _normalize(existing.get("source")) == _normalize(index["source"]):
        index["source"] = existing["source"]
    changing = ("complete", "num_images", "shards", "source_fingerprint")
    differing = [key for key in index if key not in changing and existing.get(key) != index[key]]
    if differing:
        settings = ", ".join(f"{key}: {existing.get(key)!r}" for key in differing[:3])
        raise UserError(
            f"{directory} was packed with different settings ({settings}); give the same "
            "arguments to resume it, or another --output"
        )
    fingerprint = index["source_fingerprint"]
    if existing.get("source_fingerprint", fingerprint) != fingerprint:  # older versions wrote none
        raise UserError(
            f"the images of {index['source']} have changed since {directory} was started: files "
            "were renamed, replaced, added or removed; pack the new images into another --output"
        )
    return bool(existing["complete"])


def _normalize(source: Any) -> str | None:
    """Returns the same text for all spellings of a folder."""
    return os.path.abspath(os.path.expanduser(source)) if isinstance(source, str) else None


def _count_images(shard: epath.Path) -> int | None:
    """Returns the number of images in a finished shard; None if there is none."""
    if not shard.exists():
        return None
    with contextlib.suppress(Exception):  # whatever the reader raises on damage
        return len(ArrayRecordDataSource([os.fspath(shard)]))
    return None


def shrink(encoded: EncodedImage, packing: Packing) -> bytes:
    """Decodes an image file, shrinks the image and encodes it.

    Raises:
      UndecodableError: The file cannot be decoded.
    """
    header = read_header(encoded, packing.channels)
    factor = min(header[:2]) / packing.shorter_side
    reduction = largest_reduction(header, factor)
    image = decode(
        encoded, packing.channels, dtype=packing.pixel_type, header=header, reduction=reduction
    )
    if factor <= 1 and packing.encoding == "jpeg" and isinstance(encoded, bytes):
        return encoded  # decoded only to check it
    ratio = packing.shorter_side / min(image.shape[:2])
    if ratio < 1:
        image = resize(image, *(max(1, round(side * ratio)) for side in image.shape[:2]))
    if packing.encoding == "npy":
        file = io.BytesIO()
        np.save(file, image, allow_pickle=False)
        return file.getvalue()
    if packing.channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    suffix, options = ".bmp", []
    if packing.encoding == "jpeg":
        suffix, options = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, packing.quality]
    ok, packed = cv2.imencode(suffix, np.ascontiguousarray(image), options)
    if not ok:
        raise UndecodableError(f"its {image.shape[1]} x {image.shape[0]} pixels cannot be encoded")
    return packed.tobytes()


def _write_shard(path: epath.Path, records: Iterable[bytes], bar: Any) -> int:
    """Writes a shard that appears only when it is complete; returns its number of images."""
    count = 0
    with new_path(path) as temporary:
        writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")  # for random access
        try:
            for record in records:
                writer.write(record)
                bar.update(1)
                count += 1
        finally:
            writer.close()
    return count
