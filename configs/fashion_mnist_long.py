"""Fashion-MNIST, trained for 100 epochs.

Paper: MUSIC, Niu & Wang, arXiv 2206.06461 (which has no experiment on this dataset).
Expected: linear top-1 0.905, kNN top-1 0.890 (seed 0); a random backbone 0.856.
Hardware and time: 2 CPU cores, 40 min with other work.
Command: launch/local.sh --config=configs/fashion_mnist_long.py --workdir=runs/fashion_mnist

The images are those of Debian's package dataset-fashion-mnist if it is installed
(`apt-get install dataset-fashion-mnist`); otherwise TFDS downloads them.
"""

from ml_collections import config_dict

from music_jax.config import default_config, set_views


def get_config() -> config_dict.ConfigDict:
    """Returns the config."""
    config = default_config()
    config.batch_size = 256
    config.num_epochs = 100
    config.log_every_steps = 117
    config.tensorboard = False  # metrics.jsonl suffices for a run of an hour

    config.objective.num_segments = 32
    config.objective.units_per_segment = 16
    config.objective.temperature = 0.5

    config.dataset.name = "fashion_mnist"
    config.dataset.manual_dir = "/usr/share/datasets/fashion-mnist"
    config.dataset.num_channels = 1
    config.dataset.mean = (0.2860,)
    config.dataset.std = (0.3530,)
    config.crop.size = 28
    config.crop.eval_resize = 28
    config.crop.scale = (0.3, 1.0)
    set_views(
        config,
        flip_probability=0.5,
        jitter_probability=0.8,
        brightness=0.4,
        contrast=0.4,
    )

    config.backbone.name = "small_resnet"
    config.backbone.stem = "strided"
    config.backbone.zero_init_residual = False
    config.projector.hidden_sizes = (512,)

    config.optimizer.name = "adamw"
    config.optimizer.base_learning_rate = 1e-2
    config.optimizer.weight_decay = 3e-2
    config.optimizer.warmup_epochs = 1

    config.checkpoint.every_steps = 1170

    config.linear_eval.num_epochs = 30
    config.linear_eval.base_learning_rates = (3e-3, 1e-2, 3e-2, 1e-1)
    config.linear_eval.weight_decay = 1e-3
    config.linear_eval.random_crops = False
    config.linear_eval.feature_scaling = "standardize"
    config.linear_eval.raw_pixels = True
    config.linear_eval.random_init = True
    return config
