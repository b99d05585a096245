"""Maps a function over ranges of records on several threads."""

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

from music_jax.distributed import progress

_Result = TypeVar("_Result")

_RANGE_SIZE = 256


def map_ranges(
    function: Callable[[range], _Result],
    count: int,
    *,
    description: str,
    num_threads: int | None = None,
) -> list[_Result]:
    """Calls a function with consecutive ranges of indices on several threads.

    A progress bar appears after one second.

    Args:
      function: Function of a range of at most 256 indices.
      count: Number of indices.
      description: Text before the bar.
      num_threads: Number of threads; by default that of `ThreadPoolExecutor`.

    Returns:
      The results, in the order of the ranges.
    """
    ranges = [range(i, min(i + _RANGE_SIZE, count)) for i in range(0, count, _RANGE_SIZE)]
    results = []
    with (
        concurrent.futures.ThreadPoolExecutor(num_threads) as pool,
        progress.bar(count, unit="img", description=description, delay=1.0) as bar,
    ):
        for indices, result in zip(ranges, pool.map(function, ranges), strict=True):
            results.append(result)
            bar.update(len(indices))
    return results
