"""Which images of a source a list names."""

import logging
import os

import numpy as np

from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.errors import UndecodableError, UserError
from music_jax.workdir.files import decode_text

_logger = logging.getLogger(__name__)


def rows_of_list(source: Source, path: str) -> np.ndarray:
    """The images whose names a file lists, one a line, such as SimCLR's subsets of ImageNet.

    An image is called by the last part of its path in a folder, or by its record's `file_name` in
    a TFDS dataset that has one (as `imagenet2012` does). Images of the list may be missing where
    records cannot be read, since they may be these.

    Args:
      source: the images.
      path: of the list.

    Returns:
      Their indices in the source, ascending.

    Raises:
      UserError: the list cannot be read, is empty, or names an image that is not there.
    """
    try:
        with open(os.path.expanduser(path), "rb") as file:
            lines = decode_text(file.read()).replace("\r", "\n").split("\n")
        wanted = {os.path.basename(line.strip()) for line in lines if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list of images {path!r}: {error}") from error
    if not wanted:
        raise UserError(f"the list of images {path!r} is empty")
    rows, found, unreadable = [], set(), 0
    with progress.bar(len(source), unit="img", description="images on the list") as bar:
        for index in range(len(source)):
            try:
                name = _file_name(source, index)
            except UndecodableError:
                name, unreadable = "", unreadable + 1
            if name in wanted:
                rows.append(index)
                found.add(name)
            bar.update()
    missing = sorted(wanted - found)
    if missing and rows and len(missing) <= unreadable:
        _logger.info(
            f"{len(missing)} images that {path!r} lists are left out: {unreadable} records of "
            f"{source.name} cannot be read"
        )
    elif missing:
        raise UserError(
            f"{len(missing)} of the {len(wanted)} images that {path!r} lists are not in "
            f"{source.name}, such as {missing[0]!r}; its images are called as in "
            f"{source.record_name(0)!r}, or as the file_name of their records says"
        )
    return np.asarray(rows)


def _file_name(source: Source, index: int) -> str:
    name = os.path.basename(source.record_name(index))
    if not name.isdigit():
        return name
    file_name = source.record(index).get("file_name", name)
    return os.path.basename(file_name.decode() if isinstance(file_name, bytes) else str(file_name))
