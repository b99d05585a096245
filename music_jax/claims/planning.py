"""The cells of each claim, in an order in which they can be run, and the rows of its table."""

import dataclasses
import functools
import itertools
from typing import Any

from music_jax import config as config_lib
from music_jax.claims.cells import Cell
from music_jax.claims.methods import COMMON, Choice, Method
from music_jax.claims.search import Found, Search, again_cells, run_search
from music_jax.claims.sweep import MIN_WARMUP_STEPS, Sweep
from music_jax.errors import UserError

FIRST_SEED = 100  # of final cells; those of searches are lower
REFERENCES = ("raw_pixels", "hog_svm", "random_backbone", "supervised")
STARTS = ("random", "constant", "saturated")  # initial states of claim 5
_MUSIC = ("music", "music_centered")
_RIVALS = ("barlow_twins", "vicreg")  # in claims 2 to 4
_START_HEAD = {"depth": 1, "dimension": 512}  # of all methods in claim 5, which share their starts


@dataclasses.dataclass(frozen=True)
class Point:
    """A row of a claim's table.

    Attributes:
      claim: Number of the claim.
      series: Line of the row in a plot: a method or a reference.
      x: Position on that line: a depth, a size, a start, ...
      cells: Its final cells, one per seed; none while its choice is unknown.
      choice: The chosen options, if any.
      score: Validation accuracy of the choice in its search.
      at_edge: Options of which the smallest or the largest value that was tried was chosen.
      group: Name of a part of the claim, or "".
    """

    claim: int
    series: str
    x: Any
    cells: tuple[Cell, ...]
    choice: Choice | None
    score: float | None
    at_edge: tuple[str, ...]
    group: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """All cells that are known by now, and the rows of the tables."""

    cells: list[Cell]
    points: list[Point]


def make_plan(sweep: Sweep, *, assume: bool = False) -> Plan:
    """Returns the cells that are known by now, and the rows of the tables.

    Args:
      sweep: The comparison.
      assume: Whether to take the first candidate where a search is not complete, so that the
        number and the costs of all cells are about those at the end.
    """
    planning = _Planning(sweep, assume)
    for claim in sweep.claims:
        getattr(planning, f"claim_{claim}")()
    cells = {cell.name: cell for cell in planning.cells}
    return Plan(list(cells.values()), planning.points)


def missing_cells(sweep: Sweep) -> list[Cell]:
    """Returns the known cells without a result."""
    return [cell for cell in make_plan(sweep).cells if sweep.results.read(cell) is None]


def check_cells(sweep: Sweep) -> None:
    """Checks the config of one cell of each group, as far as they are known.

    Raises:
      UserError: A config is wrong. The message names the group.
    """
    if sweep.config.dataset.path:
        raise UserError(
            "a comparison divides the splits of a TFDS dataset, and a folder has none; leave "
            "config.dataset.path unset"
        )
    if sweep.config.evaluation.train or sweep.config.evaluation.test:
        raise UserError(
            "a comparison evaluates on the dataset's own splits; leave config.evaluation.train and "
            "config.evaluation.test unset"
        )
    if sweep.config.seed + sweep.budget.kept_seeds >= FIRST_SEED:
        raise UserError(
            f"the final trainings have the seeds from {FIRST_SEED} on, which no search may use; "
            f"lower config.seed = {sweep.config.seed}"
        )
    if taken := sorted({method.name for method in sweep.methods} & {*REFERENCES}):
        raise UserError(f"--objectives: {taken[0]!r} is the name of a reference; rename yours")
    cells = make_plan(sweep, assume=True).cells
    for group, members in itertools.groupby(cells, lambda cell: cell.group):
        try:
            config_lib.validate(sweep.cell_config(next(members)))
        except UserError as error:
            raise UserError(f"{group}: {error}") from error


class _Planning:
    """Adds the cells and the rows of one claim after another."""

    def __init__(self, sweep: Sweep, assume: bool):
        self.cells: list[Cell] = []
        self.points: list[Point] = []
        self._sweep, self._assume, self._budget = sweep, assume, sweep.budget
        self._music = [method for method in sweep.methods if method.name in _MUSIC]
        self._rivals = [method for method in sweep.methods if method.name in _RIVALS]
        self._chosen = functools.cache(self._search_method)

    def claim_1(self) -> None:
        for method in self._sweep.methods:
            found = self._chosen(method)
            self._add(
                1, method.name, "", found, self._finals(method, found.best, self._sweep.seeds)
            )
        for name in REFERENCES:
            seeds = {"random_backbone": self._sweep.seeds, "supervised": self._study_seeds}
            count = seeds.get(name, 1)
            fields = {"num_epochs": self._sweep.final_epochs}
            cost = self._sweep.images.num_train * (
                self._sweep.final_epochs / 2 if name == "supervised" else 1
            )
            cells = [
                Cell(
                    f"final/{name}/{i:02d}", i, "reference", fields | {"seed": FIRST_SEED + i},
                    reference=name, cost=cost,
                )
                for i in range(count)
            ]  # fmt: skip
            self._add(1, name, "", None, cells)

    def claim_2(self) -> None:
        self._vary(2, "depth")

    def claim_3(self) -> None:
        self._vary(3, "dimension")

    def claim_4(self) -> None:
        sweep, budget, images = self._sweep, self._budget, self._sweep.images
        few = min(sweep.seeds, budget.few_seeds)
        default = sweep.config.batch_size
        others = (int(default * 4.0**power) for power in budget.batch_sizes)
        sizes = sorted({default, *(n for n in others if 2 <= n <= images.num_train // 8)})
        steps = sweep.epochs(budget.step_share) * (images.num_train // default)
        whole = f"{sweep.config.dataset.name}:{images.train}"
        for method in (*self._music, *self._rivals):
            for size in sizes:
                name = f"batch={size}/{method.name}"
                if size == default:
                    finals = self._finals(method, self._chosen(method).best, few)
                    self._add(4, method.name, size, self._chosen(method), finals, "equal epochs")
                else:
                    more: dict[str, Any] = {"fields": {"batch_size": size}, "seeds": few}
                    self._rate_study(4, method, size, name, {}, more, "equal epochs")
                # Within so few steps a small batch sees only a part of the images, in any order.
                seen = min(steps * size, images.num_train)
                fields = {"batch_size": size, "dataset.train_split": images.first(seen)}
                fields["evaluation.train"] = whole
                epochs = max(1, round(steps / (seen // size)))
                more = {"fields": fields, "epochs": epochs, "num_images": seen, "seeds": few}
                name = f"batch={size},steps={steps}/{method.name}"
                self._rate_study(4, method, size, name, {}, more, "equal steps")

    def claim_5(self) -> None:
        sweep, budget = self._sweep, self._budget
        for method in sweep.methods:
            found = self._chosen(method)
            for start in STARTS:
                name, cells = f"start={start}/{method.name}", []
                if found.best is not None:
                    choice = {**found.best, **_START_HEAD}
                    cells = [
                        sweep.make_cell(
                            name, i, method, choice, FIRST_SEED + i,
                            sweep.epochs(budget.search_share),
                            start=start if start != "random" else "",
                        )
                        for i in range(min(sweep.seeds, budget.few_seeds))
                    ]  # fmt: skip
                    found = dataclasses.replace(
                        found,
                        best=choice,
                        score=None,  # which is that of another head
                        at_edge=tuple(o for o in found.at_edge if o not in _START_HEAD),
                    )
                self._add(5, method.name, start, found, cells)

    def claim_6(self) -> None:
        for method in self._music:
            found = self._chosen(method)
            finals = self._finals(method, found.best, self._sweep.seeds)
            self._add(6, method.name, "", found, finals)

    @property
    def _study_seeds(self) -> int:
        return min(self._sweep.seeds, self._budget.study_seeds)

    def _add(
        self,
        claim: int,
        series: str,
        x: Any,
        found: Found | None,
        cells: list[Cell],
        group: str = "",
    ) -> None:
        self.cells += cells
        found = found or Found([], None)
        chosen = (found.best, found.score, found.at_edge)
        self.points.append(Point(claim, series, x, tuple(cells), *chosen, group))

    def _search_method(self, method: Method) -> Found:
        """Searches all options of a method."""

        def make_cell(name: str, index: int, choice: Choice, seed: int, share: float) -> Cell:
            epochs = self._sweep.epochs(share)
            return self._sweep.make_cell(name, index, method, choice, seed, epochs, kind="search")

        name = f"search/{method.name}"
        candidates = method.draw(self._budget.draws)
        return self._run(Search(
            name, candidates, list(method.all_options), True, make_cell,
            lambda choice: self._sweep.is_valid(make_cell(name, 0, choice, 0, 1.0)),
        ))  # fmt: skip

    def _run(self, search: Search) -> Found:
        read = self._sweep.results.read
        first_seed = self._sweep.config.seed
        found = run_search(search, self._budget, read, first_seed=first_seed)
        self.cells += found.cells
        if found.best is None and self._assume:
            if search.fresh:
                for i, choice in enumerate(search.candidates[: self._budget.kept]):
                    self.cells += again_cells(search, self._budget, i, choice, first_seed)
            return dataclasses.replace(found, best=search.candidates[0])
        return found

    def _finals(self, method: Method, choice: Choice | None, count: int) -> list[Cell]:
        if choice is None:
            return []
        name, epochs = f"final/{method.name}", self._sweep.final_epochs
        seeds = range(FIRST_SEED, FIRST_SEED + count)
        return [
            self._sweep.make_cell(name, i, method, choice, seed, epochs)
            for i, seed in enumerate(seeds)
        ]

    def _vary(self, claim: int, option: str) -> None:
        """Adds a row for each value of an option, each with its own learning rate."""
        music = self._music
        if len(music) > 1:  # the better one, which is not known before both are searched
            scores = [self._chosen(method).score for method in music]
            if None not in scores:
                music = [max(music, key=lambda method: self._chosen(method).score or 0.0)]
            elif not self._assume:
                return
            music = music[:1]
        for method in (*music, *self._rivals):
            found = self._chosen(method)
            for value in COMMON[option]:
                if found.best is not None and found.best[option] == value:
                    finals = self._finals(method, found.best, self._study_seeds)
                    self._add(claim, method.name, value, found, finals)
                else:
                    name = f"{option}={value}/{method.name}"
                    self._rate_study(claim, method, value, name, {option: value}, {})

    def _rate_study(
        self,
        claim: int,
        method: Method,
        x: Any,
        name: str,
        change: Choice,
        more: dict[str, Any],
        group: str = "",
    ) -> None:
        """Adds a row with some options changed, whose learning rate is searched again."""
        sweep, best = self._sweep, self._chosen(method).best
        if best is None:
            self._add(claim, method.name, x, None, [], group)
            return
        middle = (self._budget.rates - 1) / 2
        candidates = [
            {**best, **change, "learning_rate": float(f"{best['learning_rate'] * 2**power:.3g}")}
            for power in (i - middle for i in range(self._budget.rates))
        ]
        own_epochs, seeds = more.get("epochs"), more.get("seeds", self._study_seeds)
        more = {name: value for name, value in more.items() if name not in ("epochs", "seeds")}
        size = more.get("fields", {}).get("batch_size", sweep.config.batch_size)
        # A search is not so short that it consists of the warm-up.
        least = -(-2 * MIN_WARMUP_STEPS // (sweep.images.num_train // size))

        def make_cell(directory: str, i: int, choice: Choice, seed: int, share: float) -> Cell:
            epochs = min(max(sweep.epochs(share), least), sweep.final_epochs)
            epochs = own_epochs or epochs
            return sweep.make_cell(
                directory, i, method, choice, seed, epochs, kind="search", **more
            )

        search = Search(
            f"search/{name}",
            candidates,
            ["learning_rate"],
            False,
            make_cell,
            lambda _: True,
        )
        found = self._run(search)
        cells = []
        if found.best is not None:
            epochs = own_epochs or sweep.final_epochs
            cells = [
                sweep.make_cell(name, i, method, found.best, FIRST_SEED + i, epochs, **more)
                for i in range(seeds)
            ]
        self._add(claim, method.name, x, found, cells, group)
