"""A folder of images: what is in it, in which order, and what is not followed."""

import json
import os

import cv2
import numpy as np
import pytest

from music_jax.config import default_config
from music_jax.data import datasets
from music_jax.data.decode import decode
from music_jax.data.folder import MAX_FILE_BYTES, open_folder
from music_jax.data.skipped import SkippedImages
from music_jax.errors import (
    NotMeasurableError,
    UndecodableError,
    UnusableDataError,
    UserError,
)


def _write(path, value=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.full((4, 4, 1), value, np.uint8))[1].tobytes())


def _names(source):
    return [source.record_name(i) for i in range(len(source))]


def _labelled(root, classes, count=2):
    for number, name in enumerate(classes):
        for i in range(count):
            _write(root / name / f"{i}.png", 10 * number + i)
    return root


def _config(**fields):
    config = default_config()
    config.update_from_flattened_dict(fields)
    return config


def test_images_come_in_the_order_of_their_paths_with_the_class_of_their_first_folder(tmp_path):
    for i, name in enumerate(["b/2.png", "a/deep/er/1.JPG", "b/10.png", "a/z.WebP", "c.d/x.jpeg"]):
        _write(tmp_path / name, i)
    source = open_folder(str(tmp_path))
    assert _names(source) == ["a/deep/er/1.JPG", "a/z.WebP", "b/10.png", "b/2.png", "c.d/x.jpeg"]
    assert source.class_names == ("a", "b", "c.d")
    assert [source.example(i)[1] for i in range(5)] == [0, 0, 1, 1, 2]
    assert [decode(source.example(i)[0], 1)[0, 0, 0] for i in range(5)] == [1, 3, 2, 0, 4]


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    _labelled(tmp_path, ["a", "b", "c"], count=5)
    expected = _names(open_folder(str(tmp_path)))
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            self._entries = scandir(path)

        def __enter__(self):
            return reversed(list(self._entries))

        def __exit__(self, *_):
            self._entries.close()

    monkeypatch.setattr(os, "scandir", Reversed)
    assert _names(open_folder(str(tmp_path))) == expected == sorted(expected)


def test_images_without_sub_folders_have_no_labels(tmp_path):
    _write(tmp_path / "1.png")
    _write(tmp_path / "2.png")
    source = open_folder(str(tmp_path))
    assert (source.num_classes, source.class_names) == (0, ())
    assert [source.example(i)[1] for i in range(2)] == [-1, -1]


def test_hidden_and_other_files_are_passed_over(tmp_path):
    _write(tmp_path / "a/1.png")
    for name in ["a/.2.png", ".hidden/3.png", "a/notes.txt", "a/png", "a/.DS_Store"]:
        _write(tmp_path / name)
    os.mkfifo(tmp_path / "a/pipe.png")
    (tmp_path / "a/folder.png").mkdir()
    assert _names(open_folder(str(tmp_path))) == ["a/1.png"]


def test_links_are_followed_inside_the_folder_only(tmp_path):
    root = tmp_path / "root"
    _write(root / "a/1.png")
    _write(root / "b/2.png")
    _write(tmp_path / "outside/secret.png")
    (root / "a/inside.png").symlink_to(root / "b/2.png")
    (root / "a/circle").symlink_to(root / "a")
    (root / "c").symlink_to("b")
    (root / "a/dangling.png").symlink_to(root / "nowhere.png")
    (root / "a/out.png").symlink_to(tmp_path / "outside/secret.png")
    (root / "d").symlink_to("../outside")
    source = open_folder(str(root))
    assert _names(source) == ["a/1.png", "a/inside.png", "b/2.png", "c/2.png"]
    assert [name for name, _ in source.left_out] == ["a/out.png", "d"]

    skipped = SkippedImages(_epath(tmp_path), max_share=0.5)
    skipped.add_left_out(source)
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines] == ["a/out.png", "d"]
    with pytest.raises(UnusableDataError, match="3 of the 4 images"):
        SkippedImages(_epath(tmp_path), max_share=0.4).add(source, 0, "broken")


def _epath(path):
    from etils import epath

    return epath.Path(path)


def test_a_folder_that_is_itself_a_link_is_a_folder(tmp_path):
    _write(tmp_path / "real/1.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert _names(open_folder(str(tmp_path / "link"))) == ["1.png"]


def test_a_file_that_cannot_be_read_is_told_from_one_that_can(tmp_path):
    for i in range(3):
        _write(tmp_path / f"{i}.png")
    source = open_folder(str(tmp_path))
    (tmp_path / "0.png").unlink()
    os.truncate(tmp_path / "1.png", MAX_FILE_BYTES + 1)
    for index, message in ((0, "cannot be read: No such file"), (1, "bytes are more than")):
        with pytest.raises(UndecodableError, match=message):
            source.example(index)
    assert source.example(2)[1] == -1


@pytest.mark.parametrize(("name", "message"), [("none", "no folder"), ("empty", "holds no image")])
def test_a_folder_without_images_is_an_error(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_folder(str(tmp_path / name))


def test_evaluation_sets_are_folders_with_the_classes_of_the_training_set(tmp_path):
    train, test = _labelled(tmp_path / "train", ["a", "b", "c"]), tmp_path / "test"
    _labelled(test, ["c", "a"])
    config = _config(**{"dataset.path": str(train), "evaluation.test": str(test)})
    training = datasets.training_source(config)
    probed = datasets.evaluation_sources(config, training)
    assert probed.train is training
    assert [probed.test.example(i)[1] for i in range(4)] == [0, 0, 2, 2]
    assert probed.test.record_name(3) == "c/1.png"


def test_evaluation_sets_may_be_tfds_splits(tmp_path):
    _write(tmp_path / "photos/1.png")
    config = _config(
        **{
            "dataset.path": str(tmp_path / "photos"),
            "dataset.data_dir": str(tmp_path),
            "evaluation.train": "digits:train[:50%]",
            "evaluation.test": "digits:test",
        }
    )
    datasets.prepare(config)
    probed = datasets.evaluation_sources(config, datasets.training_source(config))
    assert (len(probed.train), len(probed.test)) == (718, 360)


def test_without_an_evaluation_set_a_folder_is_not_probed(tmp_path):
    config = _config(**{"dataset.path": str(_labelled(tmp_path, ["a", "b"]))})
    with pytest.raises(NotMeasurableError, match=r"no images to test with.*evaluation\.test="):
        datasets.evaluation_sources(config, datasets.training_source(config))


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"test": "labelled"}, r"photos cannot be evaluated with.*--config\.evaluation\.train="),
        ({"train": "labelled", "test": "photos"}, r"--config\.evaluation\.test="),
        (
            {"train": "labelled", "test": "other"},
            "has classes that .*labelled has not: x, y, z$|; b",
        ),
        ({"train": "labelled"}, "name both"),
        ({"train": "labelled", "test": "nowhere"}, "there is no folder"),
    ],
)
def test_evaluation_sets_that_cannot_be_used_are_named(tmp_path, evaluation, message):
    _write(tmp_path / "photos/1.png")
    _labelled(tmp_path / "labelled", ["a", "b"])
    _labelled(tmp_path / "other", ["a", "x", "y", "z"])
    fields = {f"evaluation.{key}": str(tmp_path / value) for key, value in evaluation.items()}
    config = _config(**{"dataset.path": str(tmp_path / "photos")} | fields)
    with pytest.raises(UserError, match=message):
        datasets.evaluation_sources(config, datasets.training_source(config))


def test_neither_a_name_nor_a_folder_is_an_error():
    with pytest.raises(UserError, match=r"dataset\.name.*dataset\.path"):
        datasets.prepare(default_config())
