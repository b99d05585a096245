"""Methods of a comparison, and the options among which each is searched."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from music_jax import registry
from music_jax.errors import UserError

Fields = dict[str, Any]  # values of config fields by dotted name
Choice = dict[str, Any]  # a value of each option of a method
Options = Mapping[str, tuple[Any, ...]]  # values to search, in ascending order

HIDDEN_SIZE = 512  # of the projector's hidden layers
# Options of every method. `learning_rate` is the peak at the config's batch size.
COMMON: Options = {
    "learning_rate": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "depth": (0, 1, 2),  # number of the projector's hidden layers
    "dimension": (128, 512, 2048),
}
# Options with a fixed set of values; the ranges of all others are extended at their ends.
_CLOSED = ("depth", "dimension")
_TRIES = 1000  # for draws without repetition
_BARLOW_TWINS_WEIGHT = 41.8  # off_diagonal_weight * (D - 1), as in its paper at D = 8,192


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """An objective with the options among which it is searched.

    Attributes:
      name: Name in tables and directories.
      objective: `config.objective.name`.
      options: The method's own options, besides those in `COMMON`.
      own_fields: Function from a choice to the fields of `config.objective`.
    """

    name: str
    objective: str
    options: Options
    own_fields: Callable[[Choice], Fields]

    @property
    def all_options(self) -> Options:
        """All options with their values, in ascending order."""
        return {**COMMON, **self.options}

    def fields(self, choice: Choice) -> Fields:
        """Returns the config fields of a choice, except for the learning rate."""
        sizes: Fields = {"projector.output_size": choice["dimension"]}
        if self.objective == "music":
            units = choice["units"]
            sizes = {
                "projector.output_size": None,
                "objective.num_segments": choice["dimension"] // units,
                "objective.units_per_segment": units,
            }
        own = {f"objective.{name}": value for name, value in self.own_fields(choice).items()}
        hidden = {"projector.hidden_sizes": (HIDDEN_SIZE,) * choice["depth"]}
        return {"objective.name": self.objective, **hidden, **sizes, **own}

    def draw(self, count: int) -> list[Choice]:
        """Draws choices at random; the values of each option are about equally frequent.

        Fewer draws than values are spread over the range of the option. The draws depend on the
        method's name and options alone. They differ from each other, unless there are too few
        choices.
        """
        rng = np.random.Generator(np.random.Philox(key=zlib.crc32(self.name.encode())))
        for _ in range(_TRIES):
            columns = {
                name: [values[i] for i in rng.permutation(_indices(count, len(values)))]
                for name, values in self.all_options.items()
            }
            rows = list(zip(*columns.values(), strict=True))
            if len(set(map(repr, rows))) == count:
                break
        return [dict(zip(columns, row, strict=True)) for row in rows]


def _indices(count: int, values: int) -> np.ndarray:
    if count < values:
        return np.linspace(0, values - 1, count).round().astype(int)
    return np.arange(count) % values


def beyond(option: str, values: list[Any], value: Any) -> Any | None:
    """Returns the next value of an option beyond an end of the values that were tried, or None.

    The ratio of the last two values is continued. Numbers of layers and dimensions have no
    further values, and texts and booleans no order.
    """
    values = sorted(set(values)) if _are_numbers(values) else []
    if option in _CLOSED or len(values) < 2 or values[0] <= 0:
        return None
    ratios = {values[0]: values[0] / values[1], values[-1]: values[-1] / values[-2]}
    if value not in ratios:
        return None
    further = float(f"{value * ratios[value]:.3g}")
    return round(further) if all(isinstance(v, int) for v in values) else further


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _same(choice: Choice, *names: str) -> Fields:
    return {name: choice[name] for name in names}


def _plain(name: str, **options: tuple[Any, ...]) -> Method:
    """Returns a method each of whose options is a field of `config.objective`."""
    return Method(name, name, options, lambda choice: _same(choice, *options))


def _music(center: bool) -> Method:
    return Method(
        "music_centered" if center else "music",
        "music",
        {"units": (4, 8, 16, 32), "temperature": (0.5, 1.0, 2.0)},
        lambda choice: {"center": center, "temperature": choice["temperature"]},
    )


def _barlow_twins(choice: Choice) -> Fields:
    weight = choice["weight_factor"] * _BARLOW_TWINS_WEIGHT / (choice["dimension"] - 1)
    return {"off_diagonal_weight": float(f"{weight:.4g}")}


_BUILT_IN = (
    _music(center=False),
    _music(center=True),
    Method("barlow_twins", "barlow_twins", {"weight_factor": (0.1, 0.3, 1.0, 3.0)}, _barlow_twins),
    _plain(
        "vicreg",
        similarity_weight=(6.25, 12.5, 25.0, 50.0),
        covariance_weight=(0.25, 1.0, 4.0),
    ),
    _plain("simclr", contrast_temperature=(0.1, 0.2, 0.4, 0.8)),
    _plain("sigreg", sigreg_weight=(0.0125, 0.025, 0.05, 0.1, 0.2)),
    _plain(
        "tcr",
        cosine_weight=(12.5, 50.0, 200.0, 800.0),
        epsilon_squared=(0.05, 0.2, 0.8),
    ),
    _plain(
        "discrete",
        temperature=(0.25, 0.5, 1.0, 2.0),
        diversity_weight=(1.0, 2.0, 4.0),
    ),
)
BUILT_IN = {method.name: method for method in _BUILT_IN}


def find_methods(names: list[str]) -> list[Method]:
    """Returns methods by name; those that are not built in are registered objectives.

    Raises:
      UserError: There is no such method, or the options to search of a registered one are wrong.
    """
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--objectives names {min(repeated)!r} twice")
    return [BUILT_IN[name] if name in BUILT_IN else _registered(name) for name in names]


def _registered(name: str) -> Method:
    objective = registry.OBJECTIVES.get(name)
    if not isinstance(objective, registry.RegisteredObjective):
        raise UserError(
            f"--objectives: {name!r} is neither one of {', '.join(BUILT_IN)} nor registered; name "
            "the module that registers it with --import=MODULE"
        )
    options = dict(objective.search)
    for option, values in options.items():
        if option in COMMON:
            raise UserError(
                f"the objective {name!r} searches {option!r}, which is searched for every method; "
                "give its option another name"
            )
        if not values:
            raise UserError(f"the objective {name!r} has no values for its option {option!r}")
    return Method(name, name, options, lambda choice: {"options": _same(choice, *options)})
