"""Grids of each dataset, and settings of each claim, that a sweep trains."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from music_jax.config import get_field
from music_jax.errors import UserError

METHODS = ("music", "barlow_twins", "vicreg", "simclr")
_COMPARED = METHODS[:3]  # in the claims about depth, dimension and batch size
_TERMS = ("diagonal", "cross_segment", "invariance")

Fields = Mapping[str, Any]  # values of config fields by dotted name


@dataclasses.dataclass(frozen=True)
class Settings:
    """A dataset's grids. The config's own value is always tried as well."""

    # Rates to search for each method, ascending. Other settings search around its best rate.
    learning_rates: tuple[float, ...]
    # Parts of the training split to train on and to validate with.
    search_splits: tuple[str, str] = ("train[:90%]", "train[90%:]")
    overrides: Fields = dataclasses.field(default_factory=dict)  # in every cell
    rate_step: float = 3.0  # ratio of neighboring rates in a search around another one
    hidden_size: int = 512  # of the projector's hidden layers
    depths: tuple[int, ...] = (0, 1, 2, 3)  # numbers of hidden layers
    # Segments and units, of embeddings of several sizes and of one size.
    embeddings: tuple[tuple[int, int], ...] = ((8, 8), (32, 32), (64, 64))
    ratios: tuple[tuple[int, int], ...] = ((8, 64), (64, 8))
    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024)
    temperatures: tuple[float, ...] = (0.25, 0.5, 2.0, 4.0)  # factors
    weights: tuple[float, ...] = (0.5, 2.0)  # factors of each term's weight
    augmentations: Mapping[str, Fields] = dataclasses.field(default_factory=dict)  # for claim 7
    units: tuple[tuple[int, int], ...] = ()  # segments and units for claim 7
    # Fields of a further row, MUSIC with the otherwise unchanged config; None for no such row.
    full_recipe: Fields | None = None


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
_NO_CROPS = {"crop.scale": (1.0, 1.0), "crop.aspect_ratio": (1.0, 1.0)}
_NO_JITTER = _both_views(jitter_probability=0.0, grayscale_probability=0.0)
_WEAK_JITTER = _both_views(
    jitter_probability=0.8, brightness=0.4, contrast=0.4, hue=0.1, grayscale_probability=0.2
)

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
            "no jitter": _NO_JITTER,
            "weak jitter": _WEAK_JITTER,
            "no crops": _NO_CROPS,
            "rotation": _both_views(affine_probability=1.0, rotation_degrees=180.0),
            "none": _NO_CROPS | _NO_JITTER,
        },
        units=((128, 4), (8, 64)),
    ),
    "cifar10": Settings(
        learning_rates=(0.03, 0.1, 0.3),
        hidden_size=1024,
        embeddings=((8, 8), (16, 16), (64, 64)),
        ratios=((8, 128), (128, 8)),
        batch_sizes=(64, 256, 512, 1024),
    ),
    "imagenette": Settings(
        learning_rates=(0.3, 0.9, 2.7),
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
    """A training without its seed and its learning rate."""

    name: str  # of its directory
    method: str
    changes: tuple[tuple[str, Any], ...] = ()  # config fields and their values
    searches: bool = True  # whether its learning rate is searched; otherwise it is the method's
    as_configured: bool = False  # whether to omit the sweep's overrides and the search
    collapsed_start: bool = False  # whether to train for invariance alone first


@dataclasses.dataclass(frozen=True)
class Point:
    """A row of a claim's table: a setting, its line in the plot, and its position on that line."""

    series: str
    x: Any
    setting: Setting


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim, and the points of the experiment for it, which differ in a quantity, `axis`."""

    number: int
    title: str
    question: str
    axis: str
    points: tuple[Point, ...]


def base(method: str) -> Setting:
    """Returns the setting of a method with nothing changed."""
    return Setting(method, method)


_CLAIMS = {  # title, question, axis
    1: (
        "Objectives",
        "Is MUSIC better than Barlow Twins, VICReg and SimCLR, all else being equal?",
        "objective",
    ),
    2: (
        "Projector depth",
        "Does MUSIC do without a deep projector, and do the others?",
        "hidden layers",
    ),
    3: (
        "Embedding dimension",
        "Does MUSIC do without a large embedding, and do the others?",
        "dimension",
    ),
    4: ("Batch size", "Does MUSIC do without a large batch, and do the others?", "batch size"),
    5: (
        "Trivial solutions",
        "Is it the objective that avoids collapse? Do the segments partition differently?",
        "change",
    ),
    6: (
        "Temperature and weights",
        "How much do the softmax's temperature and the terms' weights matter?",
        "change",
    ),
    7: (
        "What each segment is about",
        "Which factor does a segment partition by, and do augmentations decide it?",
        "augmentation or units",
    ),
}


def make_claims(config: config_dict.ConfigDict, settings: Settings) -> list[Claim]:
    """Returns all claims that can be tested on a dataset; the config has the sweep's overrides."""

    def change(name: str, fields: Fields, method: str = "music", searches: bool = True) -> Setting:
        if all(get_field(config, field) == value for field, value in fields.items()):
            return base(method)
        return Setting(f"{method},{name}", method, tuple(fields.items()), searches)

    def resize(segments: int, units: int, method: str = "music") -> Setting:
        fields = {"objective.num_segments": segments, "objective.units_per_segment": units}
        size = f"segments={segments},units={units}"
        return change(
            size if method == "music" else f"dimension={segments * units}", fields, method
        )

    def deepen(depth: int, method: str) -> Setting:
        fields = {"projector.hidden_sizes": (settings.hidden_size,) * depth}
        return change(f"hidden_layers={depth}", fields, method)

    def music(changed: Mapping[str, Setting]) -> list[Point]:
        return [Point("music", x, setting) for x, setting in changed.items()]

    own = (config.objective.num_segments, config.objective.units_per_segment)
    shapes = sorted({own, *settings.embeddings}, key=math.prod)
    sizes = sorted({config.batch_size, *settings.batch_sizes})
    objectives = [Point(method, "", base(method)) for method in METHODS]
    if settings.full_recipe is not None:
        fields = settings.full_recipe
        recipe = Setting("music,full_recipe", "music", tuple(fields.items()), False, True)
        text = "".join(f", {name} {value}" for name, value in fields.items())
        objectives.append(Point("music", f"the config's own recipe{text}", recipe))
    trivial = {"all terms": base("music")}
    for term in _TERMS:
        fields = {f"objective.{term}_weight": 0.0}
        trivial[f"without {term}"] = change(f"without={term}", fields, searches=False)
    trivial["from a collapsed start"] = Setting(
        "music,start=collapsed", "music", searches=False, collapsed_start=True
    )
    scaled = {"as configured": base("music")}
    factors = [("temperature", factor) for factor in settings.temperatures]
    factors += [(f"{term}_weight", factor) for term in _TERMS for factor in settings.weights]
    for field, factor in factors:
        value = factor * config.objective[field]
        setting = change(f"{field}={value:g}", {f"objective.{field}": value}, searches=False)
        scaled[f"{field.replace('_', ' ')} {value:g}"] = setting
    segments = {"as configured": base("music")}
    for name, fields in settings.augmentations.items():
        setting = change(f"augmentation={name.replace(' ', '_')}", fields, searches=False)
        segments[f"augmentation: {name}"] = setting
    segments |= {f"{shape[0]} segments of {shape[1]}": resize(*shape) for shape in settings.units}
    points = {
        1: objectives,
        2: [Point(m, depth, deepen(depth, m)) for m in _COMPARED for depth in settings.depths],
        3: [Point(m, math.prod(s), resize(*s, m)) for m in _COMPARED for s in shapes]
        + [
            Point(f"music, {s[0]} segments of {s[1]}", math.prod(s), resize(*s))
            for s in settings.ratios
        ],
        4: [
            Point(m, size, change(f"batch={size}", {"batch_size": size}, m))
            for m in _COMPARED
            for size in sizes
        ],
        5: music(trivial),
        6: music(scaled),
        7: music(segments) if settings.augmentations else [],
    }
    return [Claim(n, *_CLAIMS[n], tuple(rows)) for n, rows in points.items() if rows]
