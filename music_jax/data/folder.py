"""Folders of image files as sources, in an order that does not depend on the file system."""

import array
import collections
import errno
import hashlib
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

    A file is an image by its extension (`EXTENSIONS`, in upper or lower case). Hidden files and
    folders and those of the operating system are excluded, and their number is logged. Links are
    followed, but each folder is listed once: by its own path, or else by the first link to it. The
    class of an image is the first subfolder on its path; the source has labels if every image has a
    class.

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
    listing = _Listing(root)
    try:
        listing.walk()
    except OSError as error:
        where = escape_surrogates(os.path.relpath(os.fsdecode(error.filename or root), root))
        raise UserError(
            f"cannot list the folder {name!r}: {error.strerror}: {where[:100]!r}"
        ) from error
    excluded = listing.excluded()
    if not listing.names:
        raise UserError(
            f"the folder {name!r} holds no image ({', '.join(EXTENSIONS)})"
            + (f"; excluded: {excluded}" if excluded else "")
        )
    files = _Files(root, listing)
    class_names = tuple(map(escape_surrogates, files.class_names))
    _logger.info(
        f"{name}: {len(files):,} images, "
        + (f"{len(class_names):,} classes" if class_names else "no labels")
        + f", listed in {time.monotonic() - started:.1f} s"
    )
    if excluded:
        _logger.info(f"{name}: excluded: {excluded}")
    return Source(
        name=name,
        records=files,
        image_key="image",
        label_key="label",
        num_classes=len(class_names),
        class_names=class_names,
        identity=files.identity,
    )


class _Listing:
    """The image files in a folder, in no particular order."""

    def __init__(self, root: str):
        self.names: list[str] = []  # relative paths, with `/`
        self.sizes, self.times = array.array("q"), array.array("q")  # bytes; nanoseconds
        self.is_link = bytearray()  # whether each file is a link
        self._excluded: collections.Counter[str] = collections.Counter()
        self._root = root
        self._real_root = os.path.realpath(root)
        self._listed: set[str] = set()  # real paths of folders
        self._last_line = time.monotonic()

    def walk(self) -> None:
        """Lists all images; raises OSError if a folder cannot be listed."""
        links = [("", self._real_root)]
        while links:
            found = []
            for name, target in links:
                if target in self._listed:
                    self._excluded["links to folders that are listed already"] += 1
                found += self._walk_below(name, target)
            links = sorted(found)

    def excluded(self) -> str:
        """Returns the numbers of excluded files by extension, folder or reason, or ""."""
        kinds = sorted(self._excluded.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count:,} {escape_surrogates(kind)}" for kind, count in kinds]
        if len(kinds) > _KINDS_IN_MESSAGE:
            others = sum(count for _, count in kinds[_KINDS_IN_MESSAGE:])
            parts[_KINDS_IN_MESSAGE:] = [f"{others:,} others"]
        return ", ".join(parts)

    def _walk_below(self, prefix: str, real: str) -> list[tuple[str, str]]:
        """Lists a folder and those in it; returns the links to folders, with their targets."""
        links: list[tuple[str, str]] = []
        waiting = [(prefix, real)]
        while waiting:
            prefix, real = waiting.pop()
            if real in self._listed:
                continue
            self._listed.add(real)
            with os.scandir(real) as entries:
                for entry in entries:
                    self._add(entry, prefix, real, waiting, links)
            if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                root = escape_surrogates(self._root)
                _logger.info(f"listing {root}: {len(self.names):,} images so far")
        return links

    def _add(
        self,
        entry: os.DirEntry,
        prefix: str,
        real: str,
        folders: list[tuple[str, str]],
        links: list[tuple[str, str]],
    ) -> None:
        """Adds an entry of a folder to the images, the folders or the links, or excludes it."""
        name, is_link = entry.name, entry.is_symlink()
        is_folder = entry.is_dir(follow_symlinks=False)
        is_image = name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        if not (is_folder or is_link or is_image):
            self._excluded[_kind(name)] += 1
            return
        try:
            status = entry.stat() if not is_folder else None
        except OSError as error:
            if is_link:  # to nothing, to itself, or to what may not be read
                self._excluded["links that cannot be followed"] += 1
            elif not isinstance(error, FileNotFoundError):  # else it has just been removed
                raise
            return
        if status is None or stat.S_ISDIR(status.st_mode):
            if name.startswith(".") or name.lower() in _SYSTEM_FOLDERS:
                self._excluded[f"{name}/"] += 1
            elif not is_link:
                folders.append((f"{prefix}{name}/", f"{real}/{name}"))
            else:
                target = os.path.realpath(f"{real}/{name}")
                if _holds(target, real) or _holds(target, self._real_root):
                    self._excluded["links to a folder that holds them"] += 1
                else:
                    links.append((f"{prefix}{name}/", target))
        elif not is_image:
            self._excluded[_kind(name)] += 1
        elif not stat.S_ISREG(status.st_mode):
            self._excluded["pipes or devices"] += 1
        else:
            self.names.append(prefix + name)
            self.sizes.append(status.st_size)
            self.times.append(status.st_mtime_ns)
            self.is_link.append(is_link)


def _kind(name: str) -> str:
    """Returns the kind under which an excluded file is counted."""
    extension = os.path.splitext(name)[1].lower()
    if len(extension) > _LONGEST_EXTENSION:
        return "other files"
    if not name.startswith("."):
        return extension or "files without an extension"
    if extension:
        return f"hidden {extension}"
    return name if name == ".DS_Store" else "hidden files"


def _holds(folder: str, path: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


class _Files:
    """Records of a folder, each read on access."""

    def __init__(self, root: str, listing: _Listing):
        order = sorted(range(len(listing.names)), key=listing.names.__getitem__)
        self._root = root
        self._names = [listing.names[i] for i in order]
        classes = [name.partition("/")[0] if "/" in name else "" for name in self._names]
        self.class_names = () if "" in classes else tuple(sorted(set(classes)))
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.labels = np.asarray([numbers.get(name, -1) for name in classes], np.int32)
        self._sizes = np.asarray(listing.sizes)[order]
        self._times = np.asarray(listing.times)[order]
        self._is_link = np.frombuffer(listing.is_link, np.bool_)[order]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._read(index), "label": self.labels[index]}

    def record_name(self, index: int) -> str:
        return escape_surrogates(self._names[index])

    def identity(self, times: bool) -> bytes:
        """Hashes names and sizes of all files in order, and if `times` their modification times."""
        digest = hashlib.sha256("\0".join(self._names).encode(errors="surrogateescape"))
        digest.update(self._sizes.tobytes())
        if times:
            digest.update(self._times.tobytes())
        return digest.digest()

    def _read(self, index: int) -> bytes:
        # The file may have become a pipe, which must not block, or a link, which is not followed.
        flags = os.O_RDONLY | os.O_NONBLOCK | (0 if self._is_link[index] else os.O_NOFOLLOW)
        try:
            with open(os.open(f"{self._root}/{self._names[index]}", flags), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UndecodableError("it is no longer a file, but a pipe, device or folder")
                if status.st_size > MAX_FILE_BYTES:
                    raise UndecodableError(
                        f"its {status.st_size:,} bytes are more than {MAX_FILE_BYTES:,}"
                    )
                return file.read(status.st_size)
        except OSError as error:
            if error.errno == errno.ELOOP and not self._is_link[index]:
                reason = "it has become a link since the folder was listed"
                raise UndecodableError(reason) from error
            raise UndecodableError(f"it cannot be read: {error.strerror}") from error
