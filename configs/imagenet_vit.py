"""ImageNet with ViT-S/16 and AdamW, otherwise as configs/imagenet.py.

Paper: MUSIC, Niu & Wang, arXiv 2206.06461, which has no vision transformer. The settings of the
  optimizer are those of MoCo v3, Chen et al, arXiv 2104.02057, at 300 epochs.
Expected: not yet measured. For comparison, linear top-1 of MoCo v3's ViT-S/16 at 300 epochs: 73.2.
Hardware and time: not yet measured; intended for 32 TPU v5e chips or more.
Command: python -m music_jax.main --config=configs/imagenet_vit.py --workdir=gs://BUCKET/imagenet_vit
"""

import pathlib

from ml_collections import config_dict

from music_jax.config import from_file


def get_config() -> config_dict.ConfigDict:
    """Returns the config."""
    config = from_file(pathlib.Path(__file__).with_name("imagenet.py"))
    config.batch_size = 4096
    config.num_epochs = 300

    config.backbone.name = "vit_s16"  # or vit_b16
    config.backbone.stem = None  # for ResNets only

    config.optimizer.name = "adamw"
    config.optimizer.base_learning_rate = 1.5e-4
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_epochs = 40
    return config
