"""Fashion-MNIST, for comparisons of objectives with `python -m music_jax.claims`.

Paper: MUSIC, Niu & Wang, arXiv 2206.06461 (which has no experiment on this dataset).
Expected: RESULTS.md has the short comparison, of `--budget=small`; docs/comparison.md the plan.
Hardware and time: CPU cores; about 1,900 images a second on each.
Command: python -m music_jax.claims --config=configs/fashion_mnist.py --budget=small

The images are those of Debian's package dataset-fashion-mnist if it is installed
(`apt-get install dataset-fashion-mnist`); otherwise TFDS downloads them, which needs TensorFlow.
"""

from ml_collections import config_dict

from music_jax.config import default_config, set_views


def get_config() -> config_dict.ConfigDict:
    """Returns the config."""
    config = default_config()
    config.batch_size = 256
    config.num_epochs = 20
    config.log_every_steps = 195
    config.tensorboard = False  # metrics.jsonl suffices for a run of minutes
    config.num_decode_threads = 1

    config.objective.num_segments = 32
    config.objective.units_per_segment = 16

    config.dataset.name = "fashion_mnist"
    config.dataset.manual_dir = "/usr/share/datasets/fashion-mnist"
    config.dataset.train_split = "train[:50000]"  # the others are for validation
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

    config.backbone.name = "pooled_resnet"
    config.backbone.stem = "strided"
    config.backbone.zero_init_residual = False
    config.projector.hidden_sizes = (512,)

    config.optimizer.name = "adamw"
    config.optimizer.base_learning_rate = 1e-2
    config.optimizer.weight_decay = 3e-2
    config.optimizer.warmup_epochs = 1

    config.checkpoint.every_steps = 3000

    config.linear_eval.num_epochs = 30
    config.linear_eval.base_learning_rates = (1e-2, 3e-2)
    config.linear_eval.random_crops = False
    config.linear_eval.feature_scaling = "standardize"
    return config
