"""TensorBoard and Weights & Biases: enabled or not, installed or not, and failing."""

import importlib.util
import json
import os
import types

import numpy as np
import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from music_jax.config import default_config
from music_jax.data.loader import TrainingOrder
from music_jax.errors import UserError
from music_jax.train import metric_logger
from music_jax.train.metric_logger import (
    MetricLogger,
    TensorBoard,
    WeightsAndBiases,
    small_data_warnings,
)


def _config(**fields):
    config = default_config()
    config.update({"tensorboard": False} | fields)
    return config


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_missing_tensorboardx_is_logged(tmp_path, nothing_installed, capsys):
    with MetricLogger(_config(tensorboard=True), epath.Path(tmp_path)) as logger:
        assert not logger.shows_images
    assert capsys.readouterr().out.count("pip install 'music_jax[tensorboard]'") == 1
    with MetricLogger(_config(), epath.Path(tmp_path)):
        pass
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def _read_events(workdir):
    """Scalars and sizes of images by tag, as TensorBoard shows them."""
    read = EventAccumulator(str(workdir)).Reload()
    shown = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    for tag in read.Tags()["images"]:
        shown[tag] = [(e.step, [e.width, e.height]) for e in read.Images(tag)]
    return shown


def test_tensorboard_shows_each_step_once_after_a_resume_and_a_rewind(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 100)
    writer = TensorBoard(epath.Path(tmp_path))
    writer.start(0)
    for step in range(1, 6):
        writer.scalars(step, {"loss": float(step)})
        writer.images(step, {"views": np.zeros((6, 4, 1), np.uint8)})
    writer.close(failed=True)
    monkeypatch.setattr(os, "getpid", lambda: 101)
    resumed = TensorBoard(epath.Path(tmp_path))
    resumed.start(3)
    resumed.scalars(4, {"loss": 40.0})
    resumed.start(0)
    resumed.scalars(1, {"loss": 10.0})
    resumed.start(1)
    resumed.scalars(2, {"loss": 20.0})
    resumed.images(2, {"views": np.zeros((6, 4, 3), np.uint8)})
    resumed.close(failed=False)
    assert len(list(tmp_path.iterdir())) == 4
    assert _read_events(tmp_path) == {"loss": [(1, 10.0), (2, 20.0)], "views": [(2, [4, 6])]}


def test_enabling_wandb_without_its_package_is_an_error(tmp_path, nothing_installed):
    with pytest.raises(UserError, match=r"wandb_project = 'digits' needs .*pip install wandb"):
        MetricLogger(_config(wandb_project="digits"), epath.Path(tmp_path))


class _Failing:
    def __init__(self, fails):
        self.fails, self.seen = fails, []

    def start(self, step):
        self.seen.append(step)

    def scalars(self, step, values):
        self.seen.append(step)
        if step == self.fails:
            raise OSError("No space left on device")

    def close(self, *, failed):
        self.seen.append("failed" if failed else "closed")


def test_a_writer_that_fails_is_reported_and_dropped_and_the_others_continue(tmp_path, capsys):
    first, second = _Failing(fails=2), _Failing(fails=None)
    training = types.SimpleNamespace(order=TrainingOrder(30, 10, 0), num_steps=9)
    with MetricLogger(_config(batch_size=10), epath.Path(tmp_path)) as logger:
        logger._writers = {"TensorBoard": first, "Weights & Biases": second}
        with logger.steps(0, training):
            for step in (1, 2, 3):
                logger.write(step, {"loss": 1.0})
    out = capsys.readouterr().out
    assert out.count("TensorBoard failed and is no longer written: OSError: No space left") == 1
    assert first.seen == [0, 1, 2]
    assert second.seen == [0, 1, 2, 3, "closed"]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in logged] == [(1, 1 / 3), (2, 2 / 3), (3, 1)]
    assert logged[0]["images_per_second"] is None
    assert logged[1]["images_per_second"] > 0


def test_a_run_that_ends_in_an_error_is_closed_as_failed(tmp_path):
    writer, logger = _Failing(fails=None), MetricLogger(_config(), epath.Path(tmp_path))
    logger._writers = {"TensorBoard": writer}
    with pytest.raises(KeyboardInterrupt), logger:
        raise KeyboardInterrupt
    assert writer.seen == ["failed"]


@pytest.mark.parametrize("damaged", ["{", '{"id": "../x"}', '{"id": 3}', "[]"])
def test_a_damaged_run_id_is_replaced_and_a_valid_one_reused(tmp_path, damaged, capsys):
    (tmp_path / "wandb.json").write_text(damaged)
    writer = WeightsAndBiases(_config(wandb_project="x"), epath.Path(tmp_path))
    new = writer._run_id()
    assert "is damaged" in capsys.readouterr().out
    assert metric_logger._RUN_ID.fullmatch(new)
    assert writer._run_id() == new
    assert capsys.readouterr().out == ""


def test_wandb_rejects_repeated_steps(tmp_path):
    writer = WeightsAndBiases(_config(wandb_project="x"), epath.Path(tmp_path))
    logged = []

    class Run:
        step = 5

        @staticmethod
        def log(values, step):
            logged.append(step)

    writer._run = Run
    for step in (4, 5, 6):
        writer.scalars(step, {"loss": np.float32(1)})
    assert logged == [5, 6]


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
