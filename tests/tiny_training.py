"""A training of a few steps on real digits, small enough for a test that is not slow."""

import cv2
import numpy as np
from sklearn.datasets import load_digits

from music_jax.config import default_config


def write_digits(folder, first, count):
    """Writes some of scikit-learn's digits as PNG into one folder a class."""
    digits = load_digits()
    for i in range(first, first + count):
        path = folder / str(digits.target[i]) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.round(digits.images[i] * (255 / 16)).astype(np.uint8))


def tiny_config(folder):
    """A config of 6 steps, 3 an epoch, on 100 digits that are written below a folder."""
    for name, first, count in (("train", 0, 100), ("test", 100, 60)):
        if not (folder / name).exists():
            write_digits(folder / name, first, count)
    config = default_config()
    config.dataset.path = str(folder / "train")
    config.evaluation.train, config.evaluation.test = str(folder / "train"), str(folder / "test")
    config.dataset.update({"num_channels": 1, "mean": (0.3,), "std": (0.4,)})
    config.batch_size, config.num_epochs, config.optimizer.warmup_epochs = 32, 2, 1
    config.log_every_steps, config.checkpoint.every_steps = 1, 2
    config.crop.update({"size": 8, "eval_resize": 8, "scale": (0.5, 1.0)})
    config.backbone.update({"name": "tiny_resnet", "stem": "cifar", "zero_init_residual": False})
    config.projector.hidden_sizes = ()
    config.objective.update({"num_segments": 4, "units_per_segment": 4})
    config.guards.update({"warmup_steps": 2, "loss_spike_window": 1})
    config.linear_eval.update({"num_epochs": 5, "base_learning_rates": (0.1,)})
    config.linear_eval.update({"random_crops": False, "raw_pixels": False, "random_init": False})
    config.tensorboard = False
    return config
