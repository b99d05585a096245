"""Prepares TFDS's datasets in the format of MNIST from files on this machine, without a network."""

import gzip
import io
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

_NAMES = ("mnist", "fashion_mnist", "kmnist")
_FILES = {  # images and labels of each split, as their authors name them
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_UNSIGNED_BYTES = b"\x00\x00\x08"


def idx_builder(builder: Any, directory: str) -> Any | None:
    """Returns a builder of the same dataset that reads its four IDX files from a directory.

    Its files are those that TFDS itself would write, except for the encoding of the images, so that
    either builder reads them.

    Args:
      builder: Builder of TFDS.
      directory: Directory of the files, such as that of Debian's package `dataset-fashion-mnist`.

    Returns:
      The builder; None if the dataset has no such files, or the directory lacks one of them.
    """
    paths = [pathlib.Path(directory) / name for names in _FILES.values() for name in names]
    if builder.name not in _NAMES or not all(path.is_file() for path in paths):
        return None

    class IdxBuilder(type(builder), skip_registration=True):  # type: ignore[misc,call-arg]
        name = builder.name

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(*names) for split, names in _FILES.items()}

        def _generate_examples(
            self, images_name: str, labels_name: str
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            images, labels = (
                read_idx(pathlib.Path(directory) / name) for name in (images_name, labels_name)
            )
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                _, png = cv2.imencode(".png", image)
                yield index, {"image": io.BytesIO(png.tobytes()), "label": int(label)}

    return IdxBuilder(data_dir=builder.data_dir_root, file_format="array_record")


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads a compressed IDX file of unsigned bytes.

    Raises:
      ValueError: The file has another format, or its size does not match its header.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    if data[:3] != _UNSIGNED_BYTES:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    sizes_end = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:sizes_end], ">u4").astype(np.int64)
    values = np.frombuffer(data[sizes_end:], np.uint8)
    if len(values) != np.prod(shape):
        raise ValueError(f"{path} has {len(values)} values; its header says {shape.tolist()}")
    return values.reshape(shape)
