"""Packing: its output, reading it like a folder, and resuming after a kill."""

import json
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from listed_records import list_source
from mixed_images import write_mixed
from processes import ROOT, run, start

from music_jax.data import packing
from music_jax.data.datasets import open_path
from music_jax.data.decode import decode
from music_jax.data.folder import open_folder
from music_jax.data.packed import largest_chunk
from music_jax.data.packing import Packing, pack
from music_jax.distributed.shares import ALL, Share, parse_share
from music_jax.errors import UndecodableError, UnusableDataError, UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return folder, write_mixed(folder, 40, broken_every=9)


def _pack(photos, directory, share=ALL, **fields):
    packing = Packing(**{"shorter_side": 24, "shard_size": 16} | fields)
    source = open_folder(str(photos))
    return pack(source, epath.Path(directory), packing, share=share, max_skipped_share=0.2)


def _contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("encoding", "tolerance"), [("raw", 10), ("jpeg", 40)])
def test_packed_images_are_those_of_the_folder_smaller_in_the_same_order(
    photos, tmp_path, encoding, tolerance
):
    folder, broken = photos
    assert _pack(folder, tmp_path / "packed", encoding=encoding) == 40 - len(broken)
    whole, packed = open_folder(str(folder)), open_path(str(tmp_path / "packed"))
    assert packed.class_names == ("bright", "dark")
    kept = [i for i in range(40) if whole.record_name(i) not in broken]
    assert len(packed) == len(kept)
    for i, key in enumerate(kept):
        (encoded, label), (small, small_label) = whole.example(key), packed.example(i)
        assert small_label == label
        image = decode(small, 3)
        assert image.shape == (24, 32, 3)
        averaged = decode(encoded, 3).reshape(24, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(image - averaged).max() <= tolerance
    lines = (tmp_path / "packed" / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["image"] for line in lines} == broken
    files = sorted(path.name for path in (tmp_path / "packed").iterdir())
    shards = [f"images-{k:05d}-of-00003.array_record" for k in range(3)]
    assert files == [*shards, "index.json", "skipped.jsonl"]


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_images_of_many_channels_are_packed_as_arrays(dtype, tmp_path):
    images = np.random.default_rng(0).normal(900, 90, (5, 24, 48, 13)).astype(dtype)
    records = [{"image": image, "label": i} for i, image in enumerate(images)]
    source = list_source("bands", records, num_classes=5, class_names=tuple("abcde"))
    packing = Packing(12, "npy", channels=13, pixel_type=dtype, shard_size=3)
    directory = epath.Path(tmp_path / "packed")
    assert pack(source, directory, packing) == 5
    packed = open_path(str(directory))
    for i, image in enumerate(images):
        content, label = packed.example(i)
        means = image.reshape(12, 2, 24, 2, 13).astype(np.float64).mean(axis=(1, 3))
        found = decode(content, 13, dtype=dtype)
        np.testing.assert_allclose(found, means, atol=1 if dtype == "uint16" else 1e-3)
        assert label == i
    for options in ({"channels": 13}, {"pixel_type": dtype}, {"encoding": "raw", "channels": 2}):
        with pytest.raises(UserError, match="or any with --encoding=npy"):
            Packing(**options)


def test_files_of_small_images_are_packed_unchanged(photos, tmp_path):
    folder, broken = photos
    _pack(folder, tmp_path / "packed", shorter_side=48)
    whole, packed = open_folder(str(folder)), open_path(str(tmp_path / "packed"))
    kept = [i for i in range(len(whole)) if whole.record_name(i) not in broken]
    assert {whole.record_name(i)[-4:] for i in kept} >= {".jpg", ".png", ".bmp"}
    assert [packed.example(i) for i in range(len(packed))] == [whole.example(i) for i in kept]


def test_packing_replaced_images_into_the_same_directory_is_an_error(tmp_path):
    write_mixed(tmp_path / "photos", 20, broken_every=100)
    _pack(tmp_path / "photos", tmp_path / "packed")
    index = json.loads((tmp_path / "packed" / "index.json").read_text())
    write_mixed(tmp_path / "photos", 20, broken_every=100, seed=1)
    for complete in (True, False):
        (tmp_path / "packed" / "index.json").write_text(json.dumps(index | {"complete": complete}))
        with pytest.raises(UserError, match=r"images of .*photos have changed since .*packed"):
            _pack(tmp_path / "photos", tmp_path / "packed")


def test_packing_again_does_nothing_unless_settings_differ(photos, tmp_path):
    _pack(photos[0], tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert _pack(photos[0], tmp_path) == 36
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with pytest.raises(UserError, match=r"different settings.*quality: 90"):
        _pack(photos[0], tmp_path, quality=80)


def test_another_spelling_of_the_folder_resumes_and_another_folder_is_an_error(
    photos, tmp_path, monkeypatch
):
    folder, broken = photos
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    name = first = folder.name
    _pack(f"{name}/", tmp_path)
    for path in (name, f"{name}/", f"./{name}", f"{name}/bright/..", f"~/{name}", folder):
        index = json.loads((tmp_path / "index.json").read_text())
        assert index["source"] == first
        (tmp_path / "index.json").write_text(json.dumps(index | {"complete": False}))
        assert _pack(path, tmp_path) == 36
    lines = list(map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines()))
    assert len(lines) == len(broken)
    assert {line["source"] for line in lines} == {first}
    with pytest.raises(UserError, match=r"different settings.*source: "):
        _pack(f"{name}/bright", tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index | {"source": 3}))
    with pytest.raises(UserError, match=r"different settings.*source: 3"):
        _pack(name, tmp_path)


def test_partly_packed_images_are_not_read_until_packing_is_resumed(photos, tmp_path):
    _pack(photos[0], tmp_path / "whole")
    (tmp_path / "part").mkdir()
    for name in ("images-00000-of-00003.array_record", "index.json"):
        (tmp_path / "part" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    index = json.loads((tmp_path / "part" / "index.json").read_text())
    index |= {"complete": False, "shards": []}
    (tmp_path / "part" / "index.json").write_text(json.dumps(index))
    half = (tmp_path / "part" / "images-00000-of-00003.array_record").read_bytes()[:500]
    (tmp_path / "part" / "images-00000-of-00003.array_record").write_bytes(half)
    with pytest.raises(UserError, match="not fully packed"):
        open_path(str(tmp_path / "part"))
    _pack(photos[0], tmp_path / "part")
    whole, part = open_path(str(tmp_path / "whole")), open_path(str(tmp_path / "part"))
    assert [part.example(i) for i in range(len(part))] == [
        whole.example(i) for i in range(len(whole))
    ]


def test_shares_give_what_one_call_gives_whatever_their_number_and_order(photos, tmp_path):
    _pack(photos[0], tmp_path / "whole", shard_size=4)
    shared = tmp_path / "shared"
    for share in (Share(2, 3), Share(0, 3)):
        assert _pack(photos[0], shared, share, shard_size=4) is None
    assert {"skipped.jsonl", "skipped.process_2.jsonl"} <= {p.name for p in shared.iterdir()}
    with pytest.raises(UserError, match="is not fully packed: it has 7 of 10 shards; rerun"):
        open_path(str(shared))
    (shared / "images-00005-of-00010.array_record").write_bytes(b"damaged")
    assert _pack(photos[0], shared, Share(0, 3), shard_size=4) is None
    assert _pack(photos[0], shared, Share(1, 2), shard_size=4) is None
    assert _pack(photos[0], shared, Share(0, 2), shard_size=4) == 36
    found, expected = _contents(shared), _contents(tmp_path / "whole")
    lines = [set(files.pop("skipped.jsonl").splitlines()) for files in (found, expected)]
    assert lines[0] == lines[1]
    assert found == expected
    assert _pack(photos[0], shared, Share(1, 3), shard_size=4) == 36
    with pytest.raises(UserError, match="different settings"):
        _pack(photos[0], shared, Share(1, 3), shard_size=5)


def test_all_shares_together_skip_at_most_the_allowed_share(photos, tmp_path):
    source = open_folder(str(photos[0]))

    def share(index, limit):
        packing = Packing(shorter_side=24, shard_size=4)
        return pack(
            source, epath.Path(tmp_path), packing, share=Share(index, 2), max_skipped_share=limit
        )

    assert share(0, 0.07) is None  # 2 of 40
    with pytest.raises(UnusableDataError, match="of the 40 images"):
        share(1, 0.07)
    with pytest.raises(UserError, match="is not fully packed"):
        open_path(str(tmp_path))


@pytest.mark.parametrize("removed", ["shard", "index"])
def test_a_worker_goes_on_if_another_one_removes_its_temporary_files(
    removed, photos, tmp_path, monkeypatch
):
    folder, broken = photos
    function, others = {"shard": "_write_shard", "index": "write_json"}[removed], []
    write = getattr(packing, function)

    def interrupted(path, *given):
        if others or (removed == "index" and not given[0]["complete"]):
            write(path, *given)
        else:  # the same worker is started again, and is faster
            others.append("")
            others.append(_pack(folder, tmp_path / "packed"))
            raise FileNotFoundError(".new-1 was removed")

    monkeypatch.setattr(packing, function, interrupted)
    assert _pack(folder, tmp_path / "packed") == 40 - len(broken) == others[1]


def test_images_that_are_packed_without_labels_are_said_to_be(tmp_path, capsys):
    records = [{"image": np.zeros((8, 8, 3), np.uint8)}]
    source = list_source("a", records, no_classes="its labels are floats")
    assert pack(source, epath.Path(tmp_path / "packed"), Packing()) == 1
    assert "packed without labels: its labels are floats" in capsys.readouterr().out


@pytest.mark.parametrize("worker", ["2/2", "1", "-1/2", "0/0", "1/2/3", "a/b"])
def test_invalid_workers_are_errors(worker):
    with pytest.raises(UserError, match="must be I/N, such as 0/4"):
        parse_share(worker)


@pytest.mark.parametrize(
    "damage",
    [
        "not json",
        json.dumps({"format": "other"}),
        json.dumps(
            {
                "format": "music_jax packed images, version 1",
                "complete": True,
                "class_names": [],
                "shards": [{"file": "../../etc/passwd", "images": 3}],
            }
        ),
    ],
)
def test_a_damaged_index_is_an_error(tmp_path, damage):
    (tmp_path / "index.json").write_text(damage)
    with pytest.raises(UserError, match="is no index of packed images"):
        open_path(str(tmp_path))


def test_a_directory_with_other_files_is_refused(photos, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not empty"):
        _pack(photos[0], tmp_path)


def test_too_many_broken_images_are_an_error(photos, tmp_path):
    with pytest.raises(UnusableDataError, match="of the 40 images"):
        pack(open_folder(str(photos[0])), epath.Path(tmp_path), Packing(), max_skipped_share=0.05)


@pytest.mark.parametrize("fields", [{"shorter_side": 0}, {"quality": 101}, {"encoding": "png"}])
def test_invalid_settings_are_errors(fields):
    with pytest.raises(UserError, match=f"--{next(iter(fields))} must be"):
        Packing(**fields)


def test_a_record_that_would_fill_the_memory_is_not_read(photos, tmp_path):
    _pack(photos[0], tmp_path / "packed")
    shard = tmp_path / "packed" / "images-00001-of-00003.array_record"
    count = len(open_path(str(tmp_path / "packed")))
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    shards = json.loads((tmp_path / "packed" / "index.json").read_text())["shards"]
    for _ in range(shards[1]["images"] - 1):
        writer.write(b"small")
    bomb = bytes(2**29 + 5)  # a byte more than an image with its label may have
    writer.write(bomb)
    writer.close()
    assert shard.stat().st_size < 1e6
    source = open_path(str(tmp_path / "packed"))
    assert len(source) == count
    first = shards[0]["images"]
    for index in range(first, first + shards[1]["images"]):
        with pytest.raises(UndecodableError, match="its shard has a record of 536,870,9"):
            source.example(index)
    assert decode(source.example(0)[0], 3).shape == (24, 32, 3)
    assert decode(source.example(count - 1)[0], 3).shape == (24, 32, 3)


@pytest.mark.parametrize("options", ["group_size:1", "group_size:3", "group_size:1,uncompressed"])
def test_the_largest_chunk_is_found_wherever_blocks_begin(options, tmp_path):
    rng = np.random.default_rng(0)
    sizes = [0, 1, 65_496, 65_472, 65_512, 65_536, 130_000, 200_000, 20, 3]
    for shift in range(0, 60, 7):
        path = str(tmp_path / f"{shift}")
        writer = ArrayRecordWriter(path, options)
        for size in (shift, *sizes):
            writer.write(rng.bytes(size))
        writer.write(bytes(3_000_000))
        writer.close()
        assert 3_000_000 <= largest_chunk(path) <= 3_000_000 + 330_000


@pytest.mark.slow
def test_killed_workers_side_by_side_resume_and_write_the_same_files(photos, tmp_path):
    def arguments(output, worker):
        return (
            "music_jax.pack",
            f"--source={photos[0]}",
            f"--output={output}",
            "--shorter_side=24",
            "--shard_size=1",
            "--max_skipped_share=0.2",
            f"--worker={worker}",
        )

    code, out, err = run(*arguments(tmp_path / "whole", "0/1"))
    assert code == 0, err
    assert "holds 36 images; train on them with --config.dataset.path=" in out
    shared = tmp_path / "shared"
    workers = [start(*arguments(shared, f"{i}/3")) for i in range(3)]
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if len(list(shared.glob("images-*"))) > 5:
            break
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
    assert not json.loads((shared / "index.json").read_text())["complete"]
    code, out, err = run(*arguments(shared, "2/3"))
    assert code == 0, err
    assert f"share 2/3 of {shared} is done, and others are not" in out
    workers = [start(*arguments(shared, f"{i}/3")) for i in (0, 1, 1)]  # one of them twice
    outputs = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], outputs
    assert "holds 36 images" in "".join(out for out, _ in outputs)
    found, expected = _contents(shared), _contents(tmp_path / "whole")
    lines = [set(files.pop("skipped.jsonl").splitlines()) for files in (found, expected)]
    assert lines[0] == lines[1]
    assert found == expected


def test_the_command_helps_with_its_own_flags_only():
    code, out, _ = run("music_jax.pack", "--help")
    assert code == 0
    for flag in ("--source", "--output", "--shorter_side", "--quality", "Exit codes"):
        assert flag in out
    assert "--workdir" not in out


def test_the_command_names_what_is_missing(tmp_path):
    code, _, err = run("music_jax.pack", f"--output={tmp_path}")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: --source is missing: A folder of images; NAME:")


def test_a_full_disk_is_one_clear_error(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(40):
        image = rng.integers(0, 256, (64, 64, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "photos" / f"{i}.png"), image)
    command = [sys.executable, "-m", "music_jax.pack", f"--source={tmp_path / 'photos'}"]
    command.append(f"--output={tmp_path / 'packed'}")
    limited = ["bash", "-c", 'ulimit -f 128; exec "$@"', "limited", *command]  # files of 128 KiB
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "cannot write" in result.stderr
    assert "Traceback" not in result.stderr
    assert not [*(tmp_path / "packed").glob("*.array_record")]


def test_images_none_of_which_can_be_read_are_not_packed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no image")
    source = open_folder(str(tmp_path / "photos"))
    with pytest.raises(UnusableDataError, match="none of the 1 images can be read"):
        pack(source, epath.Path(tmp_path / "out"), Packing(), max_skipped_share=1.0)


def test_the_command_names_its_own_flags_not_fields_of_a_config(photos, tmp_path):
    output = f"--output={tmp_path / 'packed'}"
    code, _, err = run("music_jax.pack", f"--source={photos[0]}", output)
    assert code == 3
    assert "more than the share --max_skipped_share = 0.01" in err
    assert "Repair them and pack into another --output, or rerun and allow a larger share" in err
    (tmp_path / "file").touch()
    data_dir = f"--data_dir={tmp_path / 'file'}"
    code, _, err = run("music_jax.pack", "--source=digits:test", output, data_dir)
    assert code == 2
    assert "choose another place with --data_dir=DIR" in err
    assert "config." not in err
