"""The cells of a sweep: a setting with a seed and a learning rate, in a directory of its own."""

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections.config_dict
from etils import epath
from ml_collections import config_dict

from music_jax import config as config_lib
from music_jax.claims.grid import Claim, Setting, base
from music_jax.claims.settings import Settings
from music_jax.errors import UserError
from music_jax.workdir.files import read_json
from music_jax.workdir.run_config import as_json, read_config

_RESULT = "result.json"
# May change between two runs of one workdir, and yet change what is measured.
_MEASURED_BY = (
    "compute_dtype",
    "dataset.test_split",
    "evaluation.train",
    "evaluation.test",
    "knn",
    "linear_eval",
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training with its evaluation.

    Attributes:
      setting: what is trained.
      learning_rate: the base learning rate.
      seed: of everything.
      searching: whether it is one of the search for the learning rate.
    """

    setting: Setting
    learning_rate: float
    seed: int
    searching: bool

    @property
    def name(self) -> str:
        """Its directory, below that of the sweep."""
        last = f"rate={self.learning_rate:g}" if self.searching else f"seed={self.seed}"
        return f"{self.setting.name}/{last}"


class Sweep:
    """Which cells there are, which are done and which can be run.

    Attributes:
      directory: of all cells.
      claims: those that are asked for.
      num_seeds: of each setting.
    """

    def __init__(
        self,
        config: config_dict.ConfigDict,
        settings: Settings,
        claims: list[Claim],
        *,
        num_seeds: int,
        directory: epath.Path,
        overridden: Iterable[str] = (),
    ):
        """Sets up.

        Args:
          config: what the config file gives.
          settings: the dataset's grids.
          claims: those to be tested.
          num_seeds: how many seeds, from the config's own on.
          directory: of the sweep.
          overridden: dotted names of fields that the sweep's overrides must leave alone.
        """
        self.config, self.settings, self.claims = config, settings, claims
        self.num_seeds, self.directory = num_seeds, directory
        self._overridden = frozenset(overridden)
        self._results: dict[str, dict[str, Any]] = {}

    def with_earlier(self, claims: list[Claim]) -> "Sweep":
        """This sweep, with what claims.json in its directory has tables of already.

        Args:
          claims: all of the dataset's.
        """
        try:
            tables = read_json(self.directory / "claims.json")["claims"]
            numbers = {table["claim"] for table in tables}
            seeds = [row["seeds_wanted"] for table in tables for row in table["rows"]]
            num_seeds = max([self.num_seeds, *map(int, seeds)])
        except FileNotFoundError:
            return self
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.directory / 'claims.json'} cannot be read: {error}; delete it and run "
                "again without --only for the tables of all claims"
            ) from error
        numbers |= {claim.number for claim in self.claims}
        return Sweep(
            self.config,
            self.settings,
            [claim for claim in claims if claim.number in numbers],
            num_seeds=num_seeds,
            directory=self.directory,
            overridden=self._overridden,
        )

    def settings_in_order(self) -> list[Setting]:
        """Every setting once, those on which others wait first."""
        found: dict[str, Setting] = {}
        for claim in self.claims:
            for point in claim.points:
                setting = point.setting
                needed = [setting] if setting.as_configured else [base(setting.method), setting]
                for one in needed:
                    found.setdefault(one.name, one)
        return list(found.values())

    def rates(self, setting: Setting) -> tuple[float, ...] | None:
        """The learning rates to search; None while the one they depend on is not known."""
        if setting.as_configured:
            return (self.config.optimizer.base_learning_rate,)
        if setting == base(setting.method):
            return self.settings.learning_rates
        best = self.best_rate(base(setting.method))
        if best is None:
            return None
        step = self.settings.rate_step
        return (_rounded(best / step), best, _rounded(best * step)) if setting.searches else (best,)

    def best_rate(self, setting: Setting) -> float | None:
        """The learning rate that was best on the validation split, once all have been tried."""
        rates = self.rates(setting)
        if rates is None or len(rates) == 1:
            return rates and rates[0]
        results = [self.result(Cell(setting, rate, self.config.seed, True)) for rate in rates]
        scores = [
            -1.0 if "diverged" in result else result["linear_top1"]
            for result in results
            if result is not None
        ]
        return rates[scores.index(max(scores))] if len(scores) == len(rates) else None

    def cells(self, setting: Setting) -> list[Cell]:
        """The cells of a setting that are known by now."""
        rates = self.rates(setting)
        if rates is None:
            return []
        found = []
        if len(rates) > 1:
            found = [Cell(setting, rate, self.config.seed, True) for rate in rates]
        best = self.best_rate(setting)
        return found if best is None else found + self.final_cells(setting, best)

    def final_cells(self, setting: Setting, rate: float) -> list[Cell]:
        """A setting's cells that count, one a seed."""
        seeds = range(self.config.seed, self.config.seed + self.num_seeds)
        return [Cell(setting, rate, seed, False) for seed in seeds]

    def num_cells(self) -> int:
        """How many cells there are in all."""

        def searched(setting: Setting) -> int:
            if setting.as_configured:
                return 0
            if setting == base(setting.method):
                return len(self.settings.learning_rates)
            return 3 if setting.searches else 0

        return sum(searched(one) + self.num_seeds for one in self.settings_in_order())

    def missing(self) -> list[Cell]:
        """The cells that can be run and have no result yet."""
        return [
            cell
            for setting in self.settings_in_order()
            for cell in self.cells(setting)
            if self.result(cell) is None
        ]

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell's result.json holds; None if it is not there or not whole.

        Raises:
          UserError: it is of another config.
        """
        if cell.name in self._results:
            return self._results[cell.name]
        directory = self.directory / cell.name
        try:
            result = read_json(directory / _RESULT)
        except (OSError, ValueError):
            return None
        if not isinstance(result, dict):
            return None
        self._check_same(cell, directory)
        self._results[cell.name] = result
        return result

    def _check_same(self, cell: Cell, directory: epath.Path) -> None:
        # Fields that have been added since have the defaults that were in force without them.
        old = as_json(config_lib.from_json(read_config(directory) or {}))
        now = as_json(self.cell_config(cell))
        differing = config_lib.differences(old, now)
        for field in _MEASURED_BY:
            there, here = _value(old, field), _value(now, field)
            if there != here:
                differing.append(f"{field}: {reprlib.repr(there)} there, {reprlib.repr(here)} now")
        if differing:
            raise UserError(
                f"{directory} is of another config ({'; '.join(differing[:3])}); give the same "
                "arguments to go on with the sweep, or another --output"
            )

    def validate(self) -> None:
        """Checks what every setting trains, before any is.

        Raises:
          UserError: a config is wrong; the message names the setting.
        """
        if self.config.dataset.path:
            raise UserError(
                "learning rates are chosen on a part of a TFDS split, which a folder has none of; "
                "leave config.dataset.path unset"
            )
        for setting in self.settings_in_order():
            rate = self.settings.learning_rates[0]
            if setting.as_configured:
                rate = self.config.optimizer.base_learning_rate
            last = self.config.seed + self.num_seeds - 1
            try:
                config_lib.validate(self.cell_config(Cell(setting, rate, last, False)))
            except UserError as error:
                raise UserError(f"{setting.name}: {error}") from error

    def cell_config(self, cell: Cell) -> config_dict.ConfigDict:
        """What a cell trains."""
        config = ml_collections.config_dict.ConfigDict(self.config.to_dict())
        setting = cell.setting
        fields = {} if setting.as_configured else dict(self.settings.overrides)
        fields = {name: value for name, value in fields.items() if name not in self._overridden}
        fields |= dict(setting.changes)
        fields |= {
            "objective.name": setting.method,
            "optimizer.base_learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "guards.enabled": False,  # a collapse is a result
        }
        if cell.searching:
            train, held_out = self.settings.search_splits
            fields |= {"dataset.train_split": train, "dataset.test_split": held_out}
            fields |= {"evaluation.train": "", "evaluation.test": ""}
        with config.unlocked():
            config.update_from_flattened_dict(fields)
        return config


def _value(record: dict[str, Any], field: str) -> Any:
    for part in field.split("."):
        record = record[part]
    return record


def base_config(
    config: config_dict.ConfigDict, settings: Settings, overridden: Iterable[str]
) -> config_dict.ConfigDict:
    """The config with the sweep's overrides, but for the fields that a user has set."""
    fields = {k: v for k, v in settings.overrides.items() if k not in set(overridden)}
    changed = ml_collections.config_dict.ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(fields)
    return changed


def result_file(directory: epath.Path) -> epath.Path:
    """Where a cell's result is written."""
    return directory / _RESULT


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def chosen(names: Mapping[int, Claim], only: Iterable[str]) -> list[Claim]:
    """The claims of these numbers; all for none.

    Raises:
      UserError: there is no such claim on this dataset.
    """
    wanted = [text.strip() for text in only]
    unknown = [text for text in wanted if not text.isdecimal() or int(text) not in names]
    if unknown:
        raise UserError(
            f"--only={','.join(wanted)}: there is no claim {unknown[0]!r} on this dataset; it has "
            f"{', '.join(str(number) for number in names)}"
        )
    numbers = {int(text) for text in wanted} or set(names)
    return [claim for number, claim in names.items() if number in numbers]
