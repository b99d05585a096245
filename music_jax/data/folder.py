"""Folders of image files as sources, in an order that does not depend on the file system."""

import array
import collections
import errno
import hashlib
import heapq
import logging
import os
import stat
import time
from typing import Any

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
        names, states, excluded = _list_images(root)
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
    if not names:
        raise UserError(
            f"the folder {name!r} holds no image ({', '.join(EXTENSIONS + ARRAY_EXTENSIONS)})"
            + (f"; {message}" if message else "")
        )
    files = _Files(root, names, states)
    class_names = tuple(map(escape_surrogates, files.class_names))
    _logger.info(
        f"{name}: {len(names):,} images, "
        + (f"{len(class_names):,} classes" if class_names else "no labels")
        + f", listed in {time.monotonic() - started:.1f} s"
    )
    if message:
        _logger.info(f"{name}: {message}")
    return Source(
        name=name,
        size=len(names),
        read=files.read,
        num_classes=len(class_names),
        class_names=class_names,
        identity=files.identity,
        known_labels=files.labels,
        record_name=files.record_name,
    )


def _list_images(root: str) -> tuple[list[str], np.ndarray, collections.Counter[str]]:
    """Lists the images of a folder in no particular order; raises OSError if it cannot be listed.

    Returns:
      Relative paths, with `/`; int64 [images, 3] of sizes in bytes, modification times in
      nanoseconds, and whether each is a link; and the numbers of excluded files by kind.
    """
    names: list[str] = []
    states = array.array("q")
    excluded: collections.Counter[str] = collections.Counter()
    real_root, last_line = os.path.realpath(root), time.monotonic()
    listed: set[str] = set()  # real paths of folders
    # A heap of folders: number of links on the path, path, real path, whether it is a link itself.
    waiting = [(0, "", real_root, False)]
    while waiting:
        num_links, prefix, real, is_link = heapq.heappop(waiting)
        if real in listed:
            excluded.update(["links to folders that are listed already"] * is_link)
            continue
        listed.add(real)
        with os.scandir(real) as entries:
            for entry in entries:
                state, path = _examine(entry), f"{prefix}{entry.name}"
                if isinstance(state, str):
                    excluded[state] += 1
                elif not stat.S_ISDIR(state.st_mode):
                    names.append(path)
                    states.extend((state.st_size, state.st_mtime_ns, entry.is_symlink()))
                elif not entry.is_symlink():
                    heapq.heappush(waiting, (num_links, f"{path}/", f"{real}/{entry.name}", False))
                else:
                    target = os.path.realpath(f"{real}/{entry.name}")
                    if _holds(target, real) or _holds(target, real_root):
                        excluded["links to a folder that holds them"] += 1
                    else:
                        heapq.heappush(waiting, (num_links + 1, f"{path}/", target, True))
        if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            _logger.info(f"listing {escape_surrogates(root)}: {len(names):,} images so far")
    found = np.asarray(states).reshape(-1, 3)
    is_array = np.asarray([name.lower().endswith(ARRAY_EXTENSIONS) for name in names], bool)
    if is_array.any() and not is_array.all():
        excluded.update(_kind(names[i]) for i in np.flatnonzero(is_array))
        names = [names[i] for i in np.flatnonzero(~is_array)]
        found = found[~is_array]
    return names, found, excluded


def _examine(entry: os.DirEntry) -> os.stat_result | str:
    """Returns the state of an image or a folder, or else the kind under which to exclude it."""
    name, is_link = entry.name, entry.is_symlink()
    endings = EXTENSIONS + ARRAY_EXTENSIONS
    is_image = name.lower().endswith(endings) and not name.startswith(".")
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

    def __init__(self, root: str, names: list[str], states: np.ndarray):
        order = sorted(range(len(names)), key=names.__getitem__)
        self._root = root
        self._names = [names[i] for i in order]
        self._sizes, self._times, self._is_link = states[order].T
        classes = [name.partition("/")[0] if "/" in name else "" for name in self._names]
        self.class_names = () if "" in classes else tuple(sorted(set(classes)))
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.labels = np.asarray([numbers.get(name, -1) for name in classes], np.int32)

    def read(self, index: int) -> dict[str, Any]:
        """Returns the record of an image."""
        path, is_link = f"{self._root}/{self._names[index]}", bool(self._is_link[index])
        return {"image": read_file(path, is_link=is_link)}

    def record_name(self, index: int) -> str:
        return escape_surrogates(self._names[index])

    def identity(self, times: bool) -> bytes:
        """Hashes names and sizes of all files in order, and if `times` their modification times."""
        digest = hashlib.sha256("\0".join(self._names).encode(errors="surrogateescape"))
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
