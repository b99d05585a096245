"""The features on disk: taken once, and never when they are damaged."""

import json

import numpy as np
import pytest
from etils import epath

from music_jax.evaluation.cache import ArrayCache, Expected, _checksum


class _Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {
            "features": np.arange(12, dtype=np.float32).reshape(3, 4),
            "labels": np.asarray([1, -1, 0], np.int32),
        }


_EXPECTED = {
    "features": Expected((5, 4), np.float32),
    "labels": Expected((5,), np.int32, range(-1, 2)),
}


def _get(directory, compute, key="a"):
    cache = ArrayCache(epath.Path(directory))
    return cache.get("test", {"step": key}, compute, expected=_EXPECTED)


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


def _header(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


def _sealed(change):
    """Damages an array and writes the checksum that it then has."""

    def damage(path):
        array = change(np.load(path))
        np.save(path, array)
        index = path.with_name("index.json")
        record = json.loads(index.read_text())
        record["crc32"][path.stem] = _checksum(array)
        index.write_text(json.dumps(record))

    return damage


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("features.npy", _flip),
        ("features.npy", lambda path: path.write_bytes(path.read_bytes()[:-8])),
        ("features.npy", lambda path: path.unlink()),
        ("features.npy", _pickle),
        ("labels.npy", lambda path: path.write_bytes(b"")),
        ("features.npy", _header(b"(", b")")),  # SyntaxError in NumPy
        ("features.npy", _header(b"(3, 4)", b"(3, 99999999999)")),
        ("features.npy", _sealed(lambda array: array[:2])),
        ("features.npy", _sealed(lambda array: array[:, :3])),
        ("features.npy", _sealed(lambda array: array[0, 0])),
        ("features.npy", _sealed(lambda array: array.astype(np.float16))),
        ("features.npy", _sealed(lambda array: np.tile(array, (2, 1)))),
        ("labels.npy", _sealed(lambda array: array + 1)),
        ("labels.npy", _sealed(lambda array: array - 1)),
        ("index.json", lambda path: path.write_text('{"crc32": {"features": 1}}')),
        ("index.json", lambda path: path.write_text('{"crc32": 5}')),
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
