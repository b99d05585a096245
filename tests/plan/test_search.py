"""The search for the largest batch, with memory models instead of a compiler."""

import pytest

from music_jax.plan.search import largest_batch

_UNIT = 4


@pytest.mark.parametrize("limit", [0, 1, 2, 31, 64, 65, 1000, 60_000])
@pytest.mark.parametrize("start", [1, 64, 2048])
@pytest.mark.parametrize("fixed", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("saved", [0.0, 0.2])
def test_the_largest_that_fits_is_found_to_within_3_percent_in_few_steps(
    limit, start, fixed, saved
):
    asked = []

    def memory_share(batch):
        assert batch % _UNIT == 0
        asked.append(batch)
        units = batch // _UNIT
        if units > limit:
            return 1.0 + (units - limit) / max(limit, 1)
        # Near the limit memory is saved, so that the need grows more slowly.
        share = fixed + (1 - fixed) * units / max(limit, 1)
        return min(share, 1 - saved + saved * units / max(limit, 1))

    found = largest_batch(memory_share, _UNIT, start * _UNIT)
    assert found % _UNIT == 0
    assert limit * _UNIT / 1.04 - _UNIT < found <= limit * _UNIT
    assert found == 0 or found in asked
    assert len(asked) == len(set(asked)) <= 20


def test_a_linear_need_takes_few_compilations():
    asked = []

    def memory_share(batch):
        asked.append(batch)
        return 0.1 + batch / 100_000

    assert 87_000 < largest_batch(memory_share, 32, 2048) <= 90_000
    assert len(asked) <= 8
