"""A folder of image files as a source, in an order that does not depend on the file system."""

import os
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
    are passed over. Links are followed as long as they stay inside the folder. The class of an
    image is the first sub-folder on its path; the source has labels if every image has a class.

    Args:
      path: the folder.

    Returns:
      The images in the order of their relative paths, of which one is `record_name(index)`.

    Raises:
      UserError: there is no such folder, it cannot be listed, or it holds no image.
    """
    root = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {path!r}")
    started = time.monotonic()
    listing = _Listing(root)
    try:
        listing.walk()
    except OSError as error:
        raise UserError(f"cannot list the folder {path!r}: {error}") from error
    names = sorted(listing.names)
    if not names:
        outside = f", but {len(listing.outside)} links that lead out of it"
        raise UserError(
            f"the folder {path!r} holds no image ({', '.join(EXTENSIONS)})"
            + (outside if listing.outside else "")
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
        left_out=tuple((name, "a link out of the folder") for name in sorted(listing.outside)),
    )


class _Listing:
    """The relative paths, with `/`, of the images below a folder."""

    def __init__(self, root: str):
        self.names: list[str] = []
        self.outside: list[str] = []
        self._root = root
        self._real_root = os.path.realpath(root)
        self._said = time.monotonic()

    def walk(self) -> None:
        # Each folder comes with the real folders that lead to it, so that no link runs in a circle.
        waiting = [("", self._real_root, frozenset([self._real_root]))]
        while waiting:
            prefix, real, above = waiting.pop()
            for entry, target in self._entries(prefix, real):
                name = prefix + entry.name
                if entry.is_dir():
                    if target not in above:
                        waiting.append((name + "/", target, above | {target}))
                elif entry.is_file() and name.lower().endswith(EXTENSIONS):
                    self.names.append(name)
            self._say_now_and_then()

    def _entries(self, prefix: str, real: str) -> Iterator[tuple[os.DirEntry, str]]:
        """What is in a folder, each with its real path, without what is hidden or leads out."""
        with os.scandir(real) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                target = f"{real}/{entry.name}"
                if entry.is_symlink():
                    target = os.path.realpath(target)
                    if os.path.commonpath([self._real_root, target]) != self._real_root:
                        self.outside.append(prefix + entry.name)
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
        self._root, self._names, self._labels = root, names, labels

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._read(self._names[index]), "label": self._labels[index]}

    def record_name(self, index: int) -> str:
        return self._names[index]

    def _read(self, name: str) -> bytes:
        try:
            # Without waiting: the file could have become a pipe since it was listed.
            descriptor = os.open(f"{self._root}/{name}", os.O_RDONLY | os.O_NONBLOCK)
            try:
                size = os.fstat(descriptor).st_size
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
