"""Trainings that start from given weights, and those that update only some of their parameters."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from processes import DIGITS, checkpoint, free_port, start
from small_runs import save_run
from tiny_training import tiny_config

from music_jax.config import from_file
from music_jax.distributed.signals import Stop
from music_jax.errors import UserError
from music_jax.train import loop, train_and_evaluate


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def source(config, tmp_path_factory):
    """The workdir of a run, and the state that it ended with."""
    workdir = tmp_path_factory.mktemp("source") / "run"
    return workdir, train_and_evaluate(config, workdir)


def _from(config, source):
    config = config.copy_and_resolve_references()
    config.seed, config.backbone.init_from = 1, str(source)
    return config


def _assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


class _InterruptAtStep3(Stop):
    _step = 0

    def begin(self):
        self._step += 1
        if self._step == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_run_needs_the_weights_no_longer(config, source, tmp_path, capsys):
    shutil.copytree(source[0], tmp_path / "source")
    config = _from(config, tmp_path / "source")
    config.optimizer.backbone_scale = 0.0
    whole = train_and_evaluate(config, tmp_path / "whole")
    assert "source (run, step 6): " in capsys.readouterr().out
    # The parameters are those of the source to the bit; the running statistics follow the images.
    _assert_same(whole.params["backbone"], source[1].params["backbone"])
    stats = [np.asarray(x.batch_stats["backbone"]["norm"]["mean"]) for x in (whole, source[1])]
    assert np.abs(stats[0] - stats[1]).max() > 1e-6
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(config, tmp_path / "resumed", stop=_InterruptAtStep3())
    shutil.rmtree(tmp_path / "source")
    resumed = train_and_evaluate(config, tmp_path / "resumed")
    _assert_same((resumed.params, resumed.batch_stats), (whole.params, whole.batch_stats))
    config.backbone.init_from = str(source[0])
    with pytest.raises(UserError, match=r"backbone\.init_from: .* there, .* now"):
        train_and_evaluate(config, tmp_path / "resumed")


def test_wrong_weights_end_a_run_before_its_config_is_stored(config, source, tmp_path):
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"config\.backbone\.init_from: "):
            train_and_evaluate(_from(config, wrong), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    corrected = _from(config, source[0])
    state = train_and_evaluate(corrected, tmp_path / "run")
    assert int(state.step) == 6
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert saved["backbone"]["init_from"] == str(source[0])


def test_frozen_stages_keep_their_bits_and_later_ones_train(config, source, tmp_path):
    config = _from(config, source[0])
    config.backbone.frozen_stages = 2
    config.optimizer.name = "sgd"
    before = source[1].params["backbone"]
    after = train_and_evaluate(config, tmp_path / "run").params["backbone"]
    for name in ("conv", "norm"):
        _assert_same(after[name], before[name])
    _assert_same(after["blocks"][0], before["blocks"][0])
    moved = np.abs(after["blocks"][1]["conv1"]["kernel"] - before["blocks"][1]["conv1"]["kernel"])
    assert moved.min() > 0


def test_a_rewind_to_the_start_starts_from_the_weights_again(config, source, tmp_path, monkeypatch):
    first_state, states = loop._first_state, []

    def recorded(*arguments):
        states.append(jax.device_get(first_state(*arguments).params["backbone"]))
        return first_state(*arguments)

    compile_step, broken = loop.compile_step, []

    def compiled(*arguments):
        step_function = compile_step(*arguments)

        def step(state, *batch):
            if not broken:
                broken.append(True)
                params = jax.tree.map(lambda x: x * np.float32(np.nan), state.params)
                state = dataclasses.replace(state, params=params)
            return step_function(state, *batch)

        return step

    monkeypatch.setattr(loop, "_first_state", recorded)
    monkeypatch.setattr(loop, "compile_step", compiled)
    config = _from(config, source[0])
    config.guards.policy = "rewind"
    train_and_evaluate(config, tmp_path / "run")
    assert len(states) == 2
    for state in states:
        _assert_same(state, source[1].params["backbone"])


@pytest.mark.slow
def test_two_processes_start_from_the_same_weights(tmp_path):
    config = from_file("digits", backbone={"name": "tiny_resnet"})
    save_run(tmp_path / "source", config)
    given = (
        DIGITS,
        "--config.num_epochs=1",
        "--config.optimizer.warmup_epochs=0",
        "--config.batch_size=512",
        "--config.backbone.name=tiny_resnet",
        "--config.linear_eval.num_epochs=1",
        f"--config.backbone.init_from={tmp_path / 'source'}",
        "--config.optimizer.backbone_scale=0.0",
        f"--workdir={tmp_path / 'run'}",
        f"--coordinator_address=127.0.0.1:{free_port()}",
        "--num_processes=2",
    )
    processes = [start("music_jax.main", *given, f"--process_id={i}", devices=2) for i in range(2)]
    try:
        errors = [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    before, after = checkpoint(tmp_path / "source", 3), checkpoint(tmp_path / "run", step)
    names = [name for name in before if "params" in name and "backbone" in name]
    assert len(names) == 21
    for name in names:
        np.testing.assert_array_equal(after[name], before[name])
