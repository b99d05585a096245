"""Answers that come too late are passed over, and nothing else is."""

import sys
import types

import pytest

from music_jax.checkpoint.late_answers import ignore_late_answers


@pytest.fixture
def told(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    return heard


def _raised(error):
    unraisable = types.SimpleNamespace(exc_value=error, exc_type=type(error), exc_traceback=None)
    sys.unraisablehook(unraisable)
    return unraisable


def test_only_answers_to_a_closed_loop_are_passed_over(told):
    for _ in range(3):
        ignore_late_answers()
    _raised(RuntimeError("Event loop is closed"))
    others = [_raised(RuntimeError("another")), _raised(ValueError("Event loop is closed"))]
    assert told == others
