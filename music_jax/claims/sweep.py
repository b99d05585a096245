"""Cells of a sweep and their results; a cell is a setting, a learning rate and a seed."""

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath
from ml_collections import config_dict

from music_jax import config as config_lib
from music_jax.claims.grid import Claim, Setting, Settings, base
from music_jax.errors import UserError
from music_jax.workdir.files import read_json
from music_jax.workdir.run_config import as_json, read_config

# Fields that may change when a run resumes, but affect the measures.
_MEASURE_FIELDS = (
    "compute_dtype",
    "dataset.test_split",
    "evaluation.train",
    "evaluation.test",
    "knn",
    "linear_eval",
)
# Fields with the same values in all cells, which save time or select measures of a protocol.
_PROTOCOL = {
    "linear_eval.raw_pixels": False,
    "linear_eval.random_init": False,
    "few_shot.shots": (10,),
    "few_shot.draws": 20,
    "evaluation.view_images": 64,  # measures of views are not in the tables
    "evaluation.num_views": 2,
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training with its evaluation.

    Attributes:
      setting: Setting to train.
      learning_rate: Base learning rate.
      seed: Seed of the training and the evaluation.
      searching: Whether it belongs to the search for the learning rate.
    """

    setting: Setting
    learning_rate: float
    seed: int
    searching: bool

    @property
    def name(self) -> str:
        """Directory of the cell, relative to that of the sweep."""
        last = f"rate={self.learning_rate:g}" if self.searching else f"seed={self.seed}"
        return f"{self.setting.name}/{last}"


class Sweep:
    """The cells of some claims and their results.

    Attributes:
      config: The config of the config file.
      settings: The dataset's grids.
      claims: The claims to test.
      num_seeds: Number of seeds of each claim's settings, by the claim's number.
      directory: Directory of the sweep.
    """

    def __init__(
        self,
        config: config_dict.ConfigDict,
        settings: Settings,
        claims: list[Claim],
        *,
        num_seeds: Mapping[int, int],
        directory: epath.Path,
        overridden: Iterable[str] = (),
    ):
        """Initializes the sweep.

        Args:
          config: The config of the config file.
          settings: The dataset's grids.
          claims: The claims to test.
          num_seeds: Number of seeds of each claim's settings, by the claim's number.
          directory: Directory of the sweep.
          overridden: Dotted names of fields that the sweep's overrides must not change.
        """
        self.config, self.settings, self.claims = config, settings, claims
        self.num_seeds, self.directory = num_seeds, directory
        self._overridden = frozenset(overridden)
        self._results: dict[str, dict[str, Any]] = {}

    def with_earlier(self, claims: list[Claim]) -> "Sweep":
        """Returns this sweep with the claims and seeds that claims.json in its directory has.

        Args:
          claims: All claims of the dataset.
        """
        path = self.directory / "claims.json"
        try:
            earlier = {
                table["claim"]: max(int(row["seeds_wanted"]) for row in table["rows"])
                for table in read_json(path)["claims"]
            }
        except FileNotFoundError:
            return self
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read: {error}; delete it and rerun the command without --only "
                "for the tables of all claims"
            ) from error
        numbers = {*earlier, *self.num_seeds}
        num_seeds = {n: max(earlier.get(n, 0), self.num_seeds.get(n, 0)) for n in numbers}
        return Sweep(
            self.config,
            self.settings,
            [claim for claim in claims if claim.number in numbers],
            num_seeds=num_seeds,
            directory=self.directory,
            overridden=self._overridden,
        )

    def settings_in_order(self) -> dict[Setting, int]:
        """Returns the number of seeds of each setting; none depends on a later one."""
        seeds: dict[Setting, int] = {}
        for claim in self.claims:
            for point in claim.points:
                setting = point.setting
                needed = [setting] if setting.as_configured else [base(setting.method), setting]
                for one in needed:
                    seeds[one] = max(seeds.get(one, 0), self.num_seeds[claim.number])
        return seeds

    def rates(self, setting: Setting) -> tuple[float, ...] | None:
        """Returns the learning rates to search; None while the one they depend on is unknown."""
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
        """Returns the rate of the best validation accuracy; None until all have been tried."""
        rates = self.rates(setting)
        if rates is None or len(rates) == 1:
            return rates and rates[0]
        results = [self.result(cell) for cell in self.search_cells(setting)]
        scores = [
            -1.0 if "diverged" in result else result["linear_top1"]
            for result in results
            if result is not None
        ]
        return rates[scores.index(max(scores))] if len(scores) == len(rates) else None

    def search_cells(self, setting: Setting) -> list[Cell]:
        """Returns the cells of a setting's search, one per learning rate."""
        rates = self.rates(setting) or ()
        if len(rates) == 1:
            return []
        return [Cell(setting, rate, self.config.seed, True) for rate in rates]

    def final_cells(self, setting: Setting, num_seeds: int) -> list[Cell]:
        """Returns the cells of a setting that the tables show, one per seed."""
        rate = self.best_rate(setting)
        if rate is None:
            return []
        first = self.config.seed
        return [Cell(setting, rate, seed, False) for seed in range(first, first + num_seeds)]

    def cells(self) -> list[Cell]:
        """Returns all cells that are known by now."""
        return [
            cell
            for setting, num_seeds in self.settings_in_order().items()
            for cell in (*self.search_cells(setting), *self.final_cells(setting, num_seeds))
        ]

    def num_cells(self) -> int:
        """Returns the number of cells, including those that are not known yet."""

        def searched(setting: Setting) -> int:
            if setting.as_configured:
                return 0
            if setting == base(setting.method):
                return len(self.settings.learning_rates)
            return 3 if setting.searches else 0

        return sum(searched(one) + seeds for one, seeds in self.settings_in_order().items())

    def missing(self) -> list[Cell]:
        """Returns the cells that can be run and have no result yet."""
        return [cell for cell in self.cells() if self.result(cell) is None]

    def results(self) -> list[dict[str, Any]]:
        """Returns the results of all cells that are done."""
        found = (self.result(cell) for cell in self.cells())
        return [result for result in found if result is not None]

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Returns a cell's result; None if it has none that can be read.

        Raises:
          UserError: The result belongs to another config.
        """
        if cell.name in self._results:
            return self._results[cell.name]
        directory = self.directory / cell.name
        try:
            result = read_json(result_file(directory))
        except (OSError, ValueError):
            return None
        if not isinstance(result, dict):
            return None
        self._check_same(cell, directory)
        self._results[cell.name] = result
        return result

    def _check_same(self, cell: Cell, directory: epath.Path) -> None:
        # Fields that were added since get the defaults, which applied without them.
        saved = config_lib.from_json(read_config(directory) or {})
        saved.update_from_flattened_dict(_protocol(cell))  # earlier versions set other values
        old, now = as_json(saved), as_json(self.cell_config(cell))
        differing = config_lib.differences(old, now)
        for field in _MEASURE_FIELDS:
            there, here = _value(old, field), _value(now, field)
            if there != here:
                differing.append(f"{field}: {reprlib.repr(there)} there, {reprlib.repr(here)} now")
        if differing:
            raise UserError(
                f"{directory} was trained with another config ({'; '.join(differing[:3])}); give "
                "the same arguments to resume the sweep, or another --output"
            )

    def validate(self) -> None:
        """Checks the config of every setting.

        Raises:
          UserError: A config is wrong. The message names the setting.
        """
        if self.config.dataset.path:
            raise UserError(
                "learning rates are chosen on a part of a TFDS split, and a folder has no splits; "
                "leave config.dataset.path unset"
            )
        for setting, num_seeds in self.settings_in_order().items():
            rate = self.settings.learning_rates[0]
            if setting.as_configured:
                rate = self.config.optimizer.base_learning_rate
            last = Cell(setting, rate, self.config.seed + num_seeds - 1, False)
            try:
                config_lib.validate(self.cell_config(last))
            except UserError as error:
                raise UserError(f"{setting.name}: {error}") from error

    def cell_config(self, cell: Cell) -> config_dict.ConfigDict:
        """Returns the config that a cell trains."""
        setting = cell.setting
        config = config_dict.ConfigDict(self.config.to_dict())
        if not setting.as_configured:
            config = base_config(config, self.settings, self._overridden)
        fields = dict(setting.changes) | _protocol(cell)
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
        config.update_from_flattened_dict(fields)
        return config


def _protocol(cell: Cell) -> dict[str, Any]:
    return _PROTOCOL | {"knn.enabled": not cell.searching}


def _value(record: dict[str, Any], field: str) -> Any:
    for part in field.split("."):
        record = record[part]
    return record


def base_config(
    config: config_dict.ConfigDict, settings: Settings, overridden: Iterable[str]
) -> config_dict.ConfigDict:
    """Returns the config with the sweep's overrides, except for the fields that a user has set."""
    fields = {k: v for k, v in settings.overrides.items() if k not in set(overridden)}
    changed = config_dict.ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(fields)
    return changed


def result_file(directory: epath.Path) -> epath.Path:
    """Returns the file of a cell's result."""
    return directory / "result.json"


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def chosen(claims: Iterable[Claim], only: Iterable[str]) -> list[Claim]:
    """Returns the claims of these numbers, or all claims if there are no numbers.

    Raises:
      UserError: The dataset has no such claim.
    """
    numbers = {str(claim.number): claim for claim in claims}
    wanted = {text.strip() for text in only} or set(numbers)
    if unknown := sorted(wanted - set(numbers)):
        raise UserError(
            f"--only={','.join(only)}: there is no claim {unknown[0]!r} on this dataset; it has "
            f"{', '.join(numbers)}"
        )
    return [claim for number, claim in numbers.items() if number in wanted]
