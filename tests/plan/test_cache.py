"""Figures that are kept, and when they are not taken for those of another program."""

import dataclasses

import pytest

from music_jax.plan import cache
from music_jax.workdir.user_directories import cache_directory


@dataclasses.dataclass
class _Figures:
    size: int
    parts: list[str]


def _ask(program="a program", chips="v5e:2x2", size=1):
    made = []

    def make():
        made.append(size)
        return _Figures(size, ["all"])

    return cache.remember(program, chips, make, _Figures), bool(made)


def test_the_same_is_made_once():
    assert _ask(size=1) == (_Figures(1, ["all"]), True)
    assert _ask(size=2) == (_Figures(1, ["all"]), False)


@pytest.mark.parametrize("other", [{"program": "another"}, {"chips": "v5e:2x4"}])
def test_another_program_or_slice_is_made_anew(other):
    _ask(size=1)
    assert _ask(size=2, **other) == (_Figures(2, ["all"]), True)


def test_another_compiler_makes_it_anew(monkeypatch):
    _ask(size=1)
    monkeypatch.setattr(cache, "_version", lambda package: "99")
    assert _ask(size=2) == (_Figures(2, ["all"]), True)


@pytest.mark.parametrize("damage", ["", "{", '{"size": 1}', "[1]", "\0"])
def test_a_damaged_file_is_made_anew(damage):
    _ask(size=1)
    (file,) = cache_directory("plan").iterdir()
    file.write_text(damage)
    assert _ask(size=2) == (_Figures(2, ["all"]), True)
    assert _ask(size=3) == (_Figures(2, ["all"]), False)


def test_where_nothing_can_be_kept_it_is_made_each_time(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _ask(size=1)[1]
    assert _ask(size=2)[1]
