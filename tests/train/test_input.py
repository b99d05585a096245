"""A run resumes only with the images that it began with; the memory that its input takes."""

import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from etils import epath
from processes import ROOT
from small_runs import small_config

from music_jax.config import default_config
from music_jax.data.datasets import open_path
from music_jax.data.order import TrainingOrder
from music_jax.data.packing import Packing, pack
from music_jax.errors import UserError
from music_jax.train import train_and_evaluate
from music_jax.train.input import check_same_images, small_data_warnings


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(9):
        cv2.imwrite(str(folder / f"{i}.bmp"), rng.integers(0, 256, (4, 4, 3), np.uint8))
    return folder


def _check(tmp_path, folder, *, resuming):
    (tmp_path / "run").mkdir(exist_ok=True)
    check_same_images(epath.Path(tmp_path / "run"), open_path(str(folder)), resuming=resuming)


def _rename(folder):
    (folder / "0.bmp").rename(folder / "x.bmp")


def _swap(folder):
    (folder / "0.bmp").rename(folder / "x")
    (folder / "1.bmp").rename(folder / "0.bmp")
    (folder / "x").rename(folder / "1.bmp")


def _replace(folder):  # as large as before
    content = bytearray((folder / "5.bmp").read_bytes())
    content[-1] ^= 1
    (folder / "5.bmp").write_bytes(content)


def _enlarge(folder):
    cv2.imwrite(str(folder / "3.bmp"), np.zeros((5, 4, 3), np.uint8))


def _add(folder):
    shutil.copy(folder / "3.bmp", folder / "33.bmp")


@pytest.mark.parametrize("change", [_rename, _swap, _replace, _enlarge, _add])
def test_a_run_is_not_resumed_with_other_images(photos, tmp_path, change):
    _check(tmp_path, photos, resuming=False)
    change(photos)
    with pytest.raises(UserError, match=r"images of .*photos have changed .*remove .*images\.json"):
        _check(tmp_path, photos, resuming=True)
    (tmp_path / "run" / "images.json").unlink()  # as the message says
    _check(tmp_path, photos, resuming=True)
    _check(tmp_path, photos, resuming=True)


def test_a_run_without_a_checkpoint_begins_with_what_is_there(photos, tmp_path):
    _check(tmp_path, photos, resuming=False)
    _rename(photos)
    _check(tmp_path, photos, resuming=False)
    _check(tmp_path, photos, resuming=True)


def test_a_copy_of_a_folder_holds_the_same_images(photos, tmp_path):
    _check(tmp_path, photos, resuming=False)
    for path in photos.iterdir():
        shutil.copyfile(path, photos / "copy")  # with another modification time
        (photos / "copy").rename(path)
    (photos / "notes.txt").touch()
    photos.rename(tmp_path / "elsewhere")
    _check(tmp_path, tmp_path / "elsewhere", resuming=True)


def test_packed_images_are_compared_too(photos, tmp_path):
    def packed(name):
        pack(open_path(str(photos)), epath.Path(tmp_path / name), Packing(shard_size=4))
        return tmp_path / name

    first = packed("packed")
    _check(tmp_path, first, resuming=False)
    first.rename(tmp_path / "moved")
    _check(tmp_path, tmp_path / "moved", resuming=True)
    _replace(photos)
    with pytest.raises(UserError, match="have changed"):
        _check(tmp_path, packed("other"), resuming=True)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100])
def test_a_damaged_file_is_named_with_what_to_do(photos, tmp_path, content):
    _check(tmp_path, photos, resuming=False)
    (tmp_path / "run" / "images.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot read .*images\.json: .*remove it to resume"):
        _check(tmp_path, photos, resuming=True)
    (tmp_path / "run" / "images.json").write_text(json.dumps({"fingerprint": "another"}))
    with pytest.raises(UserError, match="have changed"):
        _check(tmp_path, photos, resuming=True)


@pytest.mark.slow
def test_a_training_refuses_images_that_were_renamed_since_it_was_stopped(photos, tmp_path):
    config = small_config(name="tiny_resnet")
    config.dataset.update({"path": str(photos), "name": "", "num_channels": 3})
    config.dataset.update({"mean": (0.5,) * 3, "std": (0.5,) * 3})
    config.crop.size = config.crop.eval_resize = 8
    config.update({"batch_size": 8, "num_epochs": 2, "tensorboard": False})
    config.checkpoint.update({"every_steps": 1, "max_to_keep": 9})
    config.optimizer.warmup_epochs = 0
    train_and_evaluate(config, str(tmp_path / "run"))
    _rename(photos)
    train_and_evaluate(config, str(tmp_path / "run"))  # it is done: no image is read
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    with pytest.raises(UserError, match="have changed"):
        train_and_evaluate(config, str(tmp_path / "run"))
    (photos / "x.bmp").rename(photos / "0.bmp")
    assert int(train_and_evaluate(config, str(tmp_path / "run")).step) == 2


@pytest.mark.parametrize(
    ("images", "batch_size", "epochs", "log_every_steps", "expected"),
    [
        (12_800, 256, 100, 50, []),  # 50 steps an epoch
        (12_900, 256, 100, 50, []),  # 100 images are left out, 0.8 %
        (
            301,
            256,
            100,
            50,
            [
                "an epoch of 301 images has only 1 step with config.batch_size = 256",
                "each epoch omits 45 of 301 images (15%)",
                "metrics are logged once in 50.0 epochs; a smaller config.log_every_steps",
            ],
        ),
        (2304, 256, 100, 9, ["an epoch of 2304 images has only 9 steps with"]),
        (2560, 256, 100, 10, []),
        (2560, 256, 4, 41, ["the run has fewer steps than config.log_every_steps = 41"]),
        (2560, 256, 4, 40, ["metrics are logged once in 4.0 epochs"]),
        (1437, 128, 100, 11, ["each epoch omits 29 of 1437 images (2%)"]),
    ],
)
def test_small_data_gives_warnings(images, batch_size, epochs, log_every_steps, expected):
    config = default_config()
    config.batch_size, config.num_epochs = batch_size, epochs
    config.log_every_steps = log_every_steps
    warnings = small_data_warnings(config, TrainingOrder(images, batch_size, 0))
    assert len(warnings) == len(expected)
    for warning, beginning in zip(warnings, expected, strict=True):
        assert warning.startswith(beginning)


_READ = """
import json, os, sys, threading, time
import cv2, jax, numpy as np, psutil
from music_jax.config import default_config
from music_jax.data.folder import open_folder
from music_jax.data.order import TrainingOrder
from music_jax.data.skipped import open_skipped
from music_jax.distributed import limit_malloc_arenas
from music_jax.distributed.mesh import make_data_mesh
from music_jax.train.input import TrainingInput, host_bytes
from etils import epath

folder, batch_size = sys.argv[1], int(sys.argv[2])
limit_malloc_arenas()
rng = np.random.default_rng(0)
os.mkdir(folder + "/images")
for i in range(128):
    noise = rng.integers(0, 256, (375, 500, 3), np.uint8)
    cv2.imwrite(f"{folder}/images/{i}.jpg", noise, [cv2.IMWRITE_JPEG_QUALITY, 50])
config = default_config()
config.num_decode_threads, config.num_epochs, config.crop.size = 2, 16, 224
source, mesh = open_folder(folder + "/images"), make_data_mesh(1)
skipped = open_skipped(epath.Path(folder), config)

def read(size, steps):
    config.batch_size = size
    training = TrainingInput(config, source, TrainingOrder(128, size, 0), mesh, skipped)
    for step, batch in zip(range(steps), training.on_devices(0)):
        jax.block_until_ready(batch)
        yield step

list(read(2, 8))  # loads the libraries and starts their threads
process = psutil.Process()
before, most = process.memory_info().rss, 0
for step in read(batch_size, 6):
    time.sleep(0.3)  # as long as a step, in which batches are read ahead
    most = max(most, process.memory_info().rss)
file_bytes = max(os.path.getsize(f"{folder}/images/{i}.jpg") for i in range(128))
bound = host_bytes(config, batch_size, file_bytes=file_bytes, image_bytes=500 * 375 * 3)
print(json.dumps([most - before, bound]))
"""


@pytest.mark.parametrize("batch_size", [32, 128])
def test_the_input_takes_at_most_the_memory_that_a_plan_says(tmp_path, batch_size):
    command = [sys.executable, "-c", _READ, str(tmp_path), str(batch_size)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    measured, bound = json.loads(found.stdout.splitlines()[-1])
    # The bound excludes the process itself, whose libraries and allocator grow by some megabytes.
    assert 0.2 * bound < measured < bound + 2**25
