"""Imagenette, ten classes of ImageNet: the ImageNet recipe reduced for one accelerator.

Paper: MUSIC, Niu & Wang, arXiv 2206.06461 (which has no experiment on this dataset).
Expected: not yet measured.
Hardware and time: not yet measured.
Command: python -m music_jax.main --config=configs/imagenette.py --workdir=runs/imagenette
"""

import pathlib

from ml_collections import config_dict

from music_jax.config import from_file


def get_config() -> config_dict.ConfigDict:
    """Returns the config."""
    config = from_file(pathlib.Path(__file__).with_name("imagenet.py"))
    config.batch_size = 256
    config.num_epochs = 400

    config.objective.num_segments = 32
    config.objective.units_per_segment = 32

    config.dataset.name = "imagenette/320px-v2"
    config.crop.size = 128
    config.crop.scale = (0.2, 1.0)
    config.crop.eval_resize = 146

    config.backbone.name = "resnet18"
    config.projector.hidden_sizes = (1024, 1024)

    config.linear_eval.base_learning_rates = (0.02, 0.1, 0.5)
    config.linear_eval.random_init = True
    config.knn.enabled = True
    return config
