"""Files that anyone may have written: they are read, or a `ValueError` says what is wrong."""

import io
import json
import struct

import numpy as np
import pytest

from music_jax.json_files import parse_json
from music_jax.npz_files import read_npz


def test_deep_json_is_refused_and_brackets_in_texts_are_not():
    for text in ("[" * 100_000, '{"a":' * 40 + "1" + "}" * 40, '["]", ' * 40 + "1" + "]" * 40):
        with pytest.raises(ValueError, match="nested more than 32"):
            parse_json(text)
    names = {"files": [f'[{{" \\ {i}.png' for i in range(100)]}
    assert parse_json(json.dumps(names)) == names
    with pytest.raises(ValueError, match="Unterminated"):
        parse_json("[" * 20 + '"' + '\\"[' * 200_000)


def _zip(**changes):
    """An .npz file, with fields of its first entry changed: at some offset, by two bytes."""
    file = io.BytesIO()
    np.savez(file, a=np.arange(1000), b=np.ones(3), c=np.asarray(7), d=np.eye(2, 3, order="F"))
    content = bytearray(file.getvalue())
    central = content.index(b"PK\x01\x02")
    for where, (local, entry) in {"method": (8, 10), "flags": (6, 8)}.items():
        if where in changes:
            struct.pack_into("<H", content, local, changes[where])
            struct.pack_into("<H", content, central + entry, changes[where])
    return bytes(content)


def test_all_arrays_of_an_npz_file_are_read(tmp_path):
    (tmp_path / "a.npz").write_bytes(_zip())
    found = read_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(found["a"], np.arange(1000))
    np.testing.assert_array_equal(found["b"], np.ones(3))
    assert found["c"] == 7
    np.testing.assert_array_equal(found["d"], np.eye(2, 3))


def _pickled():
    file = io.BytesIO()
    np.savez(file, a=np.asarray([{"a": 1}], object))
    return file.getvalue()


def _npy():
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        _zip()[:-30],
        _zip()[:40] + b"\xff" * 40 + _zip()[80:],  # zlib.error
        _zip(method=6),  # NotImplementedError
        _zip(flags=1),  # encrypted: RuntimeError
        _pickled(),
        _npy(),
    ],
    ids=["empty", "magic", "cut", "bits", "method", "encrypted", "pickle", "npy"],
)
def test_a_damaged_npz_file_is_a_value_error(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"it is no whole \.npz file: ."):
        read_npz(tmp_path / "a.npz")
