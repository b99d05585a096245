"""Tars laid out as ImageNet's, with a handful of images."""

import io
import pathlib
import tarfile

import cv2
import numpy as np
import skimage
import tensorflow_datasets as tfds


def tar(files: dict[str, bytes]) -> bytes:
    """The bytes of a tar of these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def write_tars(
    folder: pathlib.Path, train: dict[str, dict[str, bytes]], validation: list[bytes]
) -> None:
    """Writes ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.

    Args:
      folder: where to; it is made.
      train: file names and contents, by synset.
      validation: contents, in the order of the published labels.
    """
    folder.mkdir(parents=True)
    by_class = {f"{synset}.tar": tar(files) for synset, files in train.items()}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(by_class))
    named = {f"ILSVRC2012_val_{i:08d}.JPEG": image for i, image in enumerate(validation, start=1)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(named))


def write_photos(folder: pathlib.Path, num_train: int, num_validation: int) -> None:
    """Writes tars of 500 x 375 parts of scikit-image's photos, spread over the 1,000 classes."""
    synsets = (tfds.core.tfds_path() / "datasets/imagenet2012/labels.txt").read_text().split()
    photos = [cv2.resize(getattr(skimage.data, n)(), (750, 562)) for n in ("astronaut", "coffee")]
    rng = np.random.default_rng(0)

    def jpeg(i: int) -> bytes:
        top, left = rng.integers(562 - 375), rng.integers(750 - 500)
        part = photos[i % len(photos)][top : top + 375, left : left + 500, ::-1]
        return cv2.imencode(".jpg", part)[1].tobytes()

    train: dict[str, dict[str, bytes]] = {}
    for i in range(num_train):
        synset = synsets[i * len(synsets) // num_train]
        train.setdefault(synset, {})[f"{synset}_{i}.JPEG"] = jpeg(i)
    write_tars(folder, train, [jpeg(i) for i in range(num_validation)])
