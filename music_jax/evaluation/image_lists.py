"""Which images of a source a list names."""

import os

import numpy as np

from music_jax.data.sources import Source
from music_jax.errors import UndecodableError, UserError


def rows_of_list(source: Source, path: str) -> np.ndarray:
    """The images whose names a file lists, one a line, such as SimCLR's subsets of ImageNet.

    An image is called by the last part of its path in a folder, or by its record's `file_name` in
    a TFDS dataset that has one (as `imagenet2012` does).

    Args:
      source: the images.
      path: of the list.

    Returns:
      Their indices in the source, ascending.

    Raises:
      UserError: the list cannot be read, is empty, or names an image that is not there.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            wanted = {os.path.basename(line.strip()) for line in file if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list of images {path!r}: {error}") from error
    if not wanted:
        raise UserError(f"the list of images {path!r} is empty")
    rows, found = [], set()
    for index in range(len(source)):
        name = _file_name(source, index)
        if name in wanted:
            rows.append(index)
            found.add(name)
    missing = sorted(wanted - found)
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(wanted)} images that {path!r} lists are not in "
            f"{source.name}, such as {missing[0]!r}; its first image is called "
            f"{_file_name(source, 0)!r}"
        )
    return np.asarray(rows)


def _file_name(source: Source, index: int) -> str:
    name = os.path.basename(source.record_name(index))
    if not name.isdigit():
        return name
    try:
        file_name = source.records[index].get("file_name", name)
    except UndecodableError:
        return name
    return os.path.basename(file_name.decode() if isinstance(file_name, bytes) else str(file_name))
