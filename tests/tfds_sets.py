"""Small TFDS datasets of scikit-learn's digits, written without TensorFlow."""

import io

import cv2
import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from tensorflow_datasets.core import registered

_BUNCH = load_digits()
IMAGES = np.round(_BUNCH.images * (255 / 16)).astype(np.uint8)
LABELS = _BUNCH.target
CLASSES = tfds.features.ClassLabel(num_classes=10)
GRAY = tfds.features.Image(shape=(None, None, 1), encoding_format="png")


def png(image):
    """The PNG file of an array."""
    return cv2.imencode(".png", image)[1].tobytes()


def _digit(i):
    return io.BytesIO(png(IMAGES[i]))


def write_set(
    directory, name, splits, label=CLASSES, version="1.0.0", config=None, make=_digit, **features
):
    """Prepares a dataset whose records are digits.

    Args:
      directory: the data_dir.
      name: of the dataset.
      splits: by name, the labels of its images, one each: the first digits.
      label: the kind of feature that a label is; None for no labels.
      version: of the dataset.
      config: name of its one config, if it has any.
      make: what the image of a number is in its record.
      **features: in place of those by these names.
    """
    kinds = {"image": GRAY} | ({} if label is None else {"label": label}) | features

    class Base(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

        def _split_generators(self, dl_manager):
            return {split: _examples(labels, kinds, make) for split, labels in splits.items()}

        def _generate_examples(self):
            pass

    with registered.skip_registration():
        builder = type(name, (Base,), {"name": name})(
            data_dir=str(directory), config=config, file_format="array_record"
        )
    builder.download_and_prepare(file_format="array_record")


def _examples(labels, kinds, make):
    for i, label in enumerate(labels):
        record = {"image": make(i), "label": label}
        yield i, {name: value for name, value in record.items() if name in kinds}
