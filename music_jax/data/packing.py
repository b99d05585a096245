"""Making packed images out of a source: shrunk once, so that no run has to do it again."""

import concurrent.futures
import dataclasses
import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from etils import epath

from music_jax.data.crops import resize
from music_jax.data.decode import decode, largest_reduction, use_one_thread
from music_jax.data.headers import read_header
from music_jax.data.packed import FORMAT, INDEX_FILE, encode_record, read_index
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed import progress, usable_cores
from music_jax.errors import UndecodableError, UserError
from music_jax.workdir.directory import check_utf8
from music_jax.workdir.files import PREFIX, new_path, read_json, write_json

_logger = logging.getLogger(__name__)

_AHEAD = 64  # images on their way for each thread


@dataclasses.dataclass(frozen=True)
class Packing:
    """How images are packed.

    Attributes:
      shorter_side: what the shorter side is shrunk to, in pixels.
      encoding: `jpeg`, by which the files of images that are small enough stay as they are, or
        `raw` for uncompressed pixels (BMP), which need no decoding and about eight times the room.
      quality: of the JPEGs, 1 to 100.
      channels: 1 or 3.
      shard_size: images of the source that go into one shard.
    """

    shorter_side: int = 320
    encoding: str = "jpeg"
    quality: int = 90
    channels: int = 3
    shard_size: int = 4096

    def __post_init__(self) -> None:
        for name, low, high in (
            ("shorter_side", 1, 2**14),
            ("quality", 1, 100),
            ("shard_size", 1, 2**24),
        ):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name} must be from {low} to {high}; got {getattr(self, name)}")
        for name, known in (("encoding", ("jpeg", "raw")), ("channels", (1, 3))):
            if getattr(self, name) not in known:
                raise UserError(
                    f"--{name} must be one of {', '.join(map(str, known))}; "
                    f"got {getattr(self, name)!r}"
                )


def pack(
    source: Source,
    directory: epath.Path,
    packing: Packing,
    *,
    max_skipped_share: float = 0.01,
    num_threads: int | None = None,
) -> int:
    """Packs a source, going on where an earlier call with the same arguments was stopped.

    Args:
      source: the images.
      directory: where the shards and the index go; empty, or from such an earlier call.
      packing: how they are packed.
      max_skipped_share: the largest share of images that may be impossible to decode; they are
        listed in skipped.jsonl.
      num_threads: by default one a core.

    Returns:
      How many images are packed.

    Raises:
      UserError: the directory holds something else, or cannot be written to.
      UnusableDataError: too many images cannot be decoded.
    """
    use_one_thread()
    index = {
        "format": FORMAT,
        "complete": False,
        "source": source.name,
        "source_images": len(source),
        "source_fingerprint": source.fingerprint(times=False),
        **dataclasses.asdict(packing),
        "class_names": list(source.class_names),
        "shards": [],
    }
    if _begin(directory, index):
        return int(read_index(os.fspath(directory))["num_images"])
    source = dataclasses.replace(source, name=index["source"])
    skipped = SkippedImages(directory, max_share=max_skipped_share)
    num_shards = -(-len(source) // packing.shard_size)
    names = [f"images-{k:05d}-of-{num_shards:05d}.array_record" for k in range(num_shards)]
    threads = num_threads or usable_cores()
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        progress.bar(len(source), unit="img", description="packing") as bar,
    ):
        shards = []
        for k, name in enumerate(names):
            first = k * packing.shard_size
            keys = range(first, min(first + packing.shard_size, len(source)))
            shard = _finished(directory, name)
            if shard is None:
                images = _in_order(
                    pool, lambda key: _packed(source, key, packing, skipped), keys, threads * _AHEAD
                )
                shard = _write_shard(directory, name, images, bar)
            bar.update(keys.stop - bar.n)
            shards.append(shard)
    num_images = sum(shard["images"] for shard in shards)
    write_json(
        directory / INDEX_FILE,
        index | {"complete": True, "num_images": num_images, "shards": shards},
    )
    for name in names:
        (directory / f"{name}.json").unlink()
    if len(skipped):
        _logger.info(skipped.summary())
    return num_images


def _begin(directory: epath.Path, index: dict[str, Any]) -> bool:
    """Writes the index, or checks that the one there is the same; whether it is whole already.

    Where the one there writes the same source in another way, so does `index` from then on.
    """
    path = directory / INDEX_FILE
    check_utf8(os.fspath(directory))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{PREFIX}*"):  # from a call that was killed
            left.unlink()
        if not path.exists():
            if any(directory.iterdir()):
                raise UserError(
                    f"{directory} is not empty, and holds no packed images to go on with"
                )
            write_json(path, index)
            return False
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error}") from error
    there = read_index(os.fspath(directory))
    if _place(there.get("source")) == _place(index["source"]):
        index["source"] = there["source"]
    passing = ("complete", "num_images", "shards", "source_fingerprint")
    differing = [key for key in index if key not in passing and there.get(key) != index[key]]
    if differing:
        raise UserError(
            f"{directory} holds images that are packed in another way "
            f"({', '.join(f'{key}: {there.get(key)!r}' for key in differing[:3])}); give the same "
            "arguments to go on with it, or another --output"
        )
    fingerprint = index["source_fingerprint"]
    if there.get("source_fingerprint", fingerprint) != fingerprint:  # older versions wrote none
        raise UserError(
            f"the images of {index['source']} have changed since {directory} was begun: files were "
            "renamed, replaced, added or removed; pack the new images into another --output"
        )
    return bool(there["complete"])


def _place(source: Any) -> str | None:
    """What a source is called, a folder always alike: `photos` as `photos/`."""
    return os.path.abspath(os.path.expanduser(source)) if isinstance(source, str) else None


def _in_order(
    pool: concurrent.futures.Executor, function: Any, keys: range, ahead: int
) -> Iterator[bytes | None]:
    """`function` of each key, in order, so many at a time."""
    keys_left = iter(keys)
    waiting = [pool.submit(function, key) for key in itertools.islice(keys_left, ahead)]
    try:
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(function, key) for key in itertools.islice(keys_left, 1)]
    finally:
        for future in waiting:
            future.cancel()


def _packed(source: Source, key: int, packing: Packing, skipped: SkippedImages) -> bytes | None:
    """The record of one image, or None if it cannot be decoded."""
    try:
        encoded, label = source.example(key)
        return encode_record(shrink(encoded, packing), label)
    except UndecodableError as error:
        skipped.add(source, key, str(error))
        return None


def shrink(encoded: bytes, packing: Packing) -> bytes:
    """An image file as it is packed.

    Raises:
      UndecodableError: it cannot be decoded.
    """
    header = read_header(encoded)
    factor = min(header.height, header.width) / packing.shorter_side
    reduction = largest_reduction(header, factor)
    image = decode(encoded, packing.channels, header=header, reduction=reduction)
    if factor <= 1 and packing.encoding == "jpeg":
        return encoded  # it was decoded only to see that it can be
    ratio = packing.shorter_side / min(image.shape[:2])
    if ratio < 1:
        height, width = (max(1, round(side * ratio)) for side in image.shape[:2])
        image = resize(image, height, width)
    if packing.channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    suffix, options = ".bmp", []
    if packing.encoding == "jpeg":
        suffix, options = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, packing.quality]
    ok, packed = cv2.imencode(suffix, np.ascontiguousarray(image), options)
    if not ok:
        raise UndecodableError(f"its {image.shape[1]} x {image.shape[0]} pixels cannot be packed")
    return packed.tobytes()


def _write_shard(
    directory: epath.Path, name: str, images: Iterator[bytes | None], bar: Any
) -> dict[str, Any]:
    """Writes a shard under another name first: no half of one is ever taken for a whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    count = 0
    with new_path(directory / name) as temporary:
        writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")  # random access
        try:
            for image in images:
                if image is not None:
                    writer.write(image)
                    count += 1
                bar.update(1)
        finally:
            writer.close()
    shard = {"file": name, "images": count}
    write_json(directory / f"{name}.json", shard)
    return shard


def _finished(directory: epath.Path, name: str) -> dict[str, Any] | None:
    """What a shard holds, if it is whole: what lies beside it was written after it."""
    try:
        shard = read_json(directory / f"{name}.json")
        return {"file": name, "images": int(shard["images"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
