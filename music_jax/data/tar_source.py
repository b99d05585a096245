"""WebDataset tars as sources: their headers are listed once, and files are read where they are.

Files of one sample follow each other in a tar and have the same name up to the first dot after the
last slash; the rest is their extension. Nothing is extracted: names are only names, and links and
devices are ignored.
"""

import array
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from music_jax.data.file_patterns import expand
from music_jax.data.folder import ARRAY_EXTENSIONS, EXTENSIONS, MAX_FILE_BYTES
from music_jax.data.labels import number_labels
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.distributed.progress import escape_surrogates
from music_jax.errors import UndecodableError, UnusableDataError, UserError
from music_jax.workdir.files import parse_json

_logger = logging.getLogger(__name__)

_IMAGES = [{extension[1:] for extension in kind} for kind in (EXTENSIONS, ARRAY_EXTENSIONS)]
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # sample and extension
_LABEL, _RECORD, _FIELD = "cls", "json", "label"  # files with a label, and its field in a record
_MAX_LABEL_BYTES = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7z": "xz", b"\x28\xb5\x2f": "zstd"}

_BLOCK = 512  # bytes
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders and pipes
_ATTRIBUTES = (b"x", b"g", b"L", b"K")  # headers that add to the next one: POSIX, GNU
_MAX_HEADER_BYTES = 1 << 16  # of a long name; larger ones are no names


class _Member(NamedTuple):
    """A file in a tar: position of its content and its size, both in bytes."""

    sample: str
    extension: str
    offset: int
    size: int


def open_tars(pattern: str, *, image_key: str | None, label_key: str | None) -> Source:
    """Lists the samples of WebDataset tars, in the order of the files and of the samples in each.

    Args:
      pattern: Pattern of file names, see `file_patterns.expand`.
      image_key: Extension of the images; by default, the first of a sample that is a picture's, or
        else an array's.
      label_key: Extension of the files that hold the label, or else the field of the `.json` file
        that does; by default `cls`, or else the field `label`.

    Raises:
      UserError: There are no such files, or they hold no images.
      UnusableDataError: A file is damaged, or is no tar.
    """
    files = expand(pattern)
    name = f"wds:{escape_surrogates(pattern)}"
    names: list[str] = []
    places = array.array("q")
    labels: list[Any] = []
    without = 0
    extensions: set[str] = set()
    with progress.bar(len(files), unit="tar", description="listing", delay=2.0) as bar:
        for number, file in enumerate(files):
            with open(file, "rb") as content:
                for sample in _samples(file):
                    image = _find_image(sample, image_key)
                    if image is None:
                        without += 1
                        extensions.update(member.extension for member in sample[:4])
                        continue
                    names.append(f"{image.sample}.{image.extension}")
                    places.extend((number, image.offset, image.size))
                    labels.append(_read_label(sample, content.fileno(), label_key))
            bar.update(1)
    if not names:
        raise UserError(
            f"{name} has no images{f' with the extension {image_key!r}' if image_key else ''}; it "
            f"has files with the extensions {sorted(extensions)[:10]}: name one with --image_key="
        )
    found = number_labels(labels, f"{name}, a file .{label_key or _LABEL} or a field of .json")
    _logger.info(
        f"{name}: {len(names):,} images, {found.num_classes:,} classes, {len(files):,} tars"
        + (f"; excluded: {without:,} samples without an image" if without else "")
    )
    tars = _Tars(files, names, np.asarray(places).reshape(-1, 3), found.labels)
    return Source(
        name=name,
        size=len(names),
        read=tars.read,
        num_classes=found.num_classes,
        class_names=found.class_names,
        no_classes=found.no_classes,
        identity=tars.identity,
        known_labels=found.labels,
        multi_label=found.multi_label,
        record_name=tars.record_name,
    )


def _samples(file: str) -> Iterator[list[_Member]]:
    """Yields the members of each sample of a tar."""
    sample: list[_Member] = []
    for member in _members(file):
        same = sample and member.sample == sample[0].sample
        if not same or member.extension in {other.extension for other in sample}:
            if sample:
                yield sample
            sample = []
        sample.append(member)
    if sample:
        yield sample


def _members(file: str) -> Iterator[_Member]:
    """Yields the files in a tar, from its headers alone.

    Raises:
      UserError: The tar is compressed.
      UnusableDataError: The tar is damaged, or is none.
    """
    count = 0
    with open(file, "rb", buffering=0) as content:
        start = content.read(_BLOCK)  # begins with a name, if it is a tar
        kinds = [kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)]
        if kinds and b"ustar" not in start:
            raise UserError(
                f"{file!r} is compressed with {kinds[0]}, so that its files cannot be read one by "
                "one; decompress it first"
            )
        try:
            for name, offset, size in _files(content.fileno(), os.path.getsize(file)):
                count += 1
                if parts := _NAME.fullmatch(name.decode(errors="surrogateescape")):
                    yield _Member(parts[1], parts[2].lower(), offset, size)
        except (OSError, ValueError) as error:
            raise UnusableDataError(
                f"{file!r} is no tar, or is damaged after {count:,} files: {error}; replace it, or "
                "leave it out"
            ) from error


def _files(descriptor: int, tar_size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, offset and size of each regular file in a tar of any usual format.

    This takes a third of the time of `tarfile`, which takes a damaged header for the end, and may
    read a header of any size into memory.
    """
    offset, attributes = 0, dict[bytes, bytes]()  # of the next file, from a header before its own
    ended = False  # blocks of zeros end a tar, and another one may be joined to it
    if not tar_size:
        raise ValueError("it is empty")
    while header := os.pread(descriptor, _BLOCK, offset):
        if header == bytes(_BLOCK):
            offset, ended = offset + _BLOCK, True
            continue
        if not _is_header(header):
            if ended:
                return
            raise ValueError("it ends early" if len(header) < _BLOCK else "a header is damaged")
        kind, start = header[156:157], offset + _BLOCK
        size = int(attributes.get(b"size", b"-1"))
        if kind in _WITHOUT_CONTENT or size < 0:
            size = 0 if kind in _WITHOUT_CONTENT else _number(header[124:136])
        if start + size > tar_size:
            raise ValueError("it ends early")
        offset = start - -size // _BLOCK * _BLOCK
        if kind in _ATTRIBUTES:
            if size > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size:,} bytes")
            content = os.pread(descriptor, size, start)
            if kind == b"x":
                attributes |= _parse_attributes(content)
            elif kind == b"L":
                attributes[b"path"] = content.rstrip(b"\0")
            continue
        if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in attributes):
            raise ValueError("a file is sparse, which is not supported")
        if kind in _REGULAR:
            name, prefix = (text.partition(b"\0")[0] for text in (header[:100], header[345:500]))
            if prefix and header[257:263] == b"ustar\0":
                name = prefix + b"/" + name
            yield attributes.get(b"path", name), start, size
        attributes = {}


def _is_header(block: bytes) -> bool:
    """Returns whether a block has the checksum of a header."""
    try:
        checksum = _number(block[148:156])
    except (ValueError, IndexError):
        return False
    return sum(block) - sum(block[148:156]) + 8 * ord(" ") == checksum


def _number(field: bytes) -> int:
    """Returns the number in a field of a header: octal, or binary if it is too large for that."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if (number := int(field.partition(b"\0")[0].strip() or b"0", 8)) < 0:
        raise ValueError(f"a header holds the number {number}")
    return number


def _parse_attributes(content: bytes) -> dict[bytes, bytes]:
    """Parses lines of the POSIX format, each "LENGTH KEY=VALUE" with the length of the line."""
    found, start = {}, 0
    while start < len(content):
        length, space, _ = content[start : start + 16].partition(b" ")
        end = start + int(length)
        if not space or end <= start or content[end - 1 : end] != b"\n":
            raise ValueError("a header is damaged")
        key, _, value = content[start + len(length) + 1 : end - 1].partition(b"=")
        found[key], start = value, end
    return found


def _find_image(sample: list[_Member], image_key: str | None) -> _Member | None:
    """Returns the first picture of a sample, or else its first array, which may be anything."""
    wanted = [{image_key.lower().removeprefix(".")}] if image_key else _IMAGES
    return next((x for kind in wanted for x in sample if x.extension in kind), None)


def _read_label(sample: list[_Member], descriptor: int, label_key: str | None) -> Any:
    """Reads the label of a sample; None if it has none that can be read."""
    by_extension = {member.extension: member for member in sample}
    for extension in ((label_key or _LABEL).lower().removeprefix("."), _RECORD):
        member = by_extension.get(extension)
        if member is None or member.size > _MAX_LABEL_BYTES:
            continue
        try:
            text = os.pread(descriptor, member.size, member.offset).decode().strip()
            if extension != _RECORD:
                return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else text or None
            label = parse_json(text).get(label_key or _FIELD)
        except (ValueError, AttributeError):
            continue
        # Of other labels, only the type is kept, which says why the images have no labels.
        return label if isinstance(label, int | str | list | None) else type(label)()
    return None


class _Tars:
    """Images in tars, each read on access."""

    def __init__(self, files: list[str], names: list[str], places: np.ndarray, labels: np.ndarray):
        self._files, self._names, self._places, self._labels = files, names, places, labels
        self._states = [os.stat(file) for file in files]

    def read(self, index: int) -> dict[str, Any]:
        """Returns the record of an image."""
        number, offset, size = self._places[index].tolist()
        if size > MAX_FILE_BYTES:
            raise UndecodableError(f"its {size:,} bytes are more than {MAX_FILE_BYTES:,}")
        with open(self._files[number], "rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, offset)
        if len(content) < size:
            raise UndecodableError("its tar ends before it")
        return {"image": content}

    def record_name(self, index: int) -> str:
        file = os.path.basename(self._files[self._places[index, 0]])
        return escape_surrogates(f"{file}:{self._names[index]}")

    def identity(self, times: bool) -> bytes:
        """Hashes names, places and labels of all images, and if `times` the tars' times."""
        digest = hashlib.sha256("\0".join(self._names).encode(errors="surrogateescape"))
        digest.update(self._places.tobytes() + self._labels.tobytes())
        digest.update(str([state.st_size for state in self._states]).encode())
        if times:
            digest.update(str([state.st_mtime_ns for state in self._states]).encode())
        return digest.digest()
