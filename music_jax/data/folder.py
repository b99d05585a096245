"""Folders of image files as sources, in an order that does not depend on the file system."""

import array
import bisect
import collections
import errno
import hashlib
import heapq
import itertools
import logging
import os
import stat
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from music_jax.config import normalize_path
from music_jax.data.sources import Source
from music_jax.distributed.progress import escape_surrogates
from music_jax.errors import UndecodableError, UserError

_logger = logging.getLogger(__name__)

# All extensions of the supported formats in Pillow, OpenCV and browsers.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp"),
    *(".png", ".apng", ".webp", ".bmp", ".dib", ".gif"),
)

ARRAY_EXTENSIONS = (".npy", ".tif", ".tiff")  # of images, if no file has one of the above

_ENDINGS = frozenset(EXTENSIONS + ARRAY_EXTENSIONS)

# Folders that operating systems and storage devices create, besides hidden ones; in lower case.
_SYSTEM_FOLDERS = (
    *("@eadir", "@recycle", "@recently-snapshot", "@sharesnap", "@__thumb"),
    *("#recycle", "#snapshot", "$recycle.bin", "system volume information"),
    *("__macosx", "network trash folder", "temporary items", "lost+found"),
)

MAX_FILE_BYTES = 2**29  # a larger file is not read: decode.MAX_PIXELS decoded are 2**28.6 bytes
_SECONDS_BETWEEN_LINES = 5.0
_KINDS_IN_MESSAGE = 10
_LONGEST_EXTENSION = 16


def open_folder(path: str) -> Source:
    """Lists the images of a folder and of all folders in it, without reading them.

    A file is an image by its extension (`EXTENSIONS`, in upper or lower case; `ARRAY_EXTENSIONS` if
    there are no others, since arrays beside pictures may be anything). Hidden files and
    folders and those of the operating system are excluded, and their number is logged. Links are
    followed, but each folder is listed once: by its own path, or else by the first link to it. The
    class of an image is the first sub-folder on its path; the source has labels if every image has
    a class.

    Args:
      path: Folder.

    Returns:
      The images in the order of their relative paths, which are their names.

    Raises:
      UserError: The folder does not exist, cannot be listed, or holds no image.
    """
    root = os.path.abspath(os.path.expanduser(path))
    name = escape_surrogates(normalize_path(path))
    if "\0" in root or not os.path.isdir(root):
        raise UserError(f"there is no folder {name!r}")
    started = time.monotonic()
    try:
        runs, excluded = _list_images(root)
    except OSError as error:
        where = escape_surrogates(os.path.relpath(os.fsdecode(error.filename or root), root))
        raise UserError(
            f"cannot list the folder {name!r}: {error.strerror}: {where[:100]!r}"
        ) from error
    kinds = sorted(excluded.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {escape_surrogates(kind)}" for kind, count in kinds[:_KINDS_IN_MESSAGE]]
    if len(kinds) > _KINDS_IN_MESSAGE:
        parts.append(f"{sum(count for _, count in kinds[_KINDS_IN_MESSAGE:]):,} others")
    message = f"excluded: {', '.join(parts)}" if parts else ""
    if not runs:
        raise UserError(
            f"the folder {name!r} holds no image ({', '.join(EXTENSIONS + ARRAY_EXTENSIONS)})"
            + (f"; {message}" if message else "")
        )
    files = _Files(root, runs)
    class_names = tuple(map(escape_surrogates, files.class_names))
    _logger.info(
        f"{name}: {len(files.labels):,} images, "
        + (f"{len(class_names):,} classes" if class_names else "no labels")
        + f", listed in {time.monotonic() - started:.1f} s"
    )
    if message:
        _logger.info(f"{name}: {message}")
    return Source(
        name=name,
        size=len(files.labels),
        read=files.read,
        num_classes=len(class_names),
        class_names=class_names,
        identity=files.identity,
        known_labels=files.labels,
        record_name=files.record_name,
    )


class _Run(NamedTuple):
    """Images of one folder with no sub-folder between them, in order, packed to save memory."""

    first: str  # relative path of the first, with `/`
    paths: bytes  # of all, separated by zeros
    states: np.ndarray  # int64 [images, 3]: bytes, modification time in ns, whether it is a link


def _list_images(root: str) -> tuple[list[_Run], collections.Counter[str]]:
    """Lists the images of a folder, in order; raises OSError if it cannot be listed.

    Returns:
      The images, and the numbers of excluded files by kind.
    """
    runs: dict[bool, list[_Run]] = {False: [], True: []}  # whether they are arrays
    excluded: collections.Counter[str] = collections.Counter()
    real_root, last_line, count = os.path.realpath(root), time.monotonic(), 0
    listed: set[str] = set()  # real paths of folders
    # A heap of folders: number of links on the path, path, real path, whether it is a link itself.
    waiting = [(0, "", real_root, False)]
    while waiting:
        num_links, prefix, real, is_link = heapq.heappop(waiting)
        if real in listed:
            excluded.update(["links to folders that are listed already"] * is_link)
            continue
        listed.add(real)
        names, states, folders = [], array.array("q"), []
        with os.scandir(real) as entries:
            for entry in entries:
                state = _examine(entry)
                if isinstance(state, str):
                    excluded[state] += 1
                elif not stat.S_ISDIR(state.st_mode):
                    names.append(entry.name)
                    states.extend((state.st_size, state.st_mtime_ns, entry.is_symlink()))
                else:
                    folders.append(f"{entry.name}/")
                    path, target = f"{prefix}{entry.name}/", f"{real}/{entry.name}"
                    if not entry.is_symlink():
                        heapq.heappush(waiting, (num_links, path, target, False))
                        continue
                    target = os.path.realpath(target)
                    if _holds(target, real) or _holds(target, real_root):
                        excluded["links to a folder that holds them"] += 1
                    else:
                        heapq.heappush(waiting, (num_links + 1, path, target, True))
        for is_array, run in _split(prefix, names, states, folders):
            runs[is_array].append(run)
        count += len(names)
        if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            _logger.info(f"listing {escape_surrogates(root)}: {count:,} images so far")
    if runs[False]:
        for run in runs.pop(True):
            excluded.update(map(_kind, _decode(run.paths).split("\0")))
    return sorted(itertools.chain(*runs.values()), key=lambda run: run.first), excluded


def _split(
    prefix: str, names: list[str], states: array.array, folders: list[str]
) -> Iterator[tuple[bool, _Run]]:
    """Sorts the images of a folder, and splits them where its sub-folders come in the order.

    Yields:
      Whether the images are arrays, and the images.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    names, rows = [names[i] for i in order], np.asarray(states).reshape(-1, 3)[order]
    is_array = np.asarray([name.lower().endswith(ARRAY_EXTENSIONS) for name in names], bool)
    cuts = {0, len(names), *(bisect.bisect(names, folder) for folder in folders)}
    for start, stop in itertools.pairwise(sorted(cuts)):
        for kind in np.unique(is_array[start:stop]):
            chosen = start + np.flatnonzero(is_array[start:stop] == kind)
            paths = [f"{prefix}{names[i]}" for i in chosen]
            packed = "\0".join(paths).encode(errors="surrogateescape")
            yield bool(kind), _Run(paths[0], packed, rows[chosen])


def _decode(path: bytes) -> str:
    return path.decode(errors="surrogateescape")


def _examine(entry: os.DirEntry) -> os.stat_result | str:
    """Returns the state of an image or a folder, or else the kind under which to exclude it."""
    name, is_link = entry.name, entry.is_symlink()
    is_image = name[name.rfind(".") :].lower() in _ENDINGS and not name.startswith(".")
    if not (is_image or is_link or entry.is_dir(follow_symlinks=False)):
        return _kind(name)
    try:
        state = entry.stat()
    except OSError as error:
        if is_link:  # to nothing, to itself, or to what may not be read
            return "links that cannot be followed"
        if isinstance(error, FileNotFoundError):
            return "files that have just been removed"
        raise
    if stat.S_ISDIR(state.st_mode):
        is_hidden = name.startswith(".") or name.lower() in _SYSTEM_FOLDERS
        return f"{name}/" if is_hidden else state
    if not is_image:
        return _kind(name)
    return state if stat.S_ISREG(state.st_mode) else "pipes or devices"


def _kind(name: str) -> str:
    """Returns the kind under which an excluded file is counted."""
    extension = os.path.splitext(name)[1].lower()
    if not extension or len(extension) > _LONGEST_EXTENSION:
        extension = "files without an extension"
    return f"hidden {extension}" if name.startswith(".") else extension


def _holds(folder: str, path: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


class _Files:
    """Images of a folder, each read on access."""

    def __init__(self, root: str, runs: list[_Run]):
        self._root = root
        self._paths = b"\0".join(run.paths for run in runs)
        zeros = np.flatnonzero(np.frombuffer(self._paths, np.uint8) == 0)
        self._ends = np.append(zeros, len(self._paths))
        states = np.concatenate([run.states for run in runs])
        self._sizes, self._times, self._is_link = states.T
        classes = [run.first.partition("/")[0] if "/" in run.first else "" for run in runs]
        self.class_names = () if "" in classes else tuple(sorted(set(classes)))
        numbers = {name: number for number, name in enumerate(self.class_names)}
        labels = np.asarray([numbers.get(name, -1) for name in classes], np.int32)
        self.labels = np.repeat(labels, [len(run.states) for run in runs])

    def _path(self, index: int) -> str:
        start = self._ends[index - 1] + 1 if index else 0
        return _decode(self._paths[start : self._ends[index]])

    def read(self, index: int) -> dict[str, Any]:
        """Returns the record of an image."""
        path, is_link = f"{self._root}/{self._path(index)}", bool(self._is_link[index])
        return {"image": read_file(path, is_link=is_link)}

    def record_name(self, index: int) -> str:
        return escape_surrogates(self._path(index))

    def identity(self, times: bool) -> bytes:
        """Hashes names and sizes of all files in order, and if `times` their modification times."""
        digest = hashlib.sha256(self._paths)
        digest.update(self._sizes.tobytes())
        if times:
            digest.update(self._times.tobytes())
        return digest.digest()


def read_file(path: str, *, is_link: bool) -> bytes:
    """Reads an image's file, which may be a link only if `is_link`.

    Raises:
      UndecodableError: It cannot be read, or is too large.
    """
    # The file may have become a pipe, which must not block, or a link, which is not followed.
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if is_link else os.O_NOFOLLOW)
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UndecodableError("it is no longer a file, but a pipe, device or folder")
            if status.st_size > MAX_FILE_BYTES:
                raise UndecodableError(
                    f"its {status.st_size:,} bytes are more than {MAX_FILE_BYTES:,}"
                )
            return file.read(status.st_size)
    except OSError as error:
        if error.errno == errno.ELOOP and not is_link:
            reason = "it has become a link since the folder was listed"
            raise UndecodableError(reason) from error
        raise UndecodableError(f"it cannot be read: {error.strerror}") from error
