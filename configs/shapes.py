"""Drawings with known factors, with which the content of each segment can be measured.

Paper: MUSIC, Niu & Wang, arXiv 2206.06461 (which has no experiment on this dataset).
Expected: for the shape, linear top-1 0.790, 0.796, 0.800, kNN top-1 0.855, 0.855, 0.871 (seeds 0,
1, 2); raw pixels 0.141 and 0.360, a random backbone 0.244 and 0.323.
Hardware and time: one H100 and 2 CPU cores, 157 s with six other runs on the same GPU.
Command: python -m music_jax.main --config=configs/shapes.py --workdir=runs/shapes

The label is the shape; --config.dataset.label_key=hue selects another factor. For larger images:
--config.dataset.name=shapes/64 --config.crop.size=64 --config.crop.eval_resize=64
"""

from ml_collections import config_dict

from music_jax.config import default_config, set_views


def get_config() -> config_dict.ConfigDict:
    """Returns the config."""
    config = default_config()
    config.batch_size = 128
    config.num_epochs = 40
    config.log_every_steps = 31
    config.tensorboard = False  # metrics.jsonl suffices for a run of a few minutes

    config.objective.num_segments = 32
    config.objective.units_per_segment = 16

    config.dataset.name = "shapes"
    config.dataset.mean = (0.3377, 0.3437, 0.3478)
    config.dataset.std = (0.1927, 0.1951, 0.1940)
    config.crop.size = 32
    config.crop.eval_resize = 32
    config.crop.scale = (0.5, 1.0)
    set_views(
        config,
        jitter_probability=1.0,
        brightness=0.6,
        contrast=0.6,
        saturation=0.4,
        hue=0.5,  # all hues: with a weak jitter of 0.1, colors are learned instead of shapes
        grayscale_probability=0.5,
    )

    config.backbone.name = "small_resnet"
    config.backbone.stem = "strided"
    config.backbone.zero_init_residual = False
    config.projector.hidden_sizes = ()

    config.optimizer.name = "adamw"
    config.optimizer.base_learning_rate = 2e-2
    config.optimizer.weight_decay = 3e-2
    config.optimizer.warmup_epochs = 4

    config.checkpoint.every_steps = 500

    config.linear_eval.num_epochs = 50
    config.linear_eval.base_learning_rates = (3e-3, 1e-2, 3e-2)
    config.linear_eval.weight_decay = 3e-2
    config.linear_eval.random_crops = False
    config.linear_eval.feature_scaling = "standardize"
    config.linear_eval.raw_pixels = True
    config.linear_eval.random_init = True
    return config
