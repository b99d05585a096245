"""The claims: each has points of a plot, and a point is a setting trained for some seeds."""

import dataclasses
from typing import Any

from ml_collections import config_dict

from music_jax.claims.settings import Settings

METHODS = ("music", "barlow_twins", "vicreg", "simclr")
_TERMS = ("diagonal", "cross_segment", "invariance")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, but for the seed and the learning rate.

    Attributes:
      name: of its directory.
      method: the objective.
      changes: of the config's fields.
      searches: whether its learning rate is searched for; else it is the method's.
      as_configured: the config without the sweep's overrides, and with its own learning rate.
      collapsed_start: train for invariance alone first; only with images in memory.
    """

    name: str
    method: str
    changes: tuple[tuple[str, Any], ...] = ()
    searches: bool = True
    as_configured: bool = False
    collapsed_start: bool = False


@dataclasses.dataclass(frozen=True)
class Point:
    """A setting in a claim's table: which line of the plot, and where on it."""

    series: str
    x: Any
    setting: Setting


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and the experiment for it.

    Attributes:
      number: as on the command line.
      title: of the table and the plot.
      question: what it is to answer.
      axis: what the points differ in.
      points: in the table's order.
    """

    number: int
    title: str
    question: str
    axis: str
    points: tuple[Point, ...]


def make_claims(config: config_dict.ConfigDict, settings: Settings) -> list[Claim]:
    """All claims that can be put to the test on a dataset.

    Args:
      config: with the sweep's overrides.
      settings: the dataset's grids.
    """
    compared = METHODS[:3]
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
                for method in compared
                for depth in settings.depths
            ),
        ),
        Claim(
            3,
            "Embedding dimension",
            "Does MUSIC do without a large embedding, and do the others?",
            "dimension",
            _dimensions(compared, config, settings),
        ),
        Claim(
            4,
            "Batch size",
            "Does MUSIC do without a large batch, and do the others?",
            "batch size",
            tuple(
                Point(method, size, _batch(method, size, config))
                for method in compared
                for size in sorted({config.batch_size, *settings.batch_sizes})
            ),
        ),
        Claim(
            5,
            "Trivial solutions",
            "Is it the objective that avoids collapse? Do the segments partition differently?",
            "change",
            _trivial(settings),
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
    """A method with nothing changed."""
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


def _dimensions(
    methods: tuple[str, ...], config: config_dict.ConfigDict, settings: Settings
) -> tuple[Point, ...]:
    own = (config.objective.num_segments, config.objective.units_per_segment)
    shapes = sorted({own, *settings.embeddings}, key=lambda shape: shape[0] * shape[1])
    points = [
        Point(method, shape[0] * shape[1], _embedding(method, shape, config))
        for method in methods
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


def _trivial(settings: Settings) -> tuple[Point, ...]:
    points = [Point("music", "all terms", base("music"))]
    for term in _TERMS:
        changes = ((f"objective.{term}_weight", 0.0),)
        setting = Setting(f"music,without={term}", "music", changes, searches=False)
        points.append(Point("music", f"without {term}", setting))
    if settings.in_memory:  # a run of music_jax.main starts from random weights
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
