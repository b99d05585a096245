"""The features on disk: taken once, and never when they are damaged."""

import numpy as np
import pytest
from etils import epath

from music_jax.evaluation.cache import ArrayCache


class _Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"features": np.arange(12.0).reshape(3, 4), "labels": np.zeros(0, np.int32)}


def _get(directory, compute, key="a"):
    return ArrayCache(epath.Path(directory)).get("test", {"step": key}, compute)


def test_arrays_are_computed_once_a_key(tmp_path):
    compute = _Counting()
    for _ in range(2):
        found = _get(tmp_path, compute)
        np.testing.assert_array_equal(found["features"], np.arange(12.0).reshape(3, 4))
        assert found["labels"].dtype == np.int32
    assert compute.calls == 1
    _get(tmp_path, compute, "b")
    assert compute.calls == 2


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _pickle(path):
    np.save(path, np.asarray([{"a": 1}], object), allow_pickle=True)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("features.npy", _flip),
        ("features.npy", lambda path: path.write_bytes(path.read_bytes()[:-8])),
        ("features.npy", lambda path: path.unlink()),
        ("features.npy", _pickle),
        ("labels.npy", lambda path: path.write_bytes(b"")),
        ("index.json", lambda path: path.write_text("{")),
        ("index.json", lambda path: path.write_text("[]")),
        ("index.json", lambda path: path.write_text("[" * 100_000)),
        ("index.json", lambda path: path.unlink()),
    ],
)
def test_what_is_damaged_is_computed_again_and_mended(file, damage, tmp_path):
    compute = _Counting()
    _get(tmp_path, compute)
    damage(next(tmp_path.glob(f"*/{file}")))
    for _ in range(2):
        np.testing.assert_array_equal(_get(tmp_path, compute)["features"].ravel(), np.arange(12.0))
    assert compute.calls == 2


def test_where_nothing_can_be_kept_the_arrays_are_given_and_a_line_says_so(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    found = _get(tmp_path / "file", _Counting())
    assert found["features"].shape == (3, 4)
    assert "not kept" in capsys.readouterr().out
