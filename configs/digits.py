"""1,797 digits of 8 x 8 pixels from scikit-learn: the smallest recipe.

Paper: MUSIC, Niu & Wang, arXiv 2206.06461 (which has no experiment on this dataset).
Expected: linear top-1 0.993, kNN top-1 0.985 (means over seeds 0, 1 and 2).
Hardware and time: 2 CPU cores, 19 to 28 s.
Command: launch/local.sh --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import config_dict

from music_jax.config import default_config, set_views


def get_config() -> config_dict.ConfigDict:
    """Returns the config."""
    config = default_config()
    config.batch_size = 128
    config.num_epochs = 28
    config.log_every_steps = 11
    config.tensorboard = False  # metrics.jsonl suffices for a run of a minute

    config.objective.num_segments = 32
    config.objective.units_per_segment = 16

    config.dataset.name = "digits"
    config.dataset.num_channels = 1
    config.dataset.mean = (0.3053,)
    config.dataset.std = (0.3761,)
    config.crop.size = 8
    config.crop.eval_resize = 8
    config.crop.scale = (1.0, 1.0)
    config.crop.aspect_ratio = (1.0, 1.0)
    set_views(
        config,
        affine_probability=1.0,
        rotation_degrees=15.0,
        translation=0.1,
        scale=(0.85, 1.15),
        shear_degrees=10.0,
        noise_probability=1.0,
        noise_std=0.1,
    )

    config.backbone.name = "small_resnet"
    config.backbone.stem = "cifar"
    config.backbone.zero_init_residual = False
    config.projector.hidden_sizes = ()

    config.optimizer.name = "adamw"
    config.optimizer.base_learning_rate = 6e-3
    config.optimizer.weight_decay = 3e-2
    config.optimizer.warmup_epochs = 6

    config.checkpoint.every_steps = 66

    config.linear_eval.num_epochs = 30
    config.linear_eval.base_learning_rates = (1e-2, 3e-2, 1e-1)
    config.linear_eval.weight_decay = 3e-2
    config.linear_eval.random_crops = False
    config.linear_eval.feature_scaling = "standardize"
    config.linear_eval.raw_pixels = True
    config.linear_eval.random_init = True
    return config
