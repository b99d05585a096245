"""CIFAR-10 with the recipe of the paper: ResNet-18 with a 3 x 3 stem, 800 epochs.

Paper: MUSIC, Niu & Wang, arXiv 2206.06461.
Expected: not yet measured. For comparison, linear top-1 of ResNet-18 at 1,000 epochs (solo-learn):
  Barlow Twins 92.1, VICReg 92.1, BYOL 92.6.
Hardware and time: not yet measured.
Command: python -m music_jax.main --config=configs/cifar10.py --workdir=runs/cifar10
"""

from ml_collections import config_dict

from music_jax.config import default_config, set_views


def get_config() -> config_dict.ConfigDict:
    """Returns the config."""
    config = default_config()
    config.batch_size = 512
    config.num_epochs = 800
    config.compute_dtype = "bfloat16"

    config.objective.num_segments = 32
    config.objective.units_per_segment = 32

    config.dataset.name = "cifar10"
    config.dataset.mean = (0.4914, 0.4822, 0.4465)
    config.dataset.std = (0.2470, 0.2435, 0.2616)
    config.crop.size = 32
    config.crop.scale = (0.2, 1.0)
    config.crop.eval_resize = 32
    set_views(
        config,
        flip_probability=0.5,
        jitter_probability=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        grayscale_probability=0.2,
    )

    config.backbone.name = "resnet18"
    config.backbone.stem = "cifar"
    config.backbone.zero_init_residual = False
    config.projector.hidden_sizes = (1024, 1024)

    config.optimizer.name = "sgd"
    config.optimizer.base_learning_rate = 0.1
    config.optimizer.weight_decay = 5e-4

    config.linear_eval.base_learning_rates = (30.0,)
    config.linear_eval.weight_decay = 0.0
    config.linear_eval.drop_epochs = (60, 80)
    config.linear_eval.random_init = True
    return config
