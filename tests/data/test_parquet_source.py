"""Parquet files as a source of `pack`: columns, labels, order of reading and damage."""

import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from processes import run

from music_jax.data.datasets import open_path
from music_jax.data.packing import Packing, pack
from music_jax.data.parquet_source import open_parquet
from music_jax.distributed.shares import Share
from music_jax.errors import UndecodableError, UnusableDataError, UserError


def _png(value):
    return cv2.imencode(".png", np.full((8, 8), value % 256, np.uint8))[1].tobytes()


def _open(pattern, **keys):
    return open_parquet(str(pattern), **{"image_key": None, "label_key": None} | keys)


def _write(path, columns, row_group_size=10, metadata=None):
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, row_group_size=row_group_size)


def _structs(images):
    return [{"bytes": image, "path": f"/nowhere/{i}.png"} for i, image in enumerate(images)]


@pytest.fixture
def images():
    return [_png(i) for i in range(50)]


def test_structs_and_binaries_are_read_in_the_order_of_files_and_rows(tmp_path, images):
    names = {"info": {"features": {"label": {"names": ["owl", "ant", "bee"]}}}}
    labels = [i % 2 for i in range(50)]
    for k in range(2):
        part = slice(25 * k, 25 * k + 25)
        columns = {"image": _structs(images[part]), "label": labels[part]}
        _write(tmp_path / f"train-{k}.parquet", columns, metadata=names)
    source = _open(tmp_path / "train-{0..1}.parquet")
    assert source.class_names == ("owl", "ant", "bee")
    assert [source.example(i) for i in range(50)] == list(zip(images, labels, strict=True))
    assert [source.example(i)[0] for i in (40, 3, 49, 0, 41, 2)] == [
        images[i] for i in (40, 3, 49, 0, 41, 2)
    ]
    text = ["owl" if i % 2 else None if i % 4 else "" for i in range(50)]
    thumbnails = pa.array(images, pa.large_binary())
    _write(tmp_path / "b.parquet", {"thumb": thumbnails, "jpg": images, "kind": text})
    source = _open(tmp_path / "b.parquet", label_key="kind")
    assert source.class_names == ("owl",)
    assert [source.example(i) for i in range(3)] == [
        (images[0], -1),
        (images[1], 0),
        (images[2], -1),
    ]
    assert _open(tmp_path / "b.parquet", image_key="thumb").example(7)[0] == images[7]


def test_columns_that_cannot_be_used_are_errors(tmp_path, images):
    _write(tmp_path / "a.parquet", {"x": images, "y": images, "label": [[1.5]] * 50})
    with pytest.raises(UserError, match=r"\['x', 'y'\] hold files: name one with --image_key="):
        _open(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no column 'z' of image files"):
        _open(tmp_path / "a.parquet", image_key="z")
    with pytest.raises(UserError, match=r"has no column 'z'; it has"):
        _open(tmp_path / "a.parquet", image_key="x", label_key="z")
    with pytest.raises(UserError, match="'x' holds the images; --label_key= must name another"):
        _open(tmp_path / "a.parquet", image_key="x", label_key="x")
    source = _open(tmp_path / "a.parquet", image_key="x")
    assert source.num_classes == 0
    assert "neither whole numbers nor texts, but float" in source.no_classes
    _write(tmp_path / "b.parquet", {"x": images, "y": [1.5] * 50})
    assert "has no column of labels" in _open(tmp_path / "b.parquet").no_classes
    with pytest.raises(UnusableDataError, match=r"cannot read .*b\.parquet"):
        _open(tmp_path / "{a,b}.parquet", image_key="x", label_key="label")


def test_cells_without_a_file_and_damaged_pages_are_unreadable_images(tmp_path, images):
    structs = _structs(images)
    structs[3]["bytes"] = None
    _write(tmp_path / "a.parquet", {"image": structs, "label": [0] * 50})
    source = _open(tmp_path / "a.parquet")
    with pytest.raises(UndecodableError, match="holds no file"):
        source.example(3)
    assert source.example(4) == (images[4], 0)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    group = pq.read_metadata(tmp_path / "a.parquet").row_group(2).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + group.total_compressed_size] = bytes(group.total_compressed_size)
    (tmp_path / "a.parquet").write_bytes(content)
    source = _open(tmp_path / "a.parquet")
    for index in (20, 25, 29, 22):
        with pytest.raises(UndecodableError, match="its row group cannot be read"):
            source.example(index)
    assert [source.example(i)[0] for i in (19, 30, 49)] == [images[i] for i in (19, 30, 49)]
    (tmp_path / "a.parquet").write_bytes(content[:1000])
    with pytest.raises(UnusableDataError, match=r"cannot read .*a\.parquet"):
        _open(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([[2], [0, 2], None, []], "012", [[0, 0, 1], [1, 0, 1], [-1] * 3, [0] * 3]),
        ([[1, 0, -1, 0], [0, 1, 1, 0]], "0123", [[1, 0, -1, 0], [0, 1, 1, 0]]),
        ([["owl", "ant"], ["owl"]], ("ant", "owl"), [[1, 1], [0, 1]]),
    ],
)
def test_lists_are_labels_of_several_classes_and_are_packed(
    tmp_path, images, labels, names, expected
):
    _write(tmp_path / "a.parquet", {"image": images[: len(labels)], "label": labels})
    source = _open(tmp_path / "a.parquet")
    assert source.class_names == tuple(names)
    assert source.labels().tolist() == expected
    pack(source, epath.Path(tmp_path / "packed"), Packing(shorter_side=8))
    packed = open_path(str(tmp_path / "packed"))
    assert packed.multi_label
    assert packed.class_names == tuple(names)
    assert packed.labels().tolist() == expected


@pytest.mark.parametrize("row_group_size", [10, 1000])
def test_rows_are_packed_by_workers_as_by_one(tmp_path, row_group_size):
    images = [_png(i) + bytes(i) for i in range(300)]
    columns = {"image": _structs(images), "label": [i % 7 - 1 for i in range(300)]}
    _write(tmp_path / "a.parquet", columns, row_group_size)
    source = _open(tmp_path / "a.parquet")
    packing = Packing(shard_size=50, shorter_side=8)
    for share in (Share(1, 2), Share(0, 2)):
        pack(source, epath.Path(tmp_path / "packed"), packing, share=share, num_threads=8)
    packed = open_path(str(tmp_path / "packed"))
    assert packed.class_names == tuple("012345")
    expected = list(zip(images, columns["label"], strict=True))
    assert [packed.example(i) for i in range(300)] == expected


def test_the_command_packs_parquet_files(tmp_path, images):
    _write(tmp_path / "a.parquet", {"picture": images, "kind": [i % 3 for i in range(50)]})
    code, out, err = run(
        "music_jax.pack",
        f"--source=parquet:{tmp_path}/*.parquet",
        f"--output={tmp_path / 'packed'}",
        "--label_key=kind",
    )
    assert code == 0, err
    assert "50 images in the column 'picture', 3 classes, 1 files" in out
    assert open_path(str(tmp_path / "packed")).example(49) == (images[49], 1)
