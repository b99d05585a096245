"""TensorBoard and Weights & Biases: asked for or not, there or not, and failing."""

import importlib.util

import numpy as np
import pytest
from etils import epath

from music_jax.config import default_config
from music_jax.errors import UserError
from music_jax.train import writers as writers_lib
from music_jax.train.writers import WeightsAndBiases, Writers


def _config(**fields):
    config = default_config()
    config.update({"tensorboard": False} | fields)
    return config


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_without_tensorboard_a_line_says_so_once_when_the_training_starts(
    tmp_path, nothing_installed, capsys
):
    with Writers(_config(tensorboard=True), epath.Path(tmp_path)) as writers:
        assert not writers.any
        assert capsys.readouterr().out == ""
        writers.start(0)
        writers.start(5)
        writers.scalars(6, {"loss": 1.0})
    assert capsys.readouterr().out.count("pip install 'music_jax[tensorboard]'") == 1
    with Writers(_config(), epath.Path(tmp_path)) as writers:
        writers.start(0)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_wandb_that_is_asked_for_but_absent_is_an_error(tmp_path, nothing_installed):
    with pytest.raises(UserError, match=r"wandb_project = 'digits' needs .*pip install wandb"):
        Writers(_config(wandb_project="digits"), epath.Path(tmp_path))


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


def test_a_writer_that_fails_is_told_and_left_out_and_the_others_go_on(tmp_path, capsys):
    first, second = _Failing(fails=2), _Failing(fails=None)
    with Writers(_config(), epath.Path(tmp_path)) as writers:
        writers._writers = {"TensorBoard": first, "Weights & Biases": second}
        writers.start(0)
        for step in (1, 2, 3):
            writers.scalars(step, {"loss": 1.0})
    out = capsys.readouterr().out
    assert out.count("TensorBoard is left out from here on: OSError: No space left") == 1
    assert first.seen == [0, 1, 2]
    assert second.seen == [0, 1, 2, 3, "closed"]


def test_a_run_that_ends_in_an_error_is_closed_as_failed(tmp_path):
    writer, writers = _Failing(fails=None), Writers(_config(), epath.Path(tmp_path))
    writers._writers = {"TensorBoard": writer}
    with pytest.raises(KeyboardInterrupt), writers:
        raise KeyboardInterrupt
    assert writer.seen == ["failed"]


@pytest.mark.parametrize("damaged", ["{", '{"id": "../x"}', '{"id": 3}', "[]"])
def test_damaged_id_of_a_run_is_replaced_and_a_good_one_kept(tmp_path, damaged, capsys):
    (tmp_path / "wandb.json").write_text(damaged)
    writer = WeightsAndBiases(_config(wandb_project="x"), epath.Path(tmp_path))
    new = writer._run_id()
    assert "wandb.json is damaged" in capsys.readouterr().out
    assert writers_lib._RUN_ID.fullmatch(new)
    assert writer._run_id() == new
    assert capsys.readouterr().out == ""


def test_wandb_takes_no_step_that_it_has(tmp_path):
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
