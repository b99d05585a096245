"""A folder of images: its contents, their order, and excluded files."""

import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
import time
import unicodedata

import cv2
import numpy as np
import pytest

from music_jax.config import default_config, differences
from music_jax.data import datasets, folder
from music_jax.data.decode import decode
from music_jax.data.folder import MAX_FILE_BYTES, open_folder
from music_jax.errors import (
    NotMeasurableError,
    UndecodableError,
    UserError,
)
from music_jax.workdir.run_config import as_json


def _write(path, value=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.full((4, 4, 1), value, np.uint8))[1].tobytes())


def _names(source):
    return [source.record_name(i) for i in range(len(source))]


def _labeled(root, classes, count=2):
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
    _labeled(tmp_path, ["a", "b", "c"], count=5)
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


def test_files_beside_sub_folders_come_in_the_order_of_whole_paths(tmp_path):
    names = [
        "a/b/1.png",
        "a/b-.png",
        "a/b.png",
        "a/b0.png",
        "a/b/c/2.png",
        "a/b.d/3.png",
        "a-/4.png",
    ]
    for i, name in enumerate(names):
        _write(tmp_path / name, i)
    np.save(tmp_path / "a" / "b!.npy", np.zeros((4, 4), np.uint8))  # excluded beside pictures
    source = open_folder(str(tmp_path))
    assert _names(source) == sorted(names)
    values = [int(decode(source.example(i)[0], 1)[0, 0, 0]) for i in range(len(names))]
    assert values == [names.index(name) for name in sorted(names)]
    assert [source.example(i)[1] for i in range(len(names))] == [1, 0, 0, 0, 0, 0, 0]
    assert source.class_names == ("a", "a-")


def test_images_without_sub_folders_have_no_labels(tmp_path):
    _write(tmp_path / "1.png")
    _write(tmp_path / "2.png")
    source = open_folder(str(tmp_path))
    assert (source.num_classes, source.class_names) == (0, ())
    assert [source.example(i)[1] for i in range(2)] == [-1, -1]


def test_all_extensions_of_the_formats_are_images(tmp_path):
    names = ["x.jpg", "x.JPEG", "x.jpe", "x.jfif", "x.JIF", "x.jfi", "x.pjpeg", "x.pjp", "x.png"]
    names += ["x.apng", "x.webp", "x.bmp", "x.dib", "x.gif"]
    for name in (*names, "x.tif", "x.heic", "x.jpg.txt"):
        _write(tmp_path / name)
    assert _names(open_folder(str(tmp_path))) == sorted(names)


def test_excluded_files_are_counted_on_one_line(tmp_path, capsys):
    _write(tmp_path / "a/1.png")
    for name in (
        *("a/2.tif", "a/3.TIF", "b/4.tif", "a/5.heic", "a/Thumbs.db", "a/.DS_Store", "a/._1.png"),
        *("a/notes", "a/.hidden", "@eaDir/1.jpg", "a/@eaDir/2.jpg", "$RECYCLE.BIN/3.png"),
        *(
            "__MACOSX/a/4.png",
            "lost+found/5.png",
            ".git/6.png",
            "a/System Volume Information/7.png",
        ),
    ):
        _write(tmp_path / name)
    os.mkfifo(tmp_path / "a/pipe.png")
    (tmp_path / "a/folder.png").mkdir()
    (tmp_path / "a/dangling.png").symlink_to("nowhere.png")
    (tmp_path / "a/loop.jpg").symlink_to("loop.jpg")
    source = open_folder(str(tmp_path))
    assert (_names(source), source.class_names) == (["a/1.png"], ("a",))
    lines = [line for line in capsys.readouterr().out.splitlines() if ": excluded: " in line]
    assert lines == [
        f"{tmp_path}: excluded: 3 .tif, 2 @eaDir/, 2 hidden files without an extension, "
        "2 links that cannot be followed, 1 $RECYCLE.BIN/, 1 .db, 1 .git/, 1 .heic, "
        "1 System Volume Information/, 1 __MACOSX/, 4 others"
    ]
    open_folder(str(tmp_path / "a"))
    (tmp_path / "a/1.png").unlink()
    for name in ("2.tif", "3.TIF"):
        (tmp_path / "a" / name).unlink()
    with pytest.raises(UserError, match=r"holds no image .*; excluded: 2 hidden"):
        open_folder(str(tmp_path / "a"))


def test_folders_of_links_are_read(tmp_path):
    """As of ImageNet-100: links to files, to class folders, and to such folders of links."""
    for i, name in enumerate(["n1/a.png", "n1/b.png", "n2/c.png", "n3/d.png"]):
        _write(tmp_path / "imagenet/train" / name, i)
    farm = tmp_path / "farm"
    for name in ("n1", "n3"):
        (farm / "train").mkdir(parents=True, exist_ok=True)
        (farm / "train" / name).symlink_to(tmp_path / "imagenet/train" / name)
    (farm / "few/n2").mkdir(parents=True)
    (farm / "few/n2/c.png").symlink_to("../../../imagenet/train/n2/c.png")
    (tmp_path / "data").symlink_to("farm")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train").symlink_to("../data/train")

    source = open_folder(str(farm / "train"))
    assert _names(source) == ["n1/a.png", "n1/b.png", "n3/d.png"]
    assert source.class_names == ("n1", "n3")
    assert [decode(source.example(i)[0], 1)[0, 0, 0] for i in range(3)] == [0, 1, 3]
    assert _names(open_folder(str(tmp_path / "data/few"))) == ["n2/c.png"]
    assert _names(open_folder(str(tmp_path / "mine"))) == [f"train/{n}" for n in _names(source)]
    assert open_folder(str(tmp_path / "mine")).example(2)[0] == source.example(2)[0]


def test_each_folder_is_listed_once_whatever_links_lead_to_it(tmp_path, capsys):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for name in ("a/1.png", "b/2.png"):
        _write(root / name)
    _write(outside / "p/3.png")
    _write(outside / "q/4.png")
    (root / "a/b").symlink_to(root / "b")  # two that lead to each other
    (root / "b/a").symlink_to("../a")
    (root / "a/circle").symlink_to(".")
    (root / "a/up").symlink_to(tmp_path)
    (root / "a/root").symlink_to("/")
    (root / "d").symlink_to("../outside/p")
    (root / "e").symlink_to("../outside/p")
    (outside / "p/back").symlink_to(root)
    (outside / "p/q").symlink_to("../q")
    (outside / "q/p").symlink_to("../p")
    assert _names(open_folder(str(root))) == ["a/1.png", "b/2.png", "d/3.png", "d/q/4.png"]
    out = capsys.readouterr().out
    assert "4 links to a folder that holds them, 4 links to folders that are listed already" in out


def test_a_file_that_has_become_a_link_since_it_was_listed_is_refused(tmp_path):
    _write(tmp_path / "outside/secret.png")
    _write(tmp_path / "root/file.png")
    (tmp_path / "root/link.png").symlink_to("file.png")
    source = open_folder(str(tmp_path / "root"))
    (tmp_path / "root/link.png").unlink()
    (tmp_path / "root/link.png").symlink_to("../outside/secret.png")
    (tmp_path / "root/file.png").unlink()
    (tmp_path / "root/file.png").symlink_to("../outside/secret.png")
    with pytest.raises(UndecodableError, match="it has become a link since"):
        source.example(0)
    assert source.example(1)[0] == (tmp_path / "outside/secret.png").read_bytes()  # it was one then


def test_a_folder_that_is_too_deep_to_be_listed_is_an_error_of_one_line(tmp_path):
    def nest(folder, name):
        folder.mkdir()
        at = os.open(folder, os.O_RDONLY)
        for _ in range(1200):
            os.mkdir(name, dir_fd=at)
            below = os.open(name, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = below
        os.close(os.open("x.png", os.O_CREAT, dir_fd=at))
        os.close(at)

    nest(tmp_path / "deep", "d")
    assert _names(open_folder(str(tmp_path / "deep"))) == ["d/" * 1200 + "x.png"]
    nest(tmp_path / "deeper", "dddd")
    with pytest.raises(UserError, match=r"cannot list the folder .*: File name too long") as error:
        open_folder(str(tmp_path / "deeper"))
    assert len(str(error.value)) < 400
    subprocess.run(["rm", "-r", tmp_path / "deep", tmp_path / "deeper"], check=True)


def test_names_that_are_not_utf8_are_images_and_classes_like_others(tmp_path):
    root = os.fsencode(tmp_path) + b"/ph\xe9"
    names = [b"\xe9t\xe9/1.png", b"\xe9t\xe9/caf\xe9.png", "ä/2.png".encode()]
    for i, name in enumerate(names):
        os.makedirs(os.path.dirname(root + b"/" + name), exist_ok=True)
        with open(root + b"/" + name, "wb") as file:
            file.write(cv2.imencode(".png", np.full((4, 4, 1), i, np.uint8))[1].tobytes())
    source = open_folder(os.fsdecode(root))
    assert source.name == f"{tmp_path}/ph\\xe9"
    assert _names(source) == ["ä/2.png", "\\xe9t\\xe9/1.png", "\\xe9t\\xe9/caf\\xe9.png"]
    assert source.class_names == ("ä", "\\xe9t\\xe9")
    examples = [source.example(i) for i in range(3)]
    assert [label for _, label in examples] == [0, 1, 1]
    assert [decode(encoded, 1)[0, 0, 0] for encoded, _ in examples] == [2, 0, 1]
    source.fingerprint(times=True)


def test_a_folder_that_is_itself_a_link_is_a_folder(tmp_path):
    _write(tmp_path / "real/1.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert _names(open_folder(str(tmp_path / "link"))) == ["1.png"]


def test_arrays_are_images_where_there_are_no_pictures(tmp_path, capsys):
    for name in ("b/1.npy", "a/2.TIF", "a/.3.npy", "a/4.tiff", "a/notes.txt"):
        _write(tmp_path / name)
    source = open_folder(str(tmp_path))
    assert _names(source) == ["a/2.TIF", "a/4.tiff", "b/1.npy"]
    assert source.class_names == ("a", "b")
    assert "excluded: 1 .txt, 1 hidden .npy" in capsys.readouterr().out
    before = source.fingerprint(times=True)
    (tmp_path / "b/1.npy").write_bytes(b"longer than before")
    assert open_folder(str(tmp_path)).fingerprint(times=True) != before
    _write(tmp_path / "c/5.jpg")
    assert _names(open_folder(str(tmp_path))) == ["c/5.jpg"]
    assert "excluded: 1 .npy, 1 .tif, 1 .tiff, 1 .txt" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_is_an_undecodable_error(tmp_path):
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
    train, test = _labeled(tmp_path / "train", ["a", "b", "c"]), tmp_path / "test"
    _labeled(test, ["c", "a"])
    config = _config(**{"dataset.path": str(train), "evaluation.test": str(test)})
    training = datasets.training_source(config)
    probed = datasets.evaluation_sources(config, training)
    assert probed.train is training
    assert [probed.test.example(i)[1] for i in range(4)] == [0, 0, 2, 2]
    assert probed.test.record_name(3) == "c/1.png"


@pytest.mark.parametrize("spelling", ["{}/", "{}/.", "{}//", "{}/a/..", "~/train"])
def test_a_folder_is_the_same_in_any_spelling(tmp_path, monkeypatch, spelling):
    monkeypatch.setenv("HOME", str(tmp_path))
    train = _labeled(tmp_path / "train", ["a", "b"])
    fields = {"evaluation.train": spelling.format(train), "evaluation.test": str(train)}
    config = _config(**{"dataset.path": str(train)} | fields)
    training = datasets.training_source(config)
    assert datasets.evaluation_sources(config, training).train is training
    other = _config(**{"dataset.path": spelling.format(train)} | fields)
    assert differences(as_json(config), as_json(other)) == []
    assert datasets.training_source(other).name == training.name == str(train)


def test_class_folders_that_differ_in_unicode_normalization_alone_are_the_same(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))

    def labels(train, test):
        shutil.rmtree(tmp_path / "sets", ignore_errors=True)
        config = _config(
            **{
                "dataset.path": str(_labeled(tmp_path / "sets/train", train, count=1)),
                "evaluation.test": str(_labeled(tmp_path / "sets/test", test, count=1)),
            }
        )
        found = datasets.evaluation_sources(config, datasets.training_source(config)).test
        return found.class_names, [found.example(i)[1] for i in range(len(found))]

    assert labels(["a", composed, "z"], ["a", decomposed, "z"]) == (("a", "z", composed), [0, 2, 1])
    assert labels(["a", decomposed], [composed, "a"]) == (("a", decomposed), [0, 1])
    both = (decomposed, composed)  # two classes, since one folder has both
    assert labels(both, both) == (both, [0, 1])
    assert labels(["a", *both], ["a", composed]) == (("a", *both), [0, 2])
    with pytest.raises(UserError, match="has classes that"):
        labels(["a", composed], both)


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
    config = _config(**{"dataset.path": str(_labeled(tmp_path, ["a", "b"]))})
    with pytest.raises(NotMeasurableError, match=r"no images to test with.*evaluation\.test="):
        datasets.evaluation_sources(config, datasets.training_source(config))


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (
            {"test": "labeled"},
            r"photos cannot be used for evaluation.*--config\.evaluation\.train=",
        ),
        ({"train": "labeled", "test": "photos"}, r"--config\.evaluation\.test="),
        (
            {"train": "labeled", "test": "other"},
            "has classes that .*labeled does not have: x, y, z; ",
        ),
        ({"train": "labeled"}, "name both"),
        ({"train": "labeled", "test": "nowhere"}, "there is no folder"),
    ],
)
def test_unusable_evaluation_sets_are_errors_that_name_them(tmp_path, evaluation, message):
    _write(tmp_path / "photos/1.png")
    _labeled(tmp_path / "labeled", ["a", "b"])
    _labeled(tmp_path / "other", ["a", "x", "y", "z"])
    fields = {f"evaluation.{key}": str(tmp_path / value) for key, value in evaluation.items()}
    config = _config(**{"dataset.path": str(tmp_path / "photos")} | fields)
    with pytest.raises(UserError, match=message):
        datasets.evaluation_sources(config, datasets.training_source(config))


def test_neither_a_name_nor_a_folder_is_an_error():
    with pytest.raises(UserError, match=r"dataset\.name.*dataset\.path"):
        datasets.prepare(default_config())


def test_a_fingerprint_depends_on_every_name_and_size_and_if_asked_on_every_time(tmp_path):
    for i in range(200):
        _write(tmp_path / f"{i:03d}.png", i % 7)
    image = tmp_path / "001.png"  # not one of the 64 whose contents are read

    def fingerprints():
        source = open_folder(str(tmp_path))
        return source.fingerprint(times=False), source.fingerprint(times=True)

    before = fingerprints()
    assert fingerprints() == before
    os.utime(image, ns=(1, 1))
    touched = fingerprints()
    assert (touched[0] == before[0], touched[1] == before[1]) == (True, False)
    image.write_bytes(image.read_bytes() + b"\0")
    larger = fingerprints()
    assert larger[0] != before[0]
    image.rename(tmp_path / "001a.png")
    renamed = fingerprints()
    assert len({before, touched, larger, renamed}) == 4
    assert renamed[0] != larger[0]
    some = open_folder(str(tmp_path))
    chosen = [some.subset(np.asarray(rows)).fingerprint(times=False) for rows in ([1, 2], [2, 1])]
    assert chosen[0] != chosen[1]


def _unlink(folder):
    (folder / "a/1.png").unlink()


def _replace_folder(folder):
    shutil.rmtree(folder / "a")
    _write(folder / "a")


def _break_link(folder):
    (folder / "link.png").unlink()
    (folder / "link.png").symlink_to("link.png")


@pytest.mark.parametrize("remove", [_unlink, _replace_folder, _break_link])
def test_an_image_that_is_removed_after_listing_changes_the_identity(tmp_path, remove):
    _write(tmp_path / "a/1.png")
    _write(tmp_path / "2.png")
    (tmp_path / "link.png").symlink_to("2.png")
    before, source = (open_folder(str(tmp_path)) for _ in range(2))
    identity = before.identity(False)
    remove(tmp_path)
    assert source.identity(False) != identity


def test_a_fingerprint_may_have_times_after_2262(tmp_path):
    _write(tmp_path / "1.png")
    os.utime(tmp_path / "1.png", (10**10, 10**10))
    before = open_folder(str(tmp_path)).fingerprint(times=True)
    os.utime(tmp_path / "1.png", (10**10 + 1, 10**10 + 1))
    assert open_folder(str(tmp_path)).fingerprint(times=True) != before


def test_a_folder_that_may_be_listed_but_not_entered_is_an_error():
    user = os.getuid()
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        _write(pathlib.Path(root, "a/1.png"))
        os.chmod(f"{root}/a", 0o644)
        if user == 0:  # who may enter all folders
            os.setreuid(65534, -1)
        try:
            with pytest.raises(UserError, match=r"list the folder .*: Permission denied: 'a'"):
                open_folder(root)
        finally:
            os.setreuid(user, -1)
            os.chmod(f"{root}/a", 0o755)


@pytest.mark.parametrize("slow", [False, True])
def test_only_slow_file_systems_are_read_on_several_threads(tmp_path, monkeypatch, slow):
    for i in range(1000):
        (tmp_path / f"{i:04d}.png").write_bytes(bytes(i % 7))
    before = open_folder(str(tmp_path)).fingerprint(times=True)
    threads, original = set(), os.stat

    def stat(path, **options):
        if os.fsencode(path).endswith(b".png"):
            threads.add(threading.get_ident())
            time.sleep(0.001 if slow else 0)
        return original(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(folder, "_MAX_LOCAL_STAT_SECONDS", 1e-4 if slow else 1.0)
    assert open_folder(str(tmp_path)).fingerprint(times=True) == before
    # One of them reads the files that are timed.
    assert len(threads) > 2 if slow else len(threads) == 2
