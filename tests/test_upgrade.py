"""A run that an earlier version saved is resumed, evaluated, exported and reported by this one.

`saved_runs/c416cde.tar.xz` is the workdir of configs/digits.py in small, made by commit c416cde and
stopped by SIGTERM at step 13 of 22:

    python -m music_jax.main --config=configs/digits.py --config.num_epochs=2 \\
        --config.optimizer.warmup_epochs=1 --config.optimizer.name=lars \\
        --config.log_every_steps=1 --config.checkpoint.max_to_keep=1 --config.batch_size=128 \\
        --config.backbone.name=tiny_resnet "--config.projector.hidden_sizes=(4,)" \\
        --config.objective.num_segments=4 --config.objective.units_per_segment=8 \\
        --config.linear_eval.num_epochs=2 --config.linear_eval.raw_pixels=False \\
        --config.linear_eval.random_init=False --config.tensorboard=False

with JAX_NUM_CPU_DEVICES=1, without its compilation cache, and with `data_dir` set to null.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest
from processes import DIGITS, metrics, start
from sklearn.datasets import load_digits

import music_jax

_SAVED = pathlib.Path(__file__).parent / "saved_runs" / "c416cde.tar.xz"
_CONFIG = (
    DIGITS,
    "--config.num_epochs=2",
    "--config.optimizer.warmup_epochs=1",
    "--config.optimizer.name=lars",
    "--config.log_every_steps=1",
    "--config.checkpoint.max_to_keep=1",
    "--config.batch_size=128",
    "--config.backbone.name=tiny_resnet",
    "--config.projector.hidden_sizes=(4,)",
    "--config.objective.num_segments=4",
    "--config.objective.units_per_segment=8",
    "--config.linear_eval.num_epochs=2",
    "--config.linear_eval.raw_pixels=False",
    "--config.linear_eval.random_init=False",
    "--config.tensorboard=False",
)
# Of the first three digits, the first four of 768 features, and the mean and the standard deviation
# of all, as `music_jax.load` of commit c416cde computed them.
_FEATURES = [
    [0.6214486360549927, 0.42159709334373474, 1.1153852939605713, 0.0],
    [0.0, 0.4369173049926758, 0.0, 0.0],
    [1.3872509002685547, 0.4862997233867645, 0.21311470866203308, 0.0],
]
_MEAN, _DEVIATION = 0.45250267, 0.6516516


@pytest.fixture
def workdir(tmp_path):
    with tarfile.open(_SAVED) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # not before 3.11.4
        archive.extractall(tmp_path / "run")
    return tmp_path / "run"


def _check_features(path):
    images = np.round(load_digits().images[:3] * (255 / 16)).astype(np.uint8)[..., None]
    features = np.asarray(music_jax.load(path)(images))
    np.testing.assert_allclose(features[:, :4], _FEATURES, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([features.mean(), features.std()], [_MEAN, _DEVIATION], rtol=1e-4)


def test_the_backbone_of_an_earlier_run_gives_the_same_features(workdir):
    _check_features(workdir)


@pytest.mark.slow
def test_every_command_accepts_a_run_of_an_earlier_version(workdir, tmp_path):
    env = {"TFDS_DATA_DIR": str(tmp_path / "tfds")}

    def run(command, *arguments):
        process = start(
            f"music_jax.{command}", *arguments, f"--workdir={workdir}", env=env, devices=1
        )
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        return out

    before = metrics(workdir)
    assert [line["step"] for line in before] == list(range(1, 14))

    exported = tmp_path / "exported.safetensors"
    run("export", "--format=safetensors", f"--output={exported}")
    _check_features(exported)
    run("evaluate", "--protocols=knn", "--config.dataset.name=digits")  # prepares it
    assert json.loads((workdir / "knn.json").read_text())["step"] == 13
    run("report")
    assert "</html>" in (workdir / "report.html").read_text()

    assert "after step 13" in run("main", *_CONFIG)
    after = metrics(workdir)
    assert after[:13] == before
    assert [line["step"] for line in after[13:]] == list(range(14, 23))
    assert all(np.isfinite(line["loss"]) for line in after)
    for name in ("linear_eval", "knn"):
        assert json.loads((workdir / f"{name}.json").read_text())["step"] == 22
