"""Grids of each dataset, and settings of each claim, that a sweep trains."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from music_jax.errors import UserError

METHODS = ("music", "barlow_twins", "vicreg", "simclr")
_COMPARED = METHODS[:3]  # in the claims about depth, dimension and batch size
_TERMS = ("diagonal", "cross_segment", "invariance")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A dataset's grids. The config's own value is always tried as well.

    Attributes:
      learning_rates: Rates to search for each method, ascending. Other settings of a method search
        around its best rate.
      search_splits: Parts of the training split that a search trains on and validates with.
      overrides: Config fields of every cell.
      rate_step: Ratio of neighboring rates in a search around another one.
      hidden_size: Size of the projector's hidden layers.
      depths: Numbers of hidden layers.
      embeddings: Segments and units of embeddings of several sizes.
      ratios: Segments and units of embeddings of one size.
      batch_sizes: Batch sizes.
      temperatures: Factors of the temperature.
      weights: Factors of each term's weight.
      augmentations: Changes of the config for claim 7, by name.
      units: Segments and units for claim 7.
      full_recipe: Config fields of a further row, MUSIC with the otherwise unchanged config; None
        for no such row.
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
    ),
    "digits": Settings(
        learning_rates=_RATES,
        search_splits=("train[:80%]", "train[80%:]"),
        overrides=_SMALL | {"num_epochs": 16},
        embeddings=_DIMENSIONS,
        batch_sizes=(16, 512),
        full_recipe={},
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
    """Returns the settings of a dataset by its TFDS name.

    Raises:
      UserError: There are none; the message names the file to add them to.
    """
    name = dataset.partition("/")[0].partition(":")[0]
    name = {"imagenet2012": "imagenet"}.get(name, name)
    if name not in SETTINGS:
        raise UserError(
            f"the claims have no settings for the dataset {dataset!r}; they have some for "
            f"{', '.join(SETTINGS)}; add yours in music_jax/claims/grid.py"
        )
    return SETTINGS[name]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A training without its seed and its learning rate.

    Attributes:
      name: Name of its directory.
      method: Objective.
      changes: Values of the changed config fields, by name.
      searches: Whether its learning rate is searched; otherwise it is the method's.
      as_configured: Whether to omit the sweep's overrides and the search.
      collapsed_start: Whether to train for invariance alone first.
    """

    name: str
    method: str
    changes: tuple[tuple[str, Any], ...] = ()
    searches: bool = True
    as_configured: bool = False
    collapsed_start: bool = False


@dataclasses.dataclass(frozen=True)
class Point:
    """A row of a claim's table: a setting, its line in the plot, and its position on that line."""

    series: str
    x: Any
    setting: Setting


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and the experiment for it.

    Attributes:
      number: Number on the command line.
      title: Title of the table and the plot.
      question: Question that the experiment answers.
      axis: Quantity in which the points differ.
      points: Rows of the table.
    """

    number: int
    title: str
    question: str
    axis: str
    points: tuple[Point, ...]


def make_claims(config: config_dict.ConfigDict, settings: Settings) -> list[Claim]:
    """Returns all claims that can be tested on a dataset.

    Args:
      config: The config with the sweep's overrides.
      settings: The dataset's grids.
    """
    claims = [
        Claim(
            1,
            "Objectives",
            "Is MUSIC better than Barlow Twins, VICReg and SimCLR, all else being equal?",
            "objective",
            _objectives(settings),
        ),
        Claim(
            2,
            "Projector depth",
            "Does MUSIC do without a deep projector, and do the others?",
            "hidden layers",
            tuple(
                Point(method, depth, _depth(method, depth, config, settings))
                for method in _COMPARED
                for depth in settings.depths
            ),
        ),
        Claim(
            3,
            "Embedding dimension",
            "Does MUSIC do without a large embedding, and do the others?",
            "dimension",
            _dimensions(config, settings),
        ),
        Claim(
            4,
            "Batch size",
            "Does MUSIC do without a large batch, and do the others?",
            "batch size",
            tuple(
                Point(method, size, _batch(method, size, config))
                for method in _COMPARED
                for size in sorted({config.batch_size, *settings.batch_sizes})
            ),
        ),
        Claim(
            5,
            "Trivial solutions",
            "Is it the objective that avoids collapse? Do the segments partition differently?",
            "change",
            _trivial(),
        ),
        Claim(
            6,
            "Temperature and weights",
            "How much do the softmax's temperature and the terms' weights matter?",
            "change",
            _temperatures_and_weights(config, settings),
        ),
    ]
    if settings.augmentations:
        claims.append(
            Claim(
                7,
                "What each segment is about",
                "Which factor does a segment partition by, and do augmentations decide it?",
                "augmentation or units",
                _factors(config, settings),
            )
        )
    return claims


def base(method: str) -> Setting:
    """Returns the setting of a method with nothing changed."""
    return Setting(method, method)


def _objectives(settings: Settings) -> tuple[Point, ...]:
    points = [Point(method, "", base(method)) for method in METHODS]
    if settings.full_recipe is not None:
        changes = tuple(settings.full_recipe.items())
        recipe = Setting("music,full_recipe", "music", changes, False, as_configured=True)
        text = "".join(f", {name} {value}" for name, value in changes)
        points.append(Point("music", f"the config's own recipe{text}", recipe))
    return tuple(points)


def _depth(method: str, depth: int, config: config_dict.ConfigDict, settings: Settings) -> Setting:
    sizes = (settings.hidden_size,) * depth
    if sizes == tuple(config.projector.hidden_sizes):
        return base(method)
    return Setting(f"{method},hidden_layers={depth}", method, (("projector.hidden_sizes", sizes),))


def _embedding(method: str, shape: tuple[int, int], config: config_dict.ConfigDict) -> Setting:
    segments, units = shape
    if shape == (config.objective.num_segments, config.objective.units_per_segment):
        return base(method)
    changes = (("objective.num_segments", segments), ("objective.units_per_segment", units))
    if method == "music":
        return Setting(f"music,segments={segments},units={units}", method, changes)
    return Setting(f"{method},dimension={segments * units}", method, changes)


def _dimensions(config: config_dict.ConfigDict, settings: Settings) -> tuple[Point, ...]:
    own = (config.objective.num_segments, config.objective.units_per_segment)
    shapes = sorted({own, *settings.embeddings}, key=lambda shape: shape[0] * shape[1])
    points = [
        Point(method, shape[0] * shape[1], _embedding(method, shape, config))
        for method in _COMPARED
        for shape in shapes
    ]
    for shape in settings.ratios:
        series = f"music, {shape[0]} segments of {shape[1]}"
        points.append(Point(series, shape[0] * shape[1], _embedding("music", shape, config)))
    return tuple(points)


def _batch(method: str, size: int, config: config_dict.ConfigDict) -> Setting:
    if size == config.batch_size:
        return base(method)
    return Setting(f"{method},batch={size}", method, (("batch_size", size),))


def _trivial() -> tuple[Point, ...]:
    points = [Point("music", "all terms", base("music"))]
    for term in _TERMS:
        changes = ((f"objective.{term}_weight", 0.0),)
        setting = Setting(f"music,without={term}", "music", changes, searches=False)
        points.append(Point("music", f"without {term}", setting))
    start = Setting("music,start=collapsed", "music", searches=False, collapsed_start=True)
    points.append(Point("music", "from a collapsed start", start))
    return tuple(points)


def _temperatures_and_weights(
    config: config_dict.ConfigDict, settings: Settings
) -> tuple[Point, ...]:
    points = [Point("music", "as configured", base("music"))]
    fields = [("temperature", t) for t in settings.temperatures]
    fields += [(f"{term}_weight", w) for term in _TERMS for w in settings.weights]
    for field, factor in fields:
        value = factor * config.objective[field]
        setting = Setting(
            f"music,{field}={value:g}", "music", ((f"objective.{field}", value),), searches=False
        )
        points.append(Point("music", f"{field.replace('_', ' ')} {value:g}", setting))
    return tuple(points)


def _factors(config: config_dict.ConfigDict, settings: Settings) -> tuple[Point, ...]:
    points = [Point("music", "as configured", base("music"))]
    for name, changes in settings.augmentations.items():
        setting = Setting(
            f"music,augmentation={name.replace(' ', '_')}",
            "music",
            tuple(changes.items()),
            searches=False,
        )
        points.append(Point("music", f"augmentation: {name}", setting))
    for shape in settings.units:
        setting = _embedding("music", shape, config)
        points.append(Point("music", f"{shape[0]} segments of {shape[1]}", setting))
    return tuple(points)
