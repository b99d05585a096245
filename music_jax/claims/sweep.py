"""Cells of a sweep and their results; a cell is a setting, a learning rate and a seed."""

import dataclasses
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import config_dict

from music_jax import config as config_lib
from music_jax.claims.grid import Claim, Point, Setting, Settings, base, make_claims, settings_of
from music_jax.errors import UserError
from music_jax.metrics.few_shot import mean_interval
from music_jax.workdir.directory import open_workdir
from music_jax.workdir.files import read_json
from music_jax.workdir.run_config import as_json, read_config

RESULT = "result.json"  # in the directory of a cell

# Measures and their headings; shares are shown in percent.
SHARES = {
    "linear_top1": "linear",
    "knn_top1": "kNN",
    "ten_shot_top1": "10-shot",
    "all_factors_top1": "all factors",
    "segment_accuracy": "one segment's clusters",
    "joint_code_accuracy": "joint code's clusters",
    "segments_label_nmi_mean": "NMI with labels",
    "segment_information": "MI of segments / log K",
    "usage_entropy": "usage entropy / log K",
    "dead_units": "dead units",
    "confidence": "confidence",
}
MEASURES = SHARES | {"rankme": "RankMe", "embedding_rankme": "RankMe of embeddings"}

# Fields that may change when a run resumes, but affect the measures.
_MEASURE_FIELDS = (
    *("compute_dtype", "dataset.test_split", "evaluation.train", "evaluation.test"),
    *("knn", "linear_eval"),
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

Table = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training with its evaluation; `searching`: to find the setting's learning rate."""

    setting: Setting
    learning_rate: float
    seed: int
    searching: bool

    @property
    def name(self) -> str:
        """Directory of the cell, relative to that of the sweep."""
        last = f"rate={self.learning_rate:g}" if self.searching else f"seed={self.seed}"
        return f"{self.setting.name}/{last}"


@dataclasses.dataclass
class Sweep:
    """The cells of some claims and their results.

    Attributes:
      config: The config of the config file.
      settings: The dataset's grids.
      claims: All claims that can be tested on the dataset.
      num_seeds: Number of seeds of each claim to test, by the claim's number.
      directory: Directory of the sweep.
      overridden: Dotted names of fields that the sweep's overrides must not change.
    """

    config: config_dict.ConfigDict
    settings: Settings
    claims: list[Claim]
    num_seeds: Mapping[int, int]
    directory: epath.Path
    overridden: Collection[str]
    _results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict, init=False)

    def with_earlier(self) -> "Sweep":
        """Returns this sweep with the claims and seeds that claims.json in its directory has."""
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
        more = {n: max(seeds, earlier.get(n, 0)) for n, seeds in self.num_seeds.items()}
        return dataclasses.replace(self, num_seeds=earlier | more)

    def tested(self) -> list[Claim]:
        """Returns the claims to test."""
        return [claim for claim in self.claims if claim.number in self.num_seeds]

    def settings_in_order(self) -> dict[Setting, int]:
        """Returns the number of seeds of each setting; none depends on a later one."""
        seeds: dict[Setting, int] = {}
        for claim in self.tested():
            for point in claim.points:
                setting = point.setting
                needed = [setting] if setting.as_configured else [base(setting.method), setting]
                for one in needed:
                    seeds[one] = max(seeds.get(one, 0), self.num_seeds[claim.number])
        return seeds

    def rates(self, setting: Setting) -> tuple[float, ...]:
        """Returns the learning rates to search; none while the one they depend on is unknown."""
        if setting.as_configured:
            return (self.config.optimizer.base_learning_rate,)
        if setting == base(setting.method):
            return self.settings.learning_rates
        best, step = self.best_rate(base(setting.method)), self.settings.rate_step
        if best is None:
            return ()
        low, high = (float(f"{rate:.2g}") for rate in (best / step, best * step))
        return (low, best, high) if setting.searches else (best,)

    def best_rate(self, setting: Setting) -> float | None:
        """Returns the rate of the best validation accuracy; None until all have been tried."""
        rates = self.rates(setting)
        if len(rates) < 2:
            return rates[0] if rates else None
        results = self._done(self.search_cells(setting))
        scores = [-1.0 if "diverged" in result else result["linear_top1"] for result in results]
        return rates[scores.index(max(scores))] if len(scores) == len(rates) else None

    def search_cells(self, setting: Setting) -> list[Cell]:
        """Returns the cells of a setting's search, one per learning rate."""
        rates = self.rates(setting)
        return [Cell(setting, rate, self.config.seed, True) for rate in rates if len(rates) > 1]

    def final_cells(self, setting: Setting, num_seeds: int) -> list[Cell]:
        """Returns the cells of a setting that the tables show, one per seed."""
        rate, first = self.best_rate(setting), self.config.seed
        if rate is None:
            return []
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
        first = len(self.settings.learning_rates)
        return sum(
            num_seeds + (first if setting == base(setting.method) else 3 * setting.searches)
            for setting, num_seeds in self.settings_in_order().items()
        )

    def missing(self) -> list[Cell]:
        """Returns the cells that can be run and have no result yet."""
        return [cell for cell in self.cells() if self.result(cell) is None]

    def results(self) -> list[dict[str, Any]]:
        """Returns the results of all cells that are done."""
        return self._done(self.cells())

    def _done(self, cells: list[Cell]) -> list[dict[str, Any]]:
        return [result for cell in cells if (result := self.result(cell)) is not None]

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Returns a cell's result; None if it has none that can be read.

        Raises:
          UserError: The result belongs to another config.
        """
        if cell.name not in self._results:
            try:
                result = read_json(self.directory / cell.name / RESULT)
            except (OSError, ValueError):
                return None
            if not isinstance(result, dict):
                return None
            self._check_same(cell)
            self._results[cell.name] = result
        return self._results[cell.name]

    def _check_same(self, cell: Cell) -> None:
        directory = self.directory / cell.name
        # Fields that were added since get the defaults, which applied without them.
        saved = config_lib.from_json(read_config(directory) or {})
        saved.update_from_flattened_dict(_protocol(cell))  # earlier versions set other values
        old, now = as_json(saved), as_json(self.cell_config(cell))
        differing = config_lib.differences(old, now)
        for field in _MEASURE_FIELDS:
            there, here = config_lib.get_field(old, field), config_lib.get_field(now, field)
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
        overrides = {} if setting.as_configured else self.settings.overrides
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
        config = _with_overrides(self.config, overrides, self.overridden)
        config.update_from_flattened_dict(fields)
        return config

    def tables(self) -> list[Table]:
        """Returns the table of each claim, from the cells that are done.

        Returns:
          Number, title, question, axis and rows of each claim. A row has its series, its x, the
          setting, the learning rate (None while unknown), the validation accuracy of each rate that
          was searched, whether the rate was the smallest or largest of these, the number of seeds
          that are done, that are wanted and that diverged, and each measure's mean, half-width of
          the 95 % interval (None for a single seed) and values. Rows of claim 7 also have the
          factors and each seed's measures of them.
        """
        return [
            {
                "claim": claim.number,
                "title": claim.title,
                "question": claim.question,
                "axis": claim.axis,
                "rows": [self._row(claim.number, point) for point in claim.points],
            }
            for claim in self.tested()
        ]

    def _row(self, claim: int, point: Point) -> dict[str, Any]:
        setting, num_seeds = point.setting, self.num_seeds[claim]
        best = self.best_rate(setting)
        search = {
            cell.learning_rate: (self.result(cell) or {}).get("linear_top1")
            for cell in self.search_cells(setting)
        }
        results = self._done(self.final_cells(setting, num_seeds))
        finished = [result for result in results if "diverged" not in result]
        row: dict[str, Any] = {
            "series": point.series,
            "x": point.x,
            "setting": setting.name,
            "learning_rate": best,
            "search": {f"{rate:g}": top1 for rate, top1 in search.items()},
            "rate_at_edge": bool(search) and best in (min(search), max(search)),
            "seeds": len(results),
            "seeds_wanted": num_seeds,
            "diverged": len(results) - len(finished),
            "core_seconds": [result["core_seconds"] for result in results],
            "measures": _measures(finished),
        }
        if starts := [result["start"] for result in finished if result.get("start")]:
            row["start"] = _measures(starts)
        if claim == 7 and finished and "factors" in finished[0]:
            row["factors"] = finished[0]["factors"]
            row["factor_linear_top1"] = [r["factor_linear_top1"] for r in finished]
            row["factor_nmi"] = [r["factor_nmi"] for r in finished if "factor_nmi" in r]
        return row


def make_sweep(
    config: config_dict.ConfigDict,
    *,
    only: Collection[str],
    seeds: int,
    directory: str,
    overridden: Collection[str] = (),
) -> Sweep:
    """Returns the sweep of the claims of these numbers, or of all, and creates its directory.

    Raises:
      UserError: There are no settings for the dataset, no such claim, or no such directory.
    """
    settings = settings_of(config.dataset.name)
    claims = make_claims(_with_overrides(config, settings.overrides, overridden), settings)
    numbers = {str(claim.number): claim.number for claim in claims}
    wanted = {text.strip() for text in only} or set(numbers)
    if unknown := sorted(wanted - set(numbers)):
        raise UserError(
            f"--only={','.join(only)}: there is no claim {unknown[0]!r} on this dataset; it has "
            f"{', '.join(numbers)}"
        )
    num_seeds = {number: seeds for text, number in numbers.items() if text in wanted}
    return Sweep(config, settings, claims, num_seeds, open_workdir(directory), overridden)


def _protocol(cell: Cell) -> dict[str, Any]:
    return _PROTOCOL | {"knn.enabled": not cell.searching}


def _with_overrides(
    config: config_dict.ConfigDict, overrides: Mapping[str, Any], overridden: Collection[str]
) -> config_dict.ConfigDict:
    """Returns the config with a sweep's overrides, except for the fields that a user has set."""
    changed = config_dict.ConfigDict(config.to_dict())
    fields = {name: value for name, value in overrides.items() if name not in overridden}
    changed.update_from_flattened_dict(fields)
    return changed


def _measures(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the mean, the half-width and the values of each measure over seeds."""
    measures = {}
    for name in MEASURES:
        values = [result[name] for result in results if result.get(name) is not None]
        if name == "all_factors_top1":
            factors = [result.get("factor_linear_top1") for result in results]
            values = [float(np.mean(top1)) for top1 in factors if top1 is not None]
        if values:
            mean, half_width = mean_interval(values)
            half = None if np.isnan(half_width) else half_width
            measures[name] = {"mean": mean, "half_width": half, "values": values}
    return measures
