"""Hostile input is either accepted or a clear error.

`tests/fuzz.py` tries a hundred thousand of them; here are a few of each, and those by name that
once did harm.
"""

import ast
import contextlib
import io
import json
import os
import pathlib
import random

import cv2
import numpy as np
import pytest
from etils import epath
from hostile_files import TARGETS
from hostile_images import scan_bomb, text_bomb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from listed_records import list_source
from PIL import Image

import music_jax
from music_jax.checkpoint.integrity import find_damage, write_checksums
from music_jax.data.crops import Crop, center_crop
from music_jax.data.decode import decode, read_header, without_texts
from music_jax.data.folder import open_folder
from music_jax.data.loader import training_batches
from music_jax.data.order import TrainingOrder
from music_jax.errors import MusicError, UndecodableError, UserError
from music_jax.workdir.directory import open_workdir
from music_jax.workdir.files import parse_json
from music_jax.workdir.logs import MetricsLog

_PACKAGE = pathlib.Path(music_jax.__file__).parent
_QUICK = sorted(set(TARGETS) - {"tfds", "checkpoint", "archives", "weights"})


@pytest.mark.parametrize("target", _QUICK)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32 - 1))
def test_hostile_input_is_accepted_or_a_clear_error(tmp_path_factory, target, seed):
    base = tmp_path_factory.mktemp("fuzz")
    (base / "outside").mkdir()
    (base / "outside" / "secret.png").write_bytes(b"secret")
    (base / "case").mkdir()
    with contextlib.suppress(MusicError):
        TARGETS[target](random.Random(seed), base / "case")
    assert {path.name for path in base.iterdir()} == {"case", "outside"}
    assert [path.read_bytes() for path in (base / "outside").iterdir()] == [b"secret"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(text=_JSON.map(json.dumps) | st.text(max_size=40))
def test_json_is_read_as_the_standard_library_reads_it_or_refused(text):
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match=r".*"):
            parse_json(text)
    else:
        assert json.dumps(parse_json(text)) == json.dumps(expected)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 900 + "1" + "}" * 900])
def test_deeply_nested_json_is_refused(text):
    with pytest.raises(ValueError, match="nested"):
        parse_json(text)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_texts_of_a_png_are_not_decompressed(kind):
    encoded = text_bomb(kind, 300, 7_900_000)  # 2.4 GB
    assert kind not in without_texts(encoded)
    assert decode(encoded, 3).shape == (37, 24, 3)  # turned by its Exif


def test_a_jpeg_of_many_scans_is_refused_but_not_for_what_follows_it():
    for mode in ("L", "RGB"):
        with pytest.raises(UndecodableError, match="scans"):
            read_header(scan_bomb(200, 64, mode))
        followed = scan_bomb(3, 64, mode) + b"\xff\xda" * 500
        assert decode(followed, 3).shape == (64, 64, 3)


@pytest.mark.parametrize("components", [1, 3])
def test_what_follows_the_only_scan_of_a_sequential_jpeg_is_not_decoded(components):
    image = np.zeros((1024, 1024, components), np.uint8)
    whole = cv2.imencode(".jpg", image)[1].tobytes()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    many = whole[:-2] + scan * 10_000 + b"\xff\xd9"  # minutes, if each were decoded
    np.testing.assert_array_equal(decode(many, components), decode(whole, components))


def test_each_scan_of_one_component_is_counted():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = cv2.imencode(".jpg", image)[1].tobytes()
    at = whole.rindex(b"\xff\xda")
    only_luma = whole[: at + 4] + b"\x01\x01\x00\x00\x3f\x00"
    with pytest.raises(UndecodableError, match="scans"):
        read_header(only_luma + (b"\xff\xda\x00\x08\x01\x02\x11\x00\x3f\x00") * 200)


def _png(height, width, **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("scale", [(0.08, 1.0), (1.0, 1.0)])
def test_a_png_rotated_by_exif_is_cropped_within_its_borders(scale):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = _png(2, 200, exif=exif)
    source = list_source("turned", [{"image": turned, "label": 0}], 1)
    order = TrainingOrder(1, 1, 0)
    options = {"channels": 3, "positions": np.arange(1), "num_steps": 20, "num_threads": 1}
    views = {"images": (Crop(8, scale), 2)}
    for batch in training_batches(source, order, views=views, **options):
        assert batch["images"].std() > 0


def test_a_strip_is_not_enlarged_as_a_whole():
    strip = np.zeros((1, 10**6, 1), np.uint8)  # 256 high it would be 65 GB
    assert center_crop(strip, 224, 256).shape == (224, 224, 1)
    gradient = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (10, 1, 1))
    assert abs(center_crop(gradient, 10, 10).mean() - 99.5) < 0.1


def test_links_do_not_multiply_the_images(tmp_path):
    for depth in range(20):
        folder = tmp_path / f"f{depth}"
        folder.mkdir()
        (folder / "x.png").write_bytes(_png(2, 2))
        for name in ("a", "b"):
            (folder / name).symlink_to(f"../f{(depth + 1) % 20}")
    assert len(open_folder(str(tmp_path))) == 20  # 2^20 by all ways


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json.new", ".writable.0", "checkpoints"])
def test_a_workdir_whose_links_lead_out_is_refused_before_anything_is_written(tmp_path, name):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / name).symlink_to("../elsewhere")
    with pytest.raises(UserError, match=f"{name} in the workdir is a link"):
        open_workdir(str(workdir))
    assert not (tmp_path / "elsewhere").exists()


def test_a_log_with_a_partial_last_line_continues_on_a_new_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    log = MetricsLog(epath.Path(tmp_path), 2)
    log.write({"step": 3})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(".")])
def test_a_checkpoint_with_a_pipe_or_a_link_in_it_is_damaged(tmp_path, make):
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    write_checksums(epath.Path(tmp_path))
    assert find_damage(epath.Path(tmp_path)) is None
    make(tmp_path / "odd")
    assert "odd is neither a file nor a directory" in find_damage(epath.Path(tmp_path))


_RUNS_CODE = {"eval", "exec", "compile", "__import__"}
_UNPICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch"}


def test_nothing_in_the_package_unpickles_or_evaluates_text():
    found = []
    for path in _PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if _UNPICKLES & {name.partition(".")[0] for name in names}:
                found.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.Call):
                called = node.func
                if isinstance(called, ast.Name) and called.id in _RUNS_CODE:
                    found.append(f"{path.name}:{node.lineno}")
                if any(
                    keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
                    for keyword in node.keywords
                ):
                    found.append(f"{path.name}:{node.lineno}")
    assert not found
