"""How the claims are put to the test on each dataset: what every cell shares, and the grids."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from music_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """A dataset's grids.

    Attributes:
      learning_rates: the rates searched for each method, ascending; for other settings of a method
        the search goes on from its best one, by `rate_step` to either side.
      rate_step: ratio of two neighboring rates.
      search_splits: what the search trains on and what it chooses by, both of the training split.
      overrides: of the config's fields, for every cell.
      hidden_size: of the projector's hidden layers.
      depths: numbers of hidden layers, besides the config's.
      embeddings: segments and units of the embeddings' sizes, besides the config's.
      ratios: segments and units of one size.
      batch_sizes: besides the config's.
      temperatures: besides the config's.
      weights: factors of each term's weight.
      augmentations: for claim 7, what changes; `changes` of the config by name.
      units: for claim 7, segments and units, besides the config's.
      full_recipe: for a row of its own, MUSIC by the config as it is, but for these fields; None
        for no such row.
      in_memory: whether the images fit into memory and a cell is so short that, once stopped, it
        starts anew; else each cell is a run of `music_jax.main`, with its checkpoints, and none
        starts from a collapse.
    """

    learning_rates: tuple[float, ...]
    search_splits: tuple[str, str]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rate_step: float = 3.0
    hidden_size: int = 512
    depths: tuple[int, ...] = (0, 1, 2, 3)
    embeddings: tuple[tuple[int, int], ...] = ((8, 8), (32, 32), (64, 64))
    ratios: tuple[tuple[int, int], ...] = ((8, 64), (64, 8))
    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024)
    temperatures: tuple[float, ...] = (0.25, 0.5, 2.0, 4.0)
    weights: tuple[float, ...] = (0.5, 2.0)
    augmentations: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    units: tuple[tuple[int, int], ...] = ()
    full_recipe: Mapping[str, Any] | None = None
    in_memory: bool = False


def _both_views(**fields: Any) -> dict[str, Any]:
    views = ("view_1", "view_2")
    return {f"augmentation.{view}.{field}": v for field, v in fields.items() for view in views}


_SMALL = {
    "backbone.name": "tiny_resnet",
    "num_epochs": 8,
    "optimizer.warmup_epochs": 1,
    "linear_eval.num_epochs": 30,
    "num_decode_threads": 1,
}
_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_DIMENSIONS = ((8, 8), (64, 64))  # an eighth of the configs' own, and eight times it

SETTINGS: dict[str, Settings] = {
    "mnist5k": Settings(
        learning_rates=_RATES,
        search_splits=("train[:80%]", "train[80%:]"),
        overrides=_SMALL | {"num_epochs": 6},
        embeddings=_DIMENSIONS,
        ratios=((8, 64), (32, 16)),
        batch_sizes=(16, 1024),
        full_recipe={"num_epochs": 80},
        in_memory=True,
    ),
    "digits": Settings(
        learning_rates=_RATES,
        search_splits=("train[:80%]", "train[80%:]"),
        overrides=_SMALL | {"num_epochs": 16},
        embeddings=_DIMENSIONS,
        batch_sizes=(16, 512),
        full_recipe={},
        in_memory=True,
    ),
    "shapes": Settings(
        learning_rates=_RATES,
        search_splits=("train[:16%]", "train[16%:20%]"),
        overrides=_SMALL | {"dataset.train_split": "train[:20%]"},
        embeddings=_DIMENSIONS,
        batch_sizes=(16, 1024),
        augmentations={
            "no jitter": _both_views(jitter_probability=0.0, grayscale_probability=0.0),
            "weak jitter": _both_views(
                jitter_probability=0.8,
                brightness=0.4,
                contrast=0.4,
                hue=0.1,
                grayscale_probability=0.2,
            ),
            "no crops": {"crop.scale": (1.0, 1.0), "crop.aspect_ratio": (1.0, 1.0)},
            "rotation": _both_views(affine_probability=1.0, rotation_degrees=180.0),
            "none": {
                "crop.scale": (1.0, 1.0),
                "crop.aspect_ratio": (1.0, 1.0),
                **_both_views(jitter_probability=0.0, grayscale_probability=0.0),
            },
        },
        units=((128, 4), (8, 64)),
        in_memory=True,
    ),
    "cifar10": Settings(
        learning_rates=(0.03, 0.1, 0.3),
        search_splits=("train[:90%]", "train[90%:]"),
        hidden_size=1024,
        embeddings=((8, 8), (16, 16), (64, 64)),
        ratios=((8, 128), (128, 8)),
        batch_sizes=(64, 256, 512, 1024),
    ),
    "imagenette": Settings(
        learning_rates=(0.3, 0.9, 2.7),
        search_splits=("train[:90%]", "train[90%:]"),
        hidden_size=1024,
        ratios=((16, 64), (64, 16)),
        batch_sizes=(64, 256, 1024),
    ),
    "imagenet": Settings(
        learning_rates=(0.2, 0.6, 1.8),
        search_splits=("train[:99%]", "train[99%:]"),
        hidden_size=8192,
        embeddings=((32, 32), (64, 64)),
        ratios=((51, 160), (204, 40)),
        batch_sizes=(256, 1024, 2048),
    ),
}


def settings_of(dataset: str) -> Settings:
    """The settings of a dataset by its TFDS name.

    Raises:
      UserError: there are none; the message says where to add them.
    """
    name = dataset.partition("/")[0].partition(":")[0]
    name = {"imagenet2012": "imagenet"}.get(name, name)
    if name not in SETTINGS:
        raise UserError(
            f"the claims have no settings for the dataset {dataset!r}; they are there for "
            f"{', '.join(SETTINGS)}, and are added in music_jax/claims/settings.py"
        )
    return SETTINGS[name]
