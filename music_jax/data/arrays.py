"""The images that a config names, as arrays, to look at."""

from typing import Literal

import numpy as np
from ml_collections import config_dict

from music_jax.data import datasets
from music_jax.data.loader import evaluation_batches


def load_images(
    config: config_dict.ConfigDict,
    split: Literal["train", "test"] = "test",
    *,
    at_most: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Loads images as the evaluation sees them, their central squares.

        images, labels = load_images(music_jax.config.from_file("configs/digits.py"))

    Args:
      config: names the dataset and the size of the images.
      split: those that are trained on, or those that the backbone is tested with.
      at_most: how many, from the first on; by default all.

    Returns:
      uint8 [images, size, size, channels] and int32 labels [images], -1 where there is none.

    Raises:
      UserError: the dataset is not there or cannot be prepared, or names no images to test with.
      UnusableDataError: an image cannot be decoded.
    """
    datasets.prepare(config)
    if split == "test":
        source = datasets.evaluation_sources(config).test
    else:
        source = datasets.training_source(config)
    wanted = min(len(source), at_most or len(source))
    (batch,) = evaluation_batches(
        source.subset(np.arange(wanted)),
        size=config.crop.size,
        resize_shorter_side=config.crop.eval_resize,
        channels=config.dataset.num_channels,
        batch_size=wanted,
        positions=np.arange(wanted),
    )
    return batch["images"], batch["label"]
