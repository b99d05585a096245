"""Searches of a method's options: random choices, further ones at the ends, and fresh seeds."""

import dataclasses
from collections.abc import Callable, Sequence

from music_jax.claims.budget import Budget
from music_jax.claims.cells import Cell, Result
from music_jax.claims.methods import Choice, beyond

# From a directory, an index, a choice, a seed and a share of the epochs to the cell of a search.
MakeCell = Callable[[str, int, Choice, int, float], Cell]
ReadResult = Callable[[Cell], Result | None]


@dataclasses.dataclass(frozen=True)
class Search:
    """A search of some of a method's options.

    Attributes:
      name: Directory of its cells.
      candidates: Choices to try first.
      options: Options whose ranges are extended at their ends.
      fresh: Whether the best choices are trained again with fresh seeds, which then decide.
      make_cell: Function that makes its cells.
      is_valid: Function that returns whether a further choice can be trained.
    """

    name: str
    candidates: Sequence[Choice]
    options: Sequence[str]
    fresh: bool
    make_cell: MakeCell
    is_valid: Callable[[Choice], bool]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found so far.

    Attributes:
      cells: All cells that are known by now.
      best: The best choice; None until all cells have results.
      score: Its validation accuracy.
      at_edge: Options whose best value was the smallest or the largest that was tried.
    """

    cells: list[Cell]
    best: Choice | None
    score: float | None = None
    at_edge: tuple[str, ...] = ()


def run_search(search: Search, budget: Budget, read: ReadResult, *, first_seed: int) -> Found:
    """Returns the cells of a search that are known by now, and the best choice.

    Which cells there are depends only on the results of earlier ones, so that every process finds
    the same.

    Args:
      search: The search.
      budget: Sizes of the comparison.
      read: Function that returns the result of a cell, or None.
      first_seed: Seed of the first trainings; the following ones are fresh.
    """
    tried = list(search.candidates)
    for extension in range(budget.extensions + 1):
        cells = [
            search.make_cell(search.name, i, choice, first_seed, budget.search_share)
            for i, choice in enumerate(tried)
        ]
        scores = _scores(cells, read)
        if scores is None:
            return Found(cells, None)
        ranking = [i for _, i in sorted((-score, i) for i, score in enumerate(scores))]
        best, top1 = tried[ranking[0]], scores[ranking[0]]
        further = _further(search, tried, best)
        if not further or extension == budget.extensions:
            break
        tried += further
    if search.fresh and len(tried) > 1:
        kept = ranking[: budget.kept]
        again = [again_cells(search, budget, i, tried[i], first_seed) for i in kept]
        cells += [cell for those in again for cell in those]
        means = []
        for those in again:
            found = _scores(those, read)
            if found is None:
                return Found(cells, None)
            means.append(sum(found) / len(found))
        top1 = max(means)
        best = tried[kept[means.index(top1)]]
    at_edge = tuple(name for name in search.options if _next(search, tried, best, name) is not None)
    return Found(cells, best, top1, at_edge)


def again_cells(
    search: Search, budget: Budget, index: int, choice: Choice, first_seed: int
) -> list[Cell]:
    """Returns the trainings with fresh seeds of the choice with an index, if it is kept."""
    name = f"{search.name}/again={index:02d}"
    return [
        search.make_cell(name, j, choice, first_seed + 1 + j, budget.kept_share)
        for j in range(budget.kept_seeds)
    ]


def _scores(cells: list[Cell], read: ReadResult) -> list[float] | None:
    """Returns the validation accuracies, -1 for a divergence; None if one is missing."""
    results = [read(cell) for cell in cells]
    scores = [result.get("validation_top1", -1.0) for result in results if result is not None]
    return scores if len(scores) == len(cells) else None


def _next(search: Search, tried: list[Choice], best: Choice, option: str) -> Choice | None:
    value = beyond(option, [choice[option] for choice in tried], best[option])
    choice = None if value is None else {**best, option: value}
    return choice if choice and search.is_valid(choice) else None


def _further(search: Search, tried: list[Choice], best: Choice) -> list[Choice]:
    """Returns the choices that differ from the best one in a value beyond those tried."""
    found = [_next(search, tried, best, option) for option in search.options]
    return [choice for choice in found if choice is not None and choice not in tried]
