"""Packing: decodes the images of a source, shrinks them, and writes them as array_record shards.

A shard has the images of a fixed range of the source, so that several workers write different
shards of the same dataset, and the result does not depend on their number.
"""

import contextlib
import dataclasses
import functools
import io
import logging
import os
from collections.abc import Iterable
from typing import Any

import cv2
import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from music_jax.data.arrays import PIXEL_TYPES
from music_jax.data.crops import resize
from music_jax.data.decode import EncodedImage, decode, largest_reduction, read_header
from music_jax.data.packed import FORMAT, INDEX_FILE, label_type, num_shards, read_index
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed import progress, usable_cores
from music_jax.distributed.shares import ALL, Share
from music_jax.errors import UndecodableError, UnusableDataError, UserError, raising
from music_jax.workdir.directory import check_utf8
from music_jax.workdir.files import PREFIX, new_path, write_json

_logger = logging.getLogger(__name__)

_IMAGES_PER_THREAD = 64  # packed ahead of the writer


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
    share: Share = ALL,
    max_skipped_share: float = 0.01,
    num_threads: int | None = None,
) -> int | None:
    """Packs a share of a source, or resumes an earlier call with the same arguments.

    The call after which no shard is missing completes the index.

    Args:
      source: Images.
      directory: Directory for the shards and the index; empty, or from such an earlier call. The
        workers share it.
      packing: Settings of packing.
      share: The shards that this call writes.
      max_skipped_share: Largest share of images that cannot be decoded. They are listed in
        skipped.jsonl.
      num_threads: Number of threads; by default one per core.

    Returns:
      Number of packed images of all shares; None while shards of other shares are missing.

    Raises:
      UserError: The directory holds something else, or cannot be written to.
      UnusableDataError: Too many images cannot be decoded.
    """
    cv2.setNumThreads(0)  # Images are decoded on threads of their own.
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    index = {
        "format": FORMAT,
        "complete": False,
        "source": source.name,
        "source_images": len(source),
        "source_fingerprint": source.fingerprint(times=False),
        **dataclasses.asdict(packing),
        "class_names": list(names),
        "shards": [],
    }
    if source.multi_label:
        index["multi_label"] = True
    kind = label_type(names if source.multi_label else None).base
    tag = f"{share.index}-of-{share.count}-"
    if _start(directory, index, tag):
        return int(read_index(directory)["num_images"])
    if source.no_classes:
        _logger.warning(f"the images are packed without labels: {source.no_classes}")
    source = dataclasses.replace(source, name=index["source"])
    skipped = _skipped_images(directory, max_share=max_skipped_share, share=share)
    threads = num_threads or usable_cores()
    options = grain.ReadOptions(threads, prefetch_buffer_size=threads * _IMAGES_PER_THREAD)

    def make_record(key: int) -> bytes | None:  # Grain leaves out None
        try:
            encoded, label = source.example(key)
            return np.asarray(label, kind).tobytes() + shrink(encoded, packing)
        except UndecodableError as error:
            skipped.add(source, key, str(error))
            return None

    files = [
        f"images-{k:05d}-of-{num_shards(index):05d}.array_record" for k in range(num_shards(index))
    ]
    own = share.of(len(files))
    first, end = (min(k * packing.shard_size, len(source)) for k in (own.start, own.stop))
    with progress.bar(end - first, unit="img", description="packing") as bar:
        for k in own:
            stop = min((k + 1) * packing.shard_size, len(source))
            while _count_images(directory / files[k]) is None:
                keys = grain.MapDataset.range(k * packing.shard_size, stop)
                records = keys.map(make_record).to_iter_dataset(options)
                try:
                    _write_shard(directory / files[k], records, bar, tag)
                except FileNotFoundError:  # removed, since the same worker was started twice
                    if not directory.exists():
                        raise
            bar.update(stop - first - bar.n)
    skipped.close()
    try:
        return _finish(source, directory, index, files, max_skipped_share)
    except FileNotFoundError:  # removed by another worker that completed the index meanwhile
        if (existing := read_index(directory))["complete"]:
            return int(existing["num_images"])
        raise


_skipped_images = functools.partial(
    SkippedImages,
    remedy="Repair them and pack into another --output, or rerun and allow a larger share.",
)


def _finish(
    source: Source,
    directory: epath.Path,
    index: dict[str, Any],
    files: list[str],
    max_skipped_share: float,
) -> int | None:
    """Completes the index if no shard is missing; returns the number of images, or None.

    Several workers may do so at the same time: they write the same files.
    """
    present = {path.name for path in directory.iterdir()}
    if not present.issuperset(files):
        return None
    counts = [_count_images(directory / file) for file in files]
    if None in counts:  # damaged; its worker writes it again
        return None
    skipped = _skipped_images(directory, max_share=max_skipped_share)
    skipped.merge()
    skipped.check(source)
    shards = [{"file": file, "images": n} for file, n in zip(files, counts, strict=True)]
    num_images = sum(filter(None, counts))
    if not num_images:
        raise UnusableDataError(
            f"none of the {len(source):,} images can be read; see {skipped.path}"
        )
    index |= {"complete": True, "num_images": num_images, "shards": shards}
    write_json(directory / INDEX_FILE, index)
    for temporary in directory.glob(f"{PREFIX}*"):  # from workers that were killed
        temporary.unlink(missing_ok=True)
    if len(skipped):
        _logger.warning(skipped.summary())
    return num_images


def _start(directory: epath.Path, index: dict[str, Any], tag: str) -> bool:
    """Writes the index, or checks that the existing one is equal; returns whether it is complete.

    If the existing one spells the name of the same source differently, `index` takes that name.
    """
    check_utf8(os.fspath(directory))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for temporary in directory.glob(f"{PREFIX}{tag}*"):  # from a call that was killed
            temporary.unlink(missing_ok=True)
        names = [path.name for path in directory.iterdir()]
        if INDEX_FILE not in names:
            if not all(name.startswith(PREFIX) for name in names):  # of another worker
                raise UserError(
                    f"{directory} is not empty, and holds no packed images to resume; give "
                    "another --output"
                )
            write_json(directory / INDEX_FILE, index)
            return False
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error}") from error
    existing = read_index(directory)
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
    if existing.get("source_fingerprint") != index["source_fingerprint"]:
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


def _write_shard(path: epath.Path, records: Iterable[bytes], bar: Any, tag: str) -> None:
    """Writes a shard that appears only when it is complete."""
    with new_path(path, tag) as temporary:
        writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")  # for random access
        # It raises RuntimeError if, for instance, the disk is full.
        unwritten = functools.partial(raising, UserError, f"cannot write {path}")
        try:
            for record in records:
                with unwritten():
                    writer.write(record)
                bar.update(1)
        finally:
            with unwritten():
                writer.close()
