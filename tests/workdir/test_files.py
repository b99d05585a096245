"""Files are written completely and never through a link."""

import functools
import json
import os
import threading

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from listed_records import list_source
from small_runs import save_run, small_config

from music_jax import load
from music_jax.data.folder import open_folder
from music_jax.data.packed import open_packed
from music_jax.data.packing import Packing, pack
from music_jax.data.skipped import SkippedImages, UnlistedImages
from music_jax.errors import UserError
from music_jax.evaluation.features import Expected, cached_arrays
from music_jax.evaluation.results import Predictions, read_predictions, write_predictions
from music_jax.exchange.folder_encoding import encode_folder
from music_jax.export import export
from music_jax.workdir.files import new_file, new_path, write_json, write_new


def test_a_new_file_has_the_content_and_the_usual_permissions(tmp_path):
    umask = os.umask(0o027)
    try:
        write_new(tmp_path / "a", b"one")
        write_new(epath.Path(tmp_path / "a"), b"two")
    finally:
        os.umask(umask)
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_is_replaced_and_its_target_is_unchanged(link, tmp_path):
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "run").mkdir()
    link(tmp_path / "outside", tmp_path / "run" / "a.json")
    write_new(tmp_path / "run" / "a.json", b"new")
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (tmp_path / "run" / "a.json").is_symlink()
    assert (tmp_path / "run" / "a.json").read_text() == "new"


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail_halfway():
        with new_file(tmp_path / "a") as file:
            file.write(b"half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fail_halfway()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_concurrent_writers_of_a_file_all_succeed(tmp_path):
    failed = []

    def write(number):
        try:
            for _ in range(50):
                write_new(tmp_path / "a", bytes([number]) * 10_000)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    content = (tmp_path / "a").read_bytes()
    assert content in [bytes([number]) * 10_000 for number in range(8)]
    assert os.listdir(tmp_path) == ["a"]


def test_new_path_gives_a_new_name_each_time(tmp_path):
    names = []
    for _ in range(2):
        with new_path(tmp_path / "a") as path:
            names.append(path.name)
            assert path.parent == tmp_path
            assert path.stat().st_size == 0
            path.write_text("written")
    assert names[0] != names[1]
    assert (tmp_path / "a").read_text() == "written"


def test_skipped_images_are_not_listed_through_a_link(outside, tmp_path):
    source = list_source("photos", range(9), 0)
    os.symlink(outside, tmp_path / "run" / "skipped.jsonl")
    skipped = SkippedImages(epath.Path(tmp_path / "run"), max_share=1.0)
    with pytest.raises(UserError, match="is a link"):
        skipped.add(source, 3, "cut off")
    os.remove(tmp_path / "run" / "skipped.jsonl")
    UnlistedImages(epath.Path(tmp_path / "run"), max_share=1.0).add(source, 3, "cut off")
    assert not os.listdir(tmp_path / "run")


def test_cached_arrays_are_not_written_through_links(outside, tmp_path):
    wanted = {"a": np.arange(3)}
    get = functools.partial(
        cached_arrays,
        epath.Path(tmp_path / "run" / "features"),
        "name",
        {},
        lambda: wanted,
        expected={"a": Expected((3,), np.int64)},
    )
    get()
    (path,) = (tmp_path / "run" / "features").iterdir()
    path.unlink()
    path.symlink_to(outside)
    np.testing.assert_array_equal(get()["a"], [0, 1, 2])
    assert not path.is_symlink()
    np.testing.assert_array_equal(np.load(path)["a"], [0, 1, 2])


def test_predictions_replace_a_link(outside, tmp_path):
    where = epath.Path(tmp_path / "run")
    os.symlink(outside, where / "linear_eval.npz")
    one = np.ones(1, np.int32)
    write_predictions(where, Predictions(one.astype(np.int64), one, one, 7))
    found = read_predictions(where)
    assert found is not None
    assert (found.step, found.top1) == (7, 1.0)


def test_packing_replaces_links_and_removes_files_of_a_killed_call(outside, tmp_path):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "b").mkdir()
    for name in ("a/0.png", "b/1.png"):
        cv2.imwrite(str(tmp_path / "photos" / name), np.full((9, 9), 50, np.uint8))
    directory, source = epath.Path(tmp_path / "run"), open_folder(str(tmp_path / "photos"))
    pack(source, directory, Packing())
    shard = next(directory.glob("*.array_record"))
    index = json.loads((directory / "index.json").read_text()) | {"complete": False, "shards": []}
    (directory / "index.json").write_text(json.dumps(index))
    (directory / ".new-0123").write_text("half a shard")
    for path in (shard, directory / f"{shard.name}.json", directory / f"{shard.name}.part"):
        path.unlink(missing_ok=True)
        os.symlink(outside, path)
    assert pack(source, directory, Packing()) == 2
    assert len(open_packed(str(directory))) == 2
    assert not (directory / ".new-0123").exists()


def test_an_export_and_its_card_replace_links(outside, tmp_path):
    save_run(tmp_path / "trained", small_config())
    for name in ("a.safetensors", "a.safetensors.md", ".a.safetensors.new"):
        (tmp_path / "run" / name).symlink_to(outside)
    output = str(tmp_path / "run" / "a.safetensors")
    path, card = export(str(tmp_path / "trained"), form="safetensors", output=output)
    assert (str(path), str(card)) == (output, output + ".md")
    assert not os.path.islink(path)
    assert "small_resnet" in card.read_text()


@pytest.mark.parametrize("ending", [".npy", ".parquet"])
def test_encoding_replaces_links(ending, outside, tmp_path):
    save_run(tmp_path / "trained", small_config())
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos" / "0.png"), np.full((28, 28), 50, np.uint8))
    encoder, source = load(str(tmp_path / "trained")), open_folder(str(tmp_path / "photos"))
    output = tmp_path / "run" / f"a{ending}"
    for name in (f".{output.name}.new", f"{output.name}.json", "a.codes.npy"):
        (tmp_path / "run" / name).symlink_to(outside)
    (tmp_path / "run" / f"{output.name}.parts").symlink_to(outside.parent)
    with pytest.raises(UserError, match="is a link; remove it"):
        encode_folder(encoder, source, str(output), codes=True)
    (tmp_path / "run" / f"{output.name}.parts").unlink()
    encode_folder(encoder, source, str(output), codes=True)
    expected = encoder([tmp_path / "photos" / "0.png"])
    if ending == ".npy":
        found = np.load(output)
        np.testing.assert_array_equal(np.load(tmp_path / "run" / "a.codes.npy").shape, (1, 6))
    else:
        found = np.stack(pq.read_table(output)["features"].to_pylist())
    np.testing.assert_array_equal(found, expected)


def test_a_directory_in_the_place_of_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "knn.json").mkdir()
    with pytest.raises(UserError, match="it is a directory; remove or rename it"):
        write_json(epath.Path(tmp_path) / "knn.json", {})
    assert os.listdir(tmp_path) == ["knn.json"]
