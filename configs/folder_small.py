"""Your own folder of a few hundred to a few thousand images, on CPU cores: views of 64 pixels.

Paper: MUSIC, Niu & Wang, arXiv 2206.06461 (which has no experiment on such images).
Expected: it depends on the images. With 300 drawings of circles, squares and triangles, linear
  top-1 0.79, kNN top-1 0.73, random backbone 0.49 and 0.48 (one seed, 600 test images).
Hardware and time: 2 CPU cores with other work, 1 min 46 s for 300 images.
Command: python -m music_jax.main --config=configs/folder_small.py --config.dataset.path=DIR
  --workdir=runs/mine [--config.evaluation.train=DIR --config.evaluation.test=DIR]
"""

import pathlib

from ml_collections import config_dict

from music_jax.config import from_file


def get_config() -> config_dict.ConfigDict:
    """Returns the config."""
    config = from_file(pathlib.Path(__file__).with_name("folder.py"))
    config.batch_size = 64
    config.log_every_steps = 10
    config.tensorboard = False  # metrics.jsonl suffices for a run of minutes

    config.objective.num_segments = 64
    config.objective.units_per_segment = 8

    config.crop.size = 64
    config.crop.eval_resize = 73
    config.crop.scale = (0.3, 1.0)

    config.backbone.name = "small_resnet"
    config.backbone.stem = "strided"
    config.backbone.zero_init_residual = False
    config.projector.hidden_sizes = (512,)

    config.optimizer.name = "adamw"
    config.optimizer.base_learning_rate = 2e-2
    config.optimizer.weight_decay = 3e-2

    config.linear_eval.num_epochs = 40
    config.linear_eval.base_learning_rates = (3e-2, 6e-2, 1e-1)
    config.linear_eval.weight_decay = 3e-2
    config.linear_eval.random_crops = False
    config.linear_eval.feature_scaling = "whiten"
    config.linear_eval.random_init = True
    return config
