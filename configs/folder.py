"""Your own folder of images, labeled by sub-folder or unlabeled: a smaller ImageNet recipe.

Paper: MUSIC, Niu & Wang, arXiv 2206.06461 (which has no experiment on such images).
Expected: not yet measured; it depends on the images.
Hardware and time: not yet measured; intended for one accelerator.
Command: python -m music_jax.main --config=configs/folder.py --config.dataset.path=DIR
  --workdir=runs/mine [--config.evaluation.train=DIR --config.evaluation.test=DIR]
"""

import pathlib

from ml_collections import config_dict

from music_jax.config import from_file


def get_config() -> config_dict.ConfigDict:
    """Returns the config."""
    config = from_file(pathlib.Path(__file__).with_name("imagenet.py"))
    config.batch_size = 256

    config.objective.num_segments = 32
    config.objective.units_per_segment = 32

    config.dataset.name = ""
    config.dataset.max_skipped_share = 0.1

    config.backbone.name = "resnet18"
    config.projector.hidden_sizes = (1024, 1024)

    config.linear_eval.base_learning_rates = (0.02, 0.1, 0.5)
    config.knn.enabled = True
    return config
