"""Datasets of Hugging Face: Parquet files, saved datasets and cached ones of the hub, offline."""

import io
import json
import os
import pathlib
import shutil
import sys
import tarfile

import cv2
import datasets as hugging_face
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import DIGITS, SMALL, metrics, run
from tfds_sets import IMAGES, LABELS, png

from music_jax.config import default_config
from music_jax.data import datasets, hf_source
from music_jax.errors import NotMeasurableError, UndecodableError, UserError

_NAMES = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _files(start, stop):
    return [png(image) for image in IMAGES[start:stop]]


def _rows(start, stop, label=None):
    """Rows of digits as the library stores them, with class names unless labels are given."""
    features = {"image": hugging_face.Image(), "label": hugging_face.ClassLabel(names=_NAMES)}
    labels = [int(i) for i in LABELS[start:stop]] if label is None else label
    if label is not None:
        features["label"] = hugging_face.Value("string" if "a" in str(label) else "int32")
    images = [{"bytes": file, "path": f"{i}.png"} for i, file in enumerate(_files(start, stop))]
    columns = {"image": images, "label": labels}
    return hugging_face.Dataset.from_dict(columns, hugging_face.Features(features))


def _write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows.with_format("arrow")[:], folder / name, row_group_size=7)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "digits [1]"
    _write(folder / "data", "train-00000-of-00002.parquet", _rows(0, 15))
    _write(folder / "data", "train-00001-of-00002.parquet", _rows(15, 20))
    _write(folder / "data", "test-00000-of-00001.parquet", _rows(20, 26))
    return folder


def _config(tmp_path, name, **fields):
    config = default_config()
    config.dataset.name = f"hf:{name}"
    config.dataset.data_dir = str(tmp_path / "cache")
    config.dataset.update(fields)
    return config


def _open(tmp_path, name, **fields):
    config = _config(tmp_path, name, **fields)
    datasets.prepare(config)
    return datasets.training_source(config)


def _examples(source):
    return [source.example(i) for i in range(len(source))]


def _digits(start, stop):
    return list(zip(_files(start, stop), map(int, LABELS[start:stop]), strict=True))


def test_a_folder_of_parquet_files_has_its_splits_images_and_classes(folder, tmp_path):
    config = _config(tmp_path, folder)
    datasets.prepare(config)
    train, test = datasets.evaluation_sources(config)
    assert (train.class_names, test.class_names) == (_NAMES, _NAMES)
    assert _examples(train) == _digits(0, 20)
    assert _examples(test) == _digits(20, 26)
    assert train.labels().tolist() == LABELS[:20].tolist()
    part = datasets.open_named(config, f"hf:{folder}:train[3:5]+test[:50%]")
    assert _examples(part) == _digits(3, 5) + _digits(20, 23)
    with pytest.raises(UserError, match=r"cannot read split 'val'.*\['test', 'train'\]"):
        datasets.open_named(config, f"hf:{folder}:val")
    with pytest.raises(UserError, match="names no split; add one, as in hf:x:train"):
        datasets.open_named(config, "hf:x")


@pytest.mark.parametrize("several", [True, False])
def test_what_save_to_disk_wrote_is_read_in_place(tmp_path, several):
    rows = _rows(0, 12)
    shuffled = rows.select([3, 1, 2])
    saved = hugging_face.DatasetDict({"train": rows, "extra": shuffled}) if several else rows
    saved.save_to_disk(tmp_path / "saved")
    source = _open(tmp_path, tmp_path / "saved")
    assert _examples(source) == _digits(0, 12)
    config = _config(tmp_path, tmp_path / "saved", train_split="train[2:4]")
    assert _examples(datasets.training_source(config)) == _digits(2, 4)
    if several:
        extra = datasets.open_named(config, f"hf:{tmp_path / 'saved'}:extra")
        assert _examples(extra) == [_digits(i, i + 1)[0] for i in (3, 1, 2)]
    with pytest.raises(NotMeasurableError, match="has no split 'test' to test with"):
        datasets.evaluation_sources(config)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([5, 0, None, -1, 2], (), [5, 0, -1, -1, 2]),
        (["bat", "ant", None, "bat", "ant"], ("ant", "bat"), [1, 0, -1, 1, 0]),
    ],
)
def test_labels_may_be_numbers_or_texts(tmp_path, labels, names, numbers):
    _write(tmp_path / "set", "train.parquet", _rows(0, 5, labels))
    source = _open(tmp_path, tmp_path / "set")
    assert source.class_names == names
    assert source.num_classes == (6 if not names else 2)
    assert source.labels().tolist() == numbers
    assert [label for _, label in _examples(source)] == numbers


def test_plain_tables_and_other_columns_are_read_by_their_keys(tmp_path):
    table = {"img": _files(0, 5), "kind": [[1], [2], [], [0], [1]], "text": ["a"] * 5}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(table), tmp_path / "set" / "train.parquet")
    source = _open(tmp_path, tmp_path / "set", image_key="img")
    assert [file for file, _ in _examples(source)] == _files(0, 5)
    assert source.no_classes == f"hf:{tmp_path / 'set'} has no column 'label'"
    with pytest.raises(UserError, match=r"no column 'image'.*--config\.dataset\.image_key="):
        _open(tmp_path, tmp_path / "set")
    with pytest.raises(UserError, match=r"no column 'kinds'.*--config\.dataset\.label_key="):
        _open(tmp_path, tmp_path / "set", image_key="img", label_key="kinds")
    lists = _open(tmp_path, tmp_path / "set", image_key="img", label_key="kind")
    assert lists.multi_label
    assert lists.labels().tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_lists_of_class_labels_have_the_names_of_the_classes(tmp_path):
    features = hugging_face.Features(
        {
            "image": hugging_face.Image(),
            "label": hugging_face.List(hugging_face.ClassLabel(names=_NAMES)),
        }
    )
    images = [{"bytes": file, "path": None} for file in _files(0, 3)]
    columns = {"image": images, "label": [[1, 0], [1], [1]]}
    hugging_face.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "saved")
    source = _open(tmp_path, tmp_path / "saved")
    assert source.class_names == _NAMES
    assert [np.flatnonzero(label).tolist() for label in source.labels()] == [[0, 1], [1], [1]]


def test_a_path_in_a_table_is_read_only_in_the_folder_of_the_dataset(tmp_path):
    (tmp_path / "set" / "photos").mkdir(parents=True)
    (tmp_path / "set" / "photos" / "0.png").write_bytes(_files(0, 1)[0])
    (tmp_path / "secret.png").write_bytes(_files(1, 2)[0])
    os.symlink(tmp_path / "secret.png", tmp_path / "set" / "link.png")
    os.mkfifo(tmp_path / "set" / "pipe.png")
    paths = ["photos/0.png", str(tmp_path / "secret.png"), "../secret.png", "link.png", "pipe.png"]
    paths += ["http://127.0.0.1:9/a.png", None]
    cells = [{"bytes": None, "path": path} for path in paths]
    table = pa.table({"image": cells})
    info = {"info": {"features": {"image": {"_type": "Image"}}}}
    table = table.cast(
        pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    ).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    source = _open(tmp_path, tmp_path / "set")
    assert source.example(0)[0] == _files(0, 1)[0]
    for index, problem in enumerate(
        ["leads out"] * 3 + ["but a pipe", "cannot be read", "neither a file nor a path"], 1
    ):
        with pytest.raises(UndecodableError, match=problem):
            source.example(index)


def test_the_fingerprint_depends_on_the_content_alone(folder, tmp_path):
    fingerprint = _open(tmp_path, folder).fingerprint(times=False)
    shutil.copytree(folder, tmp_path / "copy" / "digits")
    elsewhere = _open(tmp_path / "other", tmp_path / "copy" / "digits")
    assert elsewhere.fingerprint(times=False) == fingerprint
    changed = _rows(0, 15, [int(i) for i in LABELS[1:16]]).cast_column(
        "label", hugging_face.ClassLabel(names=_NAMES)
    )
    _write(tmp_path / "copy" / "digits" / "data", "train-00000-of-00002.parquet", changed)
    config = _config(tmp_path / "other", tmp_path / "copy" / "digits")
    with pytest.raises(UserError, match=r"was not prepared .*--config\.dataset\.name=hf:/"):
        datasets.training_source(config)
    datasets.prepare(config)
    assert datasets.training_source(config).fingerprint(times=False) != fingerprint


def test_a_dataset_of_the_hub_is_read_from_the_cache_and_fetched_only_to_prepare(
    folder, tmp_path, monkeypatch
):
    config = _config(tmp_path, "somebody/digits")
    with pytest.raises(UserError, match=r"cannot prepare .*Couldn't reach 'somebody/digits'"):
        datasets.prepare(config)
    local = _config(tmp_path / "other", folder)
    datasets.prepare(local)
    prepared = hf_source._open(local.dataset).cache_dir
    for name in ("default", "large"):  # as the library would have written it
        cached = tmp_path / "cache" / "somebody___digits" / name / "0.0.0" / "abc"
        shutil.copytree(prepared, cached)
        for file in cached.glob("parquet-*"):
            file.rename(cached / file.name.replace("parquet-", "digits-"))
        info = json.loads((cached / "dataset_info.json").read_text())
        info |= {"config_name": name, "dataset_name": "digits"}
        (cached / "dataset_info.json").write_text(json.dumps(info))
        if name == "default":
            source = _open(tmp_path, "somebody/digits")
            assert _examples(source) == _digits(0, 20)
    with pytest.raises(UserError, match=r"several configs .*hf:somebody/digits/CONFIG"):
        datasets.training_source(config)
    assert len(_open(tmp_path, "somebody/digits/large")) == 20
    for name in ("/nowhere", "./nowhere", "a/b/c/d", "//datasets/a/b"):
        with pytest.raises(UserError, match="is neither a folder nor the name of a dataset"):
            datasets.prepare(_config(tmp_path, name))


def test_files_that_are_no_parquet_are_errors(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(UserError, match="holds no Parquet files, and nothing that save_to_disk"):
        _open(tmp_path, tmp_path / "set")
    (tmp_path / "set" / "train.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(UserError, match="cannot prepare dataset"):
        _open(tmp_path, tmp_path / "set")


def test_a_column_that_holds_no_files_is_an_error(tmp_path):
    arrays = hugging_face.Features({"image": hugging_face.Array3D((2, 2, 3), "float32")})
    pixels = np.zeros((4, 2, 2, 3), np.float32).tolist()
    hugging_face.Dataset.from_dict({"image": pixels}, arrays).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=r"does not hold image files, but Array3D.*image_key="):
        _open(tmp_path, tmp_path / "set")


def test_a_table_that_refers_to_memory_outside_of_it_is_an_error(tmp_path):
    rows = _rows(0, 2)
    rows.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    ends = pa.py_buffer(np.asarray([0, 2**30, 10], np.int32))
    cells = pa.Array.from_buffers(pa.binary(), 2, [None, ends, pa.py_buffer(bytes(10))])
    images = pa.StructArray.from_arrays([cells, pa.array(["0", "1"])], ["bytes", "path"])
    table = pa.table({"image": images, "label": pa.array([0, 1])})
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"are damaged: .*offset"):
        _open(tmp_path, tmp_path / "saved")


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train.parquet", "train"),
        ("default/test/0000.parquet", "test"),
        ("data/extra-00000-of-00002-abc.parquet", "extra"),
        ("data/val_0.parquet", "validation"),
        ("digits.parquet", "train"),
        ("latest.parquet", "train"),
    ],
)
def test_splits_are_named_by_files_and_folders(file, split):
    assert hf_source._split_of(pathlib.Path(file)) == split


def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"this needs datasets, .*pip install -e '.*\[hf\]'"):
        datasets.prepare(_config(tmp_path, "x/y"))


@pytest.mark.slow
def test_the_same_images_train_alike_from_tfds_parquet_and_tars(tmp_path):
    config = default_config()
    config.dataset.name = "digits"
    datasets.prepare(config)
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        source = datasets.open_named(config, f"digits:{split}")
        files, labels = [file for file, _ in _examples(source)], source.labels().tolist()
        table = {"image": [{"bytes": file, "path": None} for file in files], "label": labels}
        pq.write_table(pa.table(table), tmp_path / "set" / f"{split}.parquet")
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for i, pair in enumerate(zip(files, labels, strict=True)):
                for end, content in zip(("png", "cls"), (pair[0], b"%d" % pair[1]), strict=True):
                    info = tarfile.TarInfo(f"{i:04d}.{end}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        pack = (f"--source=wds:{tmp_path / split}.tar", f"--output={tmp_path / split}")
        assert run("music_jax.pack", *pack, "--channels=1")[0] == 0
    images = {
        "tfds": ["--config.dataset.name=digits"],
        "hf": [f"--config.dataset.name=hf:{tmp_path / 'set'}"],
        "wds": [
            f"--config.dataset.path={tmp_path / 'train'}",
            f"--config.evaluation.test={tmp_path / 'test'}",
            f"--config.evaluation.train={tmp_path / 'train'}",
        ],
    }
    losses, probes = [], []
    for name, arguments in images.items():
        workdir = tmp_path / "runs" / name
        code, _, err = run("music_jax.main", DIGITS, f"--workdir={workdir}", *arguments, *SMALL)
        assert code == 0, err
        losses.append([line["loss"] for line in metrics(workdir) if "loss" in line])
        probes.append(json.loads((workdir / "linear_eval.json").read_text())["top1"])
    assert len(losses[0]) == 22
    assert losses[0] == losses[1] == losses[2]
    assert probes[0] == probes[1] == probes[2]


def test_images_that_are_not_gray_digits_are_read_too(tmp_path):
    """A file is passed on as it is, whatever its format."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 3), np.uint8)
    files = [cv2.imencode(end, pixels)[1].tobytes() for end in (".jpg", ".webp", ".bmp")]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"image": files}), tmp_path / "set" / "0000.parquet")
    assert [file for file, _ in _examples(_open(tmp_path, tmp_path / "set"))] == files
