"""Functions that are mapped over ranges on threads."""

import time

import pytest

from music_jax.data.parallel import map_ranges


@pytest.mark.parametrize("count", [0, 1, 256, 257, 2000])
def test_results_come_in_the_order_of_the_ranges(count):
    def slowest_first(indices):
        time.sleep(0.02 / (1 + indices.start))
        return list(indices)

    found = map_ranges(slowest_first, count, description="numbers", num_threads=4)
    assert [number for numbers in found for number in numbers] == list(range(count))


def test_an_error_ends_the_work():
    started = []

    def fail(indices):
        started.append(indices)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        map_ranges(fail, 256 * 10_000, description="numbers", num_threads=1)
    assert len(started) < 10_000
