"""Folders of image files as sources, in an order that does not depend on the file system."""

import bisect
import collections
import errno
import functools
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
from music_jax.data.order import evenly_spaced
from music_jax.data.parallel import map_ranges
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
_TIMED_RANGES, _TIMED_FILES = 16, 16  # files of each range
_MAX_LOCAL_STAT_SECONDS = 1e-4
_STAT_THREADS = 32
# A file that has been removed, or cannot be found again. Reading it is an UndecodableError.
_REMOVED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP})
_IMAGE, _LINK, _FOLDER = "image", "link", "folder"  # unlike all kinds of excluded files


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
        failed = os.path.realpath(os.fsdecode(error.filename or root))
        where = escape_surrogates(os.path.relpath(failed, os.path.realpath(root)))
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
    is_link: np.ndarray  # bool [images]


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
        names, links, folders = [], set(), []
        with os.scandir(real) as entries:
            if not os.access(real, os.X_OK):  # its files could be listed, but not read
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), real)
            for entry in entries:
                kind = _examine(entry)
                if kind == _IMAGE:
                    names.append(entry.name)
                elif kind == _LINK:
                    names.append(entry.name)
                    links.add(entry.name)
                elif kind != _FOLDER:
                    excluded[kind] += 1
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
        for is_array, run in _split(prefix, names, links, folders):
            runs[is_array].append(run)
        count += len(names)
        if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            _logger.info(f"listing {escape_surrogates(root)}: {count:,} images so far")
    if runs[False]:
        for run in runs.pop(True):
            excluded.update(map(_kind, os.fsdecode(run.paths).split("\0")))
    return sorted(itertools.chain(*runs.values()), key=lambda run: run.first), excluded


def _split(
    prefix: str, names: list[str], links: set[str], folders: list[str]
) -> Iterator[tuple[bool, _Run]]:
    """Sorts the images of a folder, and splits them where its sub-folders come in the order.

    Yields:
      Whether the images are arrays, and the images.
    """
    names = sorted(names)
    is_link = np.zeros(len(names), bool)
    if links:
        is_link[:] = [name in links for name in names]
    is_array = np.asarray([name.lower().endswith(ARRAY_EXTENSIONS) for name in names], bool)
    cuts = {0, len(names), *(bisect.bisect(names, folder) for folder in folders)}
    for start, stop in itertools.pairwise(sorted(cuts)):
        for kind in np.unique(is_array[start:stop]):
            chosen = start + np.flatnonzero(is_array[start:stop] == kind)
            paths = [f"{prefix}{names[i]}" for i in chosen]
            packed = os.fsencode("\0".join(paths))
            yield bool(kind), _Run(paths[0], packed, is_link[chosen])


def _examine(entry: os.DirEntry) -> str:
    """Returns `_IMAGE`, `_LINK` to an image, `_FOLDER`, or the kind under which to exclude it.

    The entries of a folder have types, so that only links need a call of the system; on a file
    system that does not tell types, all entries do.
    """
    name = entry.name
    is_image = name[name.rfind(".") :].lower() in _ENDINGS and not name.startswith(".")
    if is_image and entry.is_file(follow_symlinks=False):
        return _IMAGE
    is_folder, is_file = entry.is_dir(follow_symlinks=False), False
    if entry.is_symlink():
        try:
            mode = entry.stat().st_mode
        except OSError:  # to nothing, to itself, or to what may not be read
            return "links that cannot be followed"
        is_folder, is_file = stat.S_ISDIR(mode), stat.S_ISREG(mode)
    if is_folder:
        is_hidden = name.startswith(".") or name.lower() in _SYSTEM_FOLDERS
        return f"{name}/" if is_hidden else _FOLDER
    if not is_image:
        return _kind(name)
    return _LINK if is_file else "pipes, devices or removed files"


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
        self._is_link = np.concatenate([run.is_link for run in runs])
        classes = [run.first.partition("/")[0] if "/" in run.first else "" for run in runs]
        self.class_names = () if "" in classes else tuple(sorted(set(classes)))
        numbers = {name: number for number, name in enumerate(self.class_names)}
        labels = np.asarray([numbers.get(name, -1) for name in classes], np.int32)
        self.labels = np.repeat(labels, [len(run.is_link) for run in runs])

    def _start(self, index: int) -> int:
        return self._ends[index - 1] + 1 if index else 0

    def _path(self, index: int) -> str:
        return os.fsdecode(self._paths[self._start(index) : self._ends[index]])

    def read(self, index: int) -> dict[str, Any]:
        """Returns the record of an image."""
        path, is_link = f"{self._root}/{self._path(index)}", bool(self._is_link[index])
        return {"image": read_file(path, is_link=is_link)}

    def record_name(self, index: int) -> str:
        return escape_surrogates(self._path(index))

    def identity(self, times: bool) -> bytes:
        """Hashes names and sizes of all files in order, and if `times` their modification times."""
        digest = hashlib.sha256(self._paths)
        sizes, modified = self._states
        digest.update(sizes.tobytes())
        if times:
            digest.update(modified.tobytes())
        return digest.digest()

    @functools.cached_property
    def _states(self) -> np.ndarray:
        """Size in bytes and modification time in ns of each file, int64 [2, images].

        Both are -1 for a file that has been removed. Uses many threads if the file system is slow,
        as those over a network are; on a local one, they would only slow each other down.
        """
        count = len(self.labels)
        starts = evenly_spaced(count, _TIMED_RANGES)
        started = time.monotonic()
        timed = [self._stat(range(i, min(i + _TIMED_FILES, count))).shape[1] for i in starts]
        is_slow = time.monotonic() - started > sum(timed) * _MAX_LOCAL_STAT_SECONDS
        parts = map_ranges(
            self._stat,
            count,
            description=f"sizes of {escape_surrogates(self._root)}",
            num_threads=_STAT_THREADS if is_slow else 1,
        )
        return np.concatenate(parts, axis=1)

    def _stat(self, indices: range) -> np.ndarray:
        """Returns the columns of `_states` for consecutive files."""
        root, found = os.fsencode(self._root), []
        start = self._start(indices.start)
        for path in self._paths[start : self._ends[indices.stop - 1]].split(b"\0"):
            try:
                state = os.stat(b"%b/%b" % (root, path))
                # Modulo 2^64: some files have times after 2262.
                modified = (state.st_mtime_ns + 2**63) % 2**64 - 2**63
                found.append((state.st_size, modified))
            except OSError as error:
                if error.errno not in _REMOVED:
                    raise UserError(
                        f"cannot get the size of {escape_surrogates(os.fsdecode(path))[:100]!r} in "
                        f"the folder {escape_surrogates(self._root)!r}: {error.strerror}"
                    ) from error
                found.append((-1, -1))
        return np.asarray(found, np.int64).T


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
