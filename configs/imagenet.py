"""ImageNet with the recipe of the paper: ResNet-50, 102 segments of 80 units, LARS, 100 epochs.

Paper: MUSIC, Niu & Wang, arXiv 2206.06461.
Expected: not yet measured. For comparison, linear top-1 of ResNet-50 at 100 epochs: Barlow Twins
  67.2 (solo-learn), CorInfoMax 69.1, SimSiam 68.1; at 1,000 epochs Barlow Twins 73.5, VICReg 73.2.
Hardware and time: not yet measured; intended for 32 TPU v5e chips or more.
Command: python -m music_jax.main --config=configs/imagenet.py --workdir=gs://BUCKET/imagenet
"""

from ml_collections import config_dict

from music_jax.config import default_config, set_views


def get_config() -> config_dict.ConfigDict:
    """Returns the config."""
    config = default_config()
    config.batch_size = 2048
    config.num_epochs = 100
    config.compute_dtype = "bfloat16"

    config.objective.num_segments = 102
    config.objective.units_per_segment = 80

    config.dataset.name = "imagenet2012"
    config.dataset.test_split = "validation"
    config.crop.size = 224
    config.crop.scale = (0.08, 1.0)
    config.crop.eval_resize = 256
    set_views(
        config,
        flip_probability=0.5,
        jitter_probability=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        grayscale_probability=0.2,
        blur_sigma=(0.1, 2.0),
    )
    config.augmentation.view_1.blur_probability = 1.0
    config.augmentation.view_2.blur_probability = 0.1
    config.augmentation.view_2.solarize_probability = 0.2
    config.augmentation.local.blur_probability = 0.5  # as DINO

    config.backbone.name = "resnet50"
    config.backbone.stem = "imagenet"
    config.projector.hidden_sizes = (8192,)

    config.optimizer.name = "lars"
    config.optimizer.base_learning_rate = 0.6
    config.optimizer.weight_decay = 1e-6
    config.optimizer.warmup_epochs = 10

    config.linear_eval.base_learning_rates = (0.02,)  # 0.3 for Barlow Twins
    config.linear_eval.weight_decay = 1e-6
    config.knn.enabled = False  # the features of 1.28 million images take 10 GB
    return config
