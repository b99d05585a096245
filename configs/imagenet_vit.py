"""ImageNet with a vision transformer: ViT-S/16 trained by AdamW, else as configs/imagenet.py.

Paper: the objective is MUSIC's, Niu & Wang, arXiv 2206.06461, which has no vision transformer. The
  optimizer's settings are those of MoCo v3, Chen et al, arXiv 2104.02057, at 300 epochs.
Expected: not yet measured. Beside it, MoCo v3's ViT-S/16 at 300 epochs: 73.2 linear top-1.
Hardware and time: not yet measured; meant for 32 TPU v5e chips or more.
Command: python -m music_jax.main --config=configs/imagenet_vit.py --workdir=gs://BUCKET/imagenet_vit
"""

from ml_collections import config_dict

from music_jax.config import from_file


def get_config() -> config_dict.ConfigDict:
    """The config."""
    config = from_file("imagenet")
    config.batch_size = 4096
    config.num_epochs = 300

    config.backbone.name = "vit_s16"  # or vit_b16
    config.backbone.stem = None  # a ResNet's

    config.optimizer.name = "adamw"
    config.optimizer.base_learning_rate = 1.5e-4
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_epochs = 40
    return config
