"""The cache of the costs of compiled steps."""

import types

import pytest

from music_jax.plan import costs
from music_jax.workdir.directory import user_directory


def _cached(program="a program", chips="v5e:2x2", size=1):
    """Asks the cache; returns the size that it gives and whether it was made now."""
    made = []

    def make():
        made.append(size)
        return costs.StepCost(size, size, fits=False, hbm_available_bytes=1.0)

    return costs.cached(costs.cache_key(program, chips), make).chips, bool(made)


def test_the_same_program_is_compiled_once():
    assert _cached(size=1) == (1, True)
    assert _cached(size=2) == (1, False)


@pytest.mark.parametrize("other", [{"program": "another"}, {"chips": "v5e:2x4"}])
def test_another_program_or_slice_is_not_in_the_cache(other):
    _cached(size=1)
    assert _cached(size=2, **other) == (2, True)


def test_results_of_another_compiler_are_not_taken(monkeypatch):
    _cached(size=1)
    another = types.SimpleNamespace(name="libtpu", version="99")
    monkeypatch.setattr(costs.importlib.metadata, "distributions", lambda: [another])
    assert _cached(size=2) == (2, True)


@pytest.mark.parametrize("damage", ["", "{", '{"size": 1}', "[1]", "\0"])
def test_a_damaged_cache_file_is_replaced(damage):
    _cached(size=1)
    (file,) = user_directory("cache", "plan").iterdir()
    file.write_text(damage)
    assert _cached(size=2) == (2, True)
    assert _cached(size=3) == (2, False)


def test_without_a_writable_cache_everything_is_compiled(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _cached(size=1) == (1, True)
    assert _cached(size=2) == (2, True)
