"""WebDataset tars: samples, labels, hostile and damaged tars, and packing them."""

import gzip
import io
import json
import os
import tarfile

import cv2
import numpy as np
import pytest
from etils import epath
from processes import run

from music_jax.data import tar_source
from music_jax.data.datasets import open_path
from music_jax.data.decode import decode
from music_jax.data.file_patterns import expand
from music_jax.data.packing import Packing, pack
from music_jax.data.tar_source import open_tars
from music_jax.distributed.shares import Share
from music_jax.errors import UndecodableError, UnusableDataError, UserError


def _png(value, suffix=".png"):
    return cv2.imencode(suffix, np.full((8, 8, 3), value, np.uint8))[1].tobytes()


def _write_tar(path, files, **options):
    """Writes a tar of (name, content); content is bytes, or a TarInfo without content."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info is content:
                info.name = name
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _special(kind, link=""):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, link
    return info


def _open(pattern, **keys):
    return open_tars(str(pattern), **{"image_key": None, "label_key": None} | keys)


def _values(source):
    return [
        (int(decode(source.example(i)[0], 3)[0, 0, 0]), source.example(i)[1])
        for i in range(len(source))
    ]


def test_samples_are_those_of_webdataset_in_order(tmp_path):
    first = [
        ("a/0001.cls", b"3\n"),
        ("a/0001.png", _png(1)),
        ("a/0001.txt", b"a caption"),
        ("a/0002.JPG", _png(2, ".jpg")),
        ("a/0002.json", json.dumps({"label": 1}).encode()),
        ("a.b/0003.npy", b"features"),
        ("a.b/0003.seg.png", _png(99)),  # its extension is seg.png
        ("a.b/0003.png", _png(3)),
        ("README", b"no extension"),
        ("only/text.txt", b"no image"),
        ("x" * 300 + "/0004.jfif", _png(4, ".jpg")),
    ]
    second = [("0001.png", _png(5)), ("0001.cls", b"0"), ("0001.png", _png(6))]
    _write_tar(tmp_path / "s-00.tar", first, format=tarfile.PAX_FORMAT)
    _write_tar(tmp_path / "s-01.tar", second, format=tarfile.GNU_FORMAT)
    source = _open(tmp_path / "s-{00..01}.tar")
    assert _values(source) == [(1, 3), (2, 1), (3, -1), (4, -1), (5, 0), (6, -1)]
    assert source.num_classes == 4
    assert source.record_name(2) == "s-00.tar:a.b/0003.png"
    assert [value for value, _ in _values(_open(tmp_path / "*.tar", image_key="seg.png"))] == [99]
    by_field = _open(tmp_path / "s-00.tar", label_key="label")
    assert _values(by_field) == [(1, -1), (2, 1), (3, -1), (4, -1)]
    with pytest.raises(UserError, match=r"no images with the extension 'gif'.*'jpg'.*--image_key"):
        _open(tmp_path / "s-00.tar", image_key="gif")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_are_found_where_tarfile_finds_them(tmp_path, format):
    rng = np.random.default_rng(format)
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for i in range(60):
            parts = ["a" * int(rng.integers(1, 90)), "bé"[i % 2] * int(rng.integers(1, 45))]
            longer = [] if format == tarfile.USTAR_FORMAT else ["c" * int(rng.integers(1, 200))]
            info = tarfile.TarInfo("/".join([*longer, *parts])[:250] + ".png")
            info.size = int(rng.choice([0, 1, 511, 512, 513, 1025, 3000]))
            info.mtime = 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(rng.bytes(info.size)))
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
    assert len(expected) == 60
    with open(tmp_path / "a.tar", "rb") as file:
        found = list(tar_source._files(file.fileno(), os.path.getsize(tmp_path / "a.tar")))
    assert [(name.decode(), offset, size) for name, offset, size in found] == expected


def test_labels_that_are_texts_become_classes(tmp_path):
    files = [("0.png", _png(0)), ("0.cls", b"owl"), ("1.png", _png(1)), ("1.cls", b"ant")]
    _write_tar(tmp_path / "a.tar", files)
    source = _open(tmp_path / "a.tar")
    assert source.class_names == ("ant", "owl")
    assert source.labels().tolist() == [1, 0]
    files = [("0.png", _png(0)), ("0.json", b'{"label": [1, 3]}'), ("1.png", _png(1))]
    _write_tar(tmp_path / "b.tar", [*files, ("2.png", _png(2)), ("2.json", b'{"label": []}')])
    source = _open(tmp_path / "b.tar")
    assert source.multi_label
    assert source.labels().tolist() == [[0, 1, 0, 1], [-1] * 4, [0] * 4]
    _write_tar(tmp_path / "c.tar", [("0.png", _png(0)), ("0.cls", b"123456789012")])
    assert "is not the number of a class" in _open(tmp_path / "c.tar").no_classes


def test_names_and_links_in_a_tar_lead_nowhere(tmp_path, outside):
    before = sorted(path for path in tmp_path.rglob("*"))
    run_directory = tmp_path / "run"
    _write_tar(
        run_directory / "hostile.tar",
        [
            ("/etc/absolute.png", _png(1)),
            ("../../outside/file.png", _png(2)),
            ("link.png", _special(tarfile.SYMTYPE, str(outside))),
            ("hard.png", _special(tarfile.LNKTYPE, str(outside))),
            ("fifo.png", _special(tarfile.FIFOTYPE)),
            ("device.png", _special(tarfile.CHRTYPE)),
            ("directory.png", _special(tarfile.DIRTYPE)),
            ("last.png", _png(3)),
        ],
    )
    source = _open(run_directory / "hostile.tar")
    assert [value for value, _ in _values(source)] == [1, 2, 3]
    after = sorted(path for path in tmp_path.rglob("*"))
    assert after == sorted([*before, run_directory / "hostile.tar"])


def test_a_huge_file_or_name_in_a_tar_is_not_read_into_memory(tmp_path):
    _write_tar(tmp_path / "a.tar", [("ok.png", _png(1))])
    with open(tmp_path / "a.tar", "r+b") as file:  # a sparse file of 600 MB
        file.seek(-file.seek(0, os.SEEK_END) % 512 + 1024)
        info = tarfile.TarInfo("large.png")
        info.size = 600_000_000
        file.write(info.tobuf())
        file.truncate(file.tell() + info.size + 2048)
    source = _open(tmp_path / "a.tar")
    assert source.example(0)[0] == _png(1)
    with pytest.raises(UndecodableError, match=r"its 600,000,000 bytes are more than"):
        source.example(1)
    with open(tmp_path / "b.tar", "wb") as file:
        info = tarfile.TarInfo("name")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 32
        file.write(info.tobuf())
        file.truncate(1 << 33)
    with pytest.raises(UnusableDataError, match=r"is no tar, or is damaged.*a header of"):
        _open(tmp_path / "b.tar")


def test_tars_that_were_joined_are_read_to_the_end(tmp_path):
    for name, values in (("a", [1, 2]), ("b", [3])):
        _write_tar(tmp_path / f"{name}.tar", [(f"{name}{i}.png", _png(i)) for i in values])
    joined = b"".join((tmp_path / f"{name}.tar").read_bytes() for name in "ab")
    for rest in (b"", bytes(4096), b"something else" * 100):
        (tmp_path / "c.tar").write_bytes(joined + rest)
        assert [value for value, _ in _values(_open(tmp_path / "c.tar"))] == [1, 2, 3]


def test_a_tar_whose_header_has_a_negative_size_is_refused(tmp_path):
    info = tarfile.TarInfo("0.png")
    header = bytearray(info.tobuf())
    header[124:136] = b"-0000001000\0"  # minus one block: the next header would be this one
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(UnusableDataError, match=r"a header holds the number -512"):
        _open(tmp_path / "a.tar")


@pytest.mark.parametrize("damage", ["truncated", "header", "other", "empty"])
def test_a_damaged_tar_is_an_error_that_names_it(tmp_path, damage):
    path = tmp_path / "a.tar"
    _write_tar(path, [(f"{i}.png", _png(i)) for i in range(5)])
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: 3 * 1024 + 600]
    elif damage == "header":
        content[3 * 1024 + 20] ^= 1
    else:
        content = b"" if damage == "empty" else b"something else" * 100
    path.write_bytes(content)
    with pytest.raises(UnusableDataError, match=r"a\.tar' is no tar, or is damaged after \d files"):
        _open(path)


@pytest.mark.parametrize("name", ["BZ_001.png", "BZh9.png", "BZ/1.png"])
def test_a_tar_is_not_taken_for_a_compressed_one_by_the_name_of_its_first_file(tmp_path, name):
    _write_tar(tmp_path / "a.tar", [(name, _png(0))])
    assert len(_open(tmp_path / "a.tar")) == 1


def test_compressed_tars_and_missing_ones_are_errors(tmp_path):
    _write_tar(tmp_path / "a.tar", [("0.png", _png(0))])
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(UserError, match=r"is compressed with gzip.*decompress it first"):
        _open(tmp_path / "a.tar.gz")
    with pytest.raises(UserError, match=r"there is no file '.*b\.tar'"):
        _open(tmp_path / "{a,b}.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("*.gif", "pipe.tar", "pipe:cat a.tar", ""):
        with pytest.raises(UserError, match=r"there is no file|no file matches"):
            expand(str(tmp_path / name))


def test_patterns_are_expanded_as_in_a_shell(tmp_path):
    for name in ("x-008", "x-009", "x-010", "y-a", "y-b", "d/z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(pattern):
        return [os.path.relpath(file, tmp_path) for file in expand(f"{tmp_path}/{pattern}")]

    assert names("x-{008..010}") == ["x-008", "x-009", "x-010"]
    assert names("y-{b,a}") == ["y-b", "y-a"]
    assert names("{x,y}-*") == ["x-008", "x-009", "x-010", "y-a", "y-b"]
    assert names("**/z") == ["d/z"]
    with pytest.raises(UserError, match="stands for more than 1,000,000 files"):
        expand("{0..9999}{0..9999}")


def test_tars_are_packed_by_workers_as_by_one(tmp_path):
    for k in range(3):
        files = [
            (f"{i}.{end}", part)
            for i in range(k, 10 + k)
            for end, part in (
                ("png", b"broken" if i == 4 else _png(10 * k + i)),
                ("cls", b"%d" % (i % 3)),
            )
        ]
        _write_tar(tmp_path / f"s-{k}.tar", files)
    source = _open(tmp_path / "s-*.tar")
    packing = Packing(shard_size=7, shorter_side=8)
    for share in (Share(1, 2), Share(0, 2)):
        pack(source, epath.Path(tmp_path / "packed"), packing, share=share, max_skipped_share=0.2)
    packed = open_path(str(tmp_path / "packed"))
    assert packed.class_names == ("0", "1", "2")
    kept = [i for i in range(30) if source.example(i)[0] != b"broken"]
    assert len(kept) == 27
    assert [packed.example(i) for i in range(27)] == [source.example(i) for i in kept]
    lines = map(json.loads, (tmp_path / "packed" / "skipped.jsonl").read_text().splitlines())
    assert {line["image"] for line in lines} == {f"s-{k}.tar:4.png" for k in range(3)}
    code, out, err = run(
        "music_jax.pack",
        f"--source=wds:{tmp_path}/s-{{0..2}}.tar",
        f"--output={tmp_path / 'other'}",
        "--max_skipped_share=0.2",
    )
    assert code == 0, err
    assert "holds 27 images" in out
    code, _, err = run(
        "music_jax.pack",
        f"--source=wds:{tmp_path}/s-{{0..2}}.tar",
        f"--output={tmp_path / 'bands'}",
        *("--encoding=npy", "--channels=4"),
    )
    assert code == 2
    assert "it has 3 channels, not 4" in err
    assert "set --channels and --pixel_type, now 4 and uint8, to those of the images" in err
