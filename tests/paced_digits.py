"""A config of 60 steps on scikit-learn's digits, which are slow to read while a file exists.

The file is `config.dataset.options.slow_while`. Each process prints the number of its cores.
"""

import os
import threading
import time

import numpy as np
from flax import nnx
from sklearn.datasets import load_digits

import music_jax
from music_jax.config import default_config
from music_jax.distributed import usable_cores

_SECONDS_PER_IMAGE = 0.05  # 0.8 s per step of two processes
_reading = threading.Lock()


class _Pixels(nnx.Module):
    """A linear map, which compiles quickly."""

    def __init__(self, *, channels, dtype, rngs):
        self.num_features = 32
        self.linear = nnx.Linear(64 * channels, 32, dtype=dtype, rngs=rngs)

    def __call__(self, images, *, train, num_views):
        return self.linear(images.reshape(len(images), -1))


class _Digits:
    def __init__(self, first, count, slow_while):
        digits = load_digits()
        self.labels = digits.target[first : first + count]
        self._images = np.round(digits.images[first : first + count] * (255 / 16)).astype(np.uint8)
        self._slow_while = slow_while

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if os.path.exists(self._slow_while):
            with _reading:
                time.sleep(_SECONDS_PER_IMAGE)
        return {"image": self._images[index][:, :, None], "label": int(self.labels[index])}


def _open(split, *, slow_while=""):
    return _Digits(*{"train": (0, 480), "test": (480, 160)}[split], slow_while)


def get_config():
    """Returns the config, after registering its backbone and its dataset."""
    music_jax.register_backbone("pixels", _Pixels)
    music_jax.register_dataset("paced_digits", _open)
    print("cores:", usable_cores(), flush=True)
    config = default_config()
    config.dataset.name = "paced_digits"
    config.dataset.update({"num_channels": 1, "mean": (0.3,), "std": (0.4,)})
    config.batch_size, config.num_epochs, config.optimizer.warmup_epochs = 32, 4, 1
    config.log_every_steps, config.checkpoint.every_steps = 1, 4
    config.crop.update({"size": 8, "eval_resize": 8, "scale": (0.5, 1.0)})
    config.backbone.name = "pixels"
    config.projector.hidden_sizes = ()
    config.objective.update({"num_segments": 4, "units_per_segment": 4})
    config.linear_eval.update({"num_epochs": 2, "base_learning_rates": (0.1,)})
    config.linear_eval.update({"random_crops": False, "raw_pixels": False, "random_init": False})
    config.tensorboard = False
    return config
