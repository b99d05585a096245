"""CIFAR-100 with the recipe of the paper for CIFAR-10.

Paper: MUSIC, Niu & Wang, arXiv 2206.06461.
Expected: not yet measured.
Hardware and time: not yet measured.
Command: python -m music_jax.main --config=configs/cifar100.py --workdir=runs/cifar100
"""

import pathlib

from ml_collections import config_dict

from music_jax.config import from_file


def get_config() -> config_dict.ConfigDict:
    """Returns the config."""
    config = from_file(pathlib.Path(__file__).with_name("cifar10.py"))
    config.dataset.name = "cifar100"
    config.dataset.mean = (0.5071, 0.4865, 0.4409)
    config.dataset.std = (0.2673, 0.2564, 0.2762)
    return config
