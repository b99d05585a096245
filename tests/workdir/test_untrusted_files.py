"""Files that anyone may have written are read, or raise a ValueError with the reason."""

import io
import json
import os
import pathlib
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from etils import epath

from music_jax.workdir.files import parse_json, read_json, read_npy, read_npz, read_text


def test_deeply_nested_json_is_refused_but_not_brackets_in_strings():
    for text in ("[" * 100_000, '{"a":' * 40 + "1" + "}" * 40, '["]", ' * 40 + "1" + "]" * 40):
        with pytest.raises(ValueError, match="nested more than 32"):
            parse_json(text)
    names = {"files": [f'[{{" \\ {i}.png' for i in range(100)]}
    assert parse_json(json.dumps(names)) == names
    with pytest.raises(ValueError, match="Unterminated"):
        parse_json("[" * 20 + '"' + '\\"[' * 200_000)


@pytest.mark.parametrize("digits", ["9" * 400, "9" * 5000, str(2**63), str(-(2**63) - 1)])
def test_integers_of_more_than_64_bits_are_refused(digits):
    with pytest.raises(ValueError, match=r"more than 64 bits|integer string conversion"):
        parse_json(f'{{"step": [{digits}]}}')


def test_numbers_within_64_bits_are_parsed():
    text = f"[{2**63 - 1}, {-(2**63)}, 0, -5, 1.5, 1e300]"
    assert parse_json(text) == [2**63 - 1, -(2**63), 0, -5, 1.5, 1e300]


def test_only_surrogates_that_stand_for_bytes_are_parsed():
    for text in (r'"\ud800"', r'{"\uDfFf": 1}', r'["a", "\ude00\ud83d"]', r'"\udc7f"'):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            parse_json(text)
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert parse_json(json.dumps([name, "\U0001f600"])) == [name, "\U0001f600"]


@pytest.mark.parametrize(
    "make", [os.mkfifo, pathlib.Path.mkdir, lambda p: p.symlink_to("/dev/zero")]
)
def test_pipes_directories_and_devices_are_not_read(make, tmp_path):
    make(tmp_path / "x")
    for read in (read_json, read_text, read_npz):
        with pytest.raises(OSError, match="is not a regular file"):
            read(epath.Path(tmp_path / "x"))


def test_files_beyond_the_limit_are_not_read(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)  # takes no room
    for read in (read_json, read_text, read_npz):
        with pytest.raises(OSError, match="larger than the 64 MiB that it may have"):
            read(epath.Path(tmp_path / "x"))


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
    with pytest.raises(ValueError, match=r"it is not a valid \.npz file: ."):
        read_npz(tmp_path / "a.npz")


def _entry(shape, descr="<i8", content=b""):
    header = io.BytesIO()
    described = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue() + content


_BOMBS = {
    "declared": _entry((1 << 30,)),
    "product": _entry((1 << 20, 1 << 20, 1 << 20)),
    "no bytes": _entry((0, 1 << 62)),
    "negative": _entry((-1,), content=bytes(8)),
    "object": _entry((1,), "|O", bytes(8)),
    "text": _entry((1,), "<U1000000000"),
    "other order": _entry((1,), ">i8", bytes(8)),
    "header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(1000),
    "brackets": b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000,
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("content", _BOMBS.values(), ids=_BOMBS)
def test_arrays_with_false_headers_take_no_memory(content, compression, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("a.npy", content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"it is not a valid \.npz file: ."):
        read_npz(tmp_path / "a.npz")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["inflated", "repeated", "many"])
def test_archives_larger_than_their_file_are_refused_before_reading(kind, tmp_path):
    compression = zipfile.ZIP_DEFLATED if kind == "inflated" else zipfile.ZIP_STORED
    large = _entry((1 << 20,), content=bytes(8 << 20))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        for i in range(100 if kind == "many" else 1):
            archive.writestr(
                f"{i}.npy", _entry((1,), content=bytes(8)) if kind == "many" else large
            )
        if kind == "repeated":  # several entries that are the same bytes of the file
            archive.filelist *= 30
    # Newer versions of zipfile refuse entries of the same bytes themselves.
    refused = r"bytes are more than|more than 64 arrays|Overlapped entries"
    with pytest.raises(ValueError, match=refused):
        read_npz(tmp_path / "a.npz")


def test_an_array_is_read_from_a_file_with_short_reads():
    class Slow(io.BytesIO):
        """As those of buckets are: no `readinto`, and fewer bytes than were asked for."""

        readinto = None

        def read(self, size=-1):
            return super().read(min(size, 7) if size > 100 else size)

    content = io.BytesIO()
    np.lib.format.write_array(content, np.arange(100.0))
    array = read_npy(Slow(content.getvalue()), max_bytes=800)
    np.testing.assert_array_equal(array, np.arange(100.0))
    with pytest.raises(ValueError, match="EOF: reading array data"):
        read_npy(Slow(content.getvalue()[:-1]), max_bytes=800)
