"""A folder of image files as a source, in an order that does not depend on the file system."""

import os
import stat
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from music_jax import progress
from music_jax.data.sources import Source
from music_jax.errors import UndecodableError, UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")

MAX_FILE_BYTES = 2**29  # a larger file is not read: headers.MAX_PIXELS decoded are 2**28.6 bytes
_SECONDS_BETWEEN_LINES = 5.0


def open_folder(path: str) -> Source:
    """Lists the images of a folder and of all folders in it; reads none of them.

    A file is an image by its name (`EXTENSIONS`, in upper or lower case). Hidden files and folders
    are passed over. Links are followed as long as they stay inside the folder; of several to the
    same folder the first by name, and none to folders below one, so that there are never many more
    images than files. The class of an image is the first sub-folder on its path; the source has
    labels if every image has a class.

    Args:
      path: the folder.

    Returns:
      The images in the order of their relative paths, of which one is `record_name(index)`.

    Raises:
      UserError: there is no such folder, it cannot be listed, or it holds no image.
    """
    root = os.path.abspath(os.path.expanduser(path))
    if "\0" in root or not os.path.isdir(root):
        raise UserError(f"there is no folder {path!r}")
    started = time.monotonic()
    listing = _Listing(root)
    try:
        listing.walk()
    except OSError as error:
        raise UserError(f"cannot list the folder {path!r}: {error}") from error
    names = sorted(listing.names)
    if not names:
        links = f", but {len(listing.left_out)} links that are not followed"
        raise UserError(
            f"the folder {path!r} holds no image ({', '.join(EXTENSIONS)})"
            + (links if listing.left_out else "")
        )
    classes = [name.partition("/")[0] if "/" in name else None for name in names]
    class_names = () if None in classes else tuple(sorted({c for c in classes if c is not None}))
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = np.asarray([numbers.get(c, -1) if c else -1 for c in classes], np.int32)
    progress.say(
        f"{path}: {len(names):,} images, "
        + (f"{len(class_names):,} classes" if class_names else "no labels")
        + f", listed in {time.monotonic() - started:.1f} s"
    )
    return Source(
        name=path,
        records=_Files(root, names, labels),
        image_key="image",
        label_key="label",
        num_classes=len(class_names),
        class_names=class_names,
        left_out=tuple(sorted(listing.left_out.items())),
    )


class _Listing:
    """The relative paths, with `/`, of the images below a folder."""

    def __init__(self, root: str):
        self.names: list[str] = []
        self.left_out: dict[str, str] = {}
        self._root = root
        self._real_root = os.path.realpath(root)
        self._said = time.monotonic()

    def walk(self) -> None:
        followed: set[str] = set()
        for name, target in sorted(self._walk_below("", self._real_root)):
            if target in followed:
                self.left_out[name] = "a second link to the same folder"
                continue
            followed.add(target)
            for link, _ in self._walk_below(name + "/", target):
                self.left_out[link] = "a link to a folder below such a link"

    def _walk_below(self, prefix: str, real: str) -> list[tuple[str, str]]:
        """Lists what is below a folder; gives the links to folders, with their real paths."""
        links, waiting = [], [(prefix, real)]
        while waiting:
            prefix, real = waiting.pop()
            for entry, target in self._entries(prefix, real):
                name = prefix + entry.name
                if entry.is_dir():
                    if not entry.is_symlink():
                        waiting.append((name + "/", target))
                    elif not f"{real}/".startswith(f"{target}/"):  # else it runs in a circle
                        links.append((name, target))
                elif entry.is_file() and name.lower().endswith(EXTENSIONS):
                    self.names.append(name)
            self._say_now_and_then()
        return links

    def _entries(self, prefix: str, real: str) -> Iterator[tuple[os.DirEntry, str]]:
        """What is in a folder, each with its real path, without what is hidden or leads out."""
        with os.scandir(real) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                target = f"{real}/{entry.name}"
                if entry.is_symlink():
                    try:
                        os.stat(target)
                    except FileNotFoundError:
                        continue
                    except OSError as error:  # such as a link to itself
                        self.left_out[prefix + entry.name] = f"a link: {error.strerror}"
                        continue
                    target = os.path.realpath(target)
                    if os.path.commonpath([self._real_root, target]) != self._real_root:
                        self.left_out[prefix + entry.name] = "a link out of the folder"
                        continue
                yield entry, target

    def _say_now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._said > _SECONDS_BETWEEN_LINES:
            self._said = now
            progress.say(f"listing {self._root}: {len(self.names):,} images so far")


class _Files:
    """Reads one file at a time, when it is asked for."""

    def __init__(self, root: str, names: list[str], labels: np.ndarray):
        self._root, self._names, self.labels = root, names, labels

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._read(self._names[index]), "label": self.labels[index]}

    def record_name(self, index: int) -> str:
        return self._names[index]

    def _read(self, name: str) -> bytes:
        try:
            # Without waiting: the file could have become a pipe since it was listed.
            descriptor = os.open(f"{self._root}/{name}", os.O_RDONLY | os.O_NONBLOCK)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise UndecodableError("it is no longer a file, but a pipe, device or folder")
                size = status.st_size
                if size > MAX_FILE_BYTES:
                    raise UndecodableError(f"its {size:,} bytes are more than {MAX_FILE_BYTES:,}")
                content = os.read(descriptor, size)
                while len(content) < size and (more := os.read(descriptor, size - len(content))):
                    content += more
                return content
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UndecodableError(f"it cannot be read: {error.strerror}") from error
