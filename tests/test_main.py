"""`python -m music_jax.main` and `linear_eval` from start to end, as processes."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import DIGITS, ROOT, SMALL, checkpoint, metrics, run, run_in_terminal, start

_MAIN, _LINEAR_EVAL = "music_jax.main", "music_jax.linear_eval"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"--config.dataset.data_dir={tmp_path_factory.mktemp('tfds')}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """The workdir, and the standard output, of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    code, out, err = run(_MAIN, DIGITS, *SMALL, data, f"--workdir={workdir}")
    assert code == 0, err
    return workdir, out


def _copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


@pytest.mark.slow
def test_a_run_writes_the_documented_files(finished):
    workdir, out = finished
    config = json.loads((workdir / "config.json").read_text())
    assert config["config"]["num_epochs"] == 2
    assert {"jax", "flax", "optax", "orbax-checkpoint", "music_jax"} <= config["versions"].keys()
    assert config["devices"]["count"] == 1
    lines = metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, 23))
    expected = {"epoch", "loss", "diagonal", "cross_segment", "invariance", "learning_rate"}
    assert all(expected | {"images_per_second"} <= line.keys() for line in lines)
    linear = json.loads((workdir / "linear_eval.json").read_text())
    assert (linear["num_train"], linear["num_test"], linear["step"]) == (1437, 360, 22)
    for name in ("top1", "top5", "raw_pixels_top1", "random_init_top1"):
        assert 0.1 < linear[name] <= 1
    assert linear["hyper_parameters"]["linear_eval"]["num_epochs"] == 2
    assert linear["learning_rate"] > 0
    assert (workdir / "checkpoints" / "22").is_dir()
    assert "parameters   599,368 (backbone 75,080, projector 524,288)\n" in out
    assert "kernel" not in out
    assert "Next:" not in out  # no terminal
    for text in ("lower bound", "trained backbone", "random backbone", "raw pixels"):
        assert text in out
    assert f"{100 * linear['top1']:.1f} %" in out


@pytest.mark.slow
def test_the_first_and_the_last_step_are_always_logged(data, tmp_path):
    rarely = ("--config.log_every_steps=1000", "--config.checkpoint.every_steps=1000")
    code, out, err = run(_MAIN, DIGITS, *SMALL, *rarely, data, f"--workdir={tmp_path / 'run'}")
    assert code == 0, err
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 22]
    assert out.count("warning: the run has fewer steps than config.log_every_steps = 1000") == 1
    assert "each epoch omits 29 of 1437 images (2%)" in out


@pytest.mark.slow
def test_rerunning_trains_nothing_and_reports_it(finished, data):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    code, out, err = run(_MAIN, DIGITS, *SMALL, data, f"--workdir={workdir}")
    assert (code, (workdir / "metrics.jsonl").read_bytes()) == (0, before)
    assert "is done: 22 steps" in out
    assert "trained backbone" in out
    assert "pre-training" not in err


@pytest.mark.slow
def test_the_commands_that_a_terminal_shows_at_the_end_work(finished, data, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "a user's $run")
    command = [
        sys.executable,
        "-m",
        _MAIN,
        DIGITS,
        *SMALL,
        data,
        f"--workdir={workdir}",
        "--verbose",
    ]
    code, drawn = run_in_terminal(command)
    assert code == 0, drawn
    shown = [line for line in drawn.splitlines() if " -m music_jax." in line]
    assert len(shown) == 3
    for line in shown:
        shell = line[line.index(sys.executable) :] if sys.executable in line else line[26:]
        subprocess.run(["bash", "-c", shell], cwd=ROOT, check=True, timeout=600)
    for file in ("report.html", "segments.json", "backbone.safetensors"):
        assert (workdir / file).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(
    finished, data, tmp_path, number, own_compilation_cache
):
    workdir = tmp_path / "run"
    arguments = (_MAIN, DIGITS, *SMALL, data, f"--workdir={workdir}")
    process = start(*arguments)
    stop_after = random.Random().randint(1, 10)  # and some steps for the signal to be heard
    log = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") >= stop_after:
            break
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 75, err
    assert "rerun the command to resume" in err.splitlines()[-1]
    stopped = metrics(workdir)[-1]["step"]
    assert stop_after <= stopped < 22
    assert (workdir / "checkpoints" / str(stopped)).is_dir()

    code, out, err = run(*arguments)
    assert code == 0, err
    assert f"after step {stopped}" in out
    # The step was not compiled again, and so not kept once more.
    assert len(list(own_compilation_cache.glob("jit_training_step-*"))) == 1
    assert [line["step"] for line in metrics(workdir)] == list(range(1, 23))
    expected, found = checkpoint(finished[0], 22), checkpoint(workdir, 22)
    assert expected.keys() == found.keys()
    assert any("params" in name for name in found)
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name
    for file in ("linear_eval.json", "knn.json"):
        assert (workdir / file).read_text() == (finished[0] / file).read_text()


@pytest.mark.slow
def test_a_killed_run_with_local_views_ends_with_the_bits_of_one_without_online_measures(
    data, tmp_path
):
    local = ("--config.local_views.count=2", "--config.local_views.size=6")
    arguments = (_MAIN, DIGITS, *SMALL, *local, data)
    code, _, err = run(*arguments, f"--workdir={tmp_path / 'undisturbed'}")
    assert code == 0, err
    workdir = tmp_path / "killed"
    arguments = (*arguments, "--config.online.every_steps=2", f"--workdir={workdir}")
    for step in sorted(random.Random().sample(range(3, 19), 2)):
        process = start(*arguments)
        log, deadline = workdir / "metrics.jsonl", time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and f'{{"step": {step},' in log.read_text():
                break
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    code, _, err = run(*arguments)
    assert code == 0, err
    logged = metrics(workdir)
    assert [line["step"] for line in logged] == list(range(23))
    assert [line["step"] for line in logged if "online_knn" in line] == list(range(0, 23, 2))
    expected, found = checkpoint(tmp_path / "undisturbed", 22), checkpoint(workdir, 22)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.slow
def test_linear_eval_repeats_the_metrics_and_accepts_other_settings(finished, tmp_path):
    workdir = _copy(finished, tmp_path)
    before = json.loads((workdir / "linear_eval.json").read_text())
    (workdir / "linear_eval.json").unlink()
    code, out, err = run(_LINEAR_EVAL, f"--workdir={workdir}")
    assert code == 0, err
    assert json.loads((workdir / "linear_eval.json").read_text()) == before
    assert "trained backbone" in out

    longer = "--config.linear_eval.num_epochs=3"
    code, _, err = run(_LINEAR_EVAL, f"--workdir={workdir}", longer, "--checkpoint=20")
    assert code == 0, err
    after = json.loads((workdir / "linear_eval.json").read_text())
    assert (after["step"], after["hyper_parameters"]["linear_eval"]["num_epochs"]) == (20, 3)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_3_and_names_the_step(data, tmp_path):
    workdir = tmp_path / "run"
    code, _, err = run(
        _MAIN,
        DIGITS,
        *SMALL,
        data,
        f"--workdir={workdir}",
        "--config.optimizer.name=sgd",
        "--config.optimizer.base_learning_rate=4e9",
        "--config.optimizer.weight_decay=4e9",
        "--config.checkpoint.every_steps=1",
    )
    assert code == 3, err
    last = err.splitlines()[-1]
    assert "not finite at step" in last
    diverged = int(last.partition("at step ")[2].split(";")[0])
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
    assert max(kept) == diverged - 1
    assert all(np.all(np.isfinite(x)) for x in checkpoint(workdir, max(kept)).values())


@pytest.mark.slow
def test_one_and_two_devices_train_the_same(data, tmp_path):
    low = "--config.optimizer.base_learning_rate=1e-5"
    losses = []
    for devices in (1, 2):
        workdir = tmp_path / str(devices)
        arguments = (DIGITS, *SMALL, data, low, f"--workdir={workdir}")
        code, _, err = run(_MAIN, *arguments, devices=devices)
        assert code == 0, err
        losses.append([line["loss"] for line in metrics(workdir)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "devices", "message"),
    [
        ((), 1, "--config=FILE is missing"),
        ((DIGITS,), 1, "--workdir is missing"),
        (("--config=nowhere.py", "--workdir=x"), 1, "there is no config file 'nowhere.py'"),
        (
            (DIGITS, "--config.optimizer.learning_rat=1"),
            1,
            "no field 'optimizer.learning_rat'; the nearest known one is "
            "'optimizer.base_learning_rate'",
        ),
        ((DIGITS, "--config.batch_size=many"), 1, "--config.batch_size=many"),
        ((DIGITS, "--workdi=x"), 1, "Did you mean: workdir"),
        ((DIGITS, "--workdir={tmp}/w", "--config.dataset.name=digit"), 1, "did you mean 'digits'"),
        (
            (DIGITS, "--workdir={tmp}/w", "--config.projector.output_size=500"),
            1,
            "need an embedding of 512, but config.projector.output_size is 500",
        ),
        (
            (DIGITS, "--workdir={tmp}/w", "--config.batch_size=127"),
            2,
            "batch_size = 127 cannot be divided over 2 devices; use 126 or 128",
        ),
        (
            (DIGITS, "--workdir={tmp}/w", "{data}", "--config.batch_size=1438"),
            1,
            "larger than the dataset digits:train of 1437 images",
        ),
        ((DIGITS, "--workdir={tmp}/file"), 1, "/file is a file; give a directory"),
        (
            (DIGITS, "--workdir={tmp}/w", "--config.accumulation_steps=0"),
            1,
            "config.accumulation_steps must be at least 1; got 0",
        ),
        ((DIGITS, "--workdir={tmp}/file/w"), 1, "cannot write to the workdir"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_code_2(arguments, devices, message, data, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = [a.format(tmp=tmp_path, data=data) for a in arguments]
    code, out, err = run(_MAIN, *arguments, devices=devices)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err + out


@pytest.mark.slow
def test_a_workdir_of_another_run_is_refused_and_left_alone(finished, data):
    workdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    code, _, err = run(
        _MAIN, DIGITS, *SMALL, data, f"--workdir={workdir}", "--config.objective.temperature=0.5"
    )
    assert code == 2
    assert "holds another run" in err
    assert "objective.temperature" in err
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    after.pop(workdir, None), before.pop(workdir, None)
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workdir={workdir}", "--checkpoint=7"), "there is no checkpoint '7'; the run has"),
        (("--workdir={workdir}", "--config.batch_size=64"), "cannot change after training"),
        (("--workdir={workdir}/nowhere",), "does not exist"),
        (("--workdir={workdir}/checkpoints",), "holds no run"),
        ((), "--workdir is missing"),
    ],
)
def test_linear_eval_refuses_what_cannot_be_evaluated(finished, arguments, message):
    arguments = [a.format(workdir=finished[0]) for a in arguments]
    code, _, err = run(_LINEAR_EVAL, *arguments)
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err


_RECORDING = """
import json, runpy, sys
import music_jax.train
from music_jax import errors

def record(config, workdir, *, profile_steps, stop):
    given = [config.batch_size, workdir, profile_steps]
    print(json.dumps([*given, type(stop).__name__, stop._alone, stop._grace_seconds]))
    raise errors.DivergedError("it diverged")

music_jax.train.train_and_evaluate = record
runpy.run_module("music_jax.main", run_name="__main__", alter_sys=True)
"""


def test_main_trains_what_its_flags_say_and_stops_on_signals(tmp_path):
    arguments = (
        DIGITS,
        "--config.batch_size=64",
        "--config.checkpoint.grace_seconds=7.5",
        "--profile=2:5",
        f"--workdir={tmp_path / 'run'}",
    )
    result = subprocess.run(
        [sys.executable, "-c", _RECORDING, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 3, result.stderr
    assert result.stderr.splitlines()[-1] == "error: it diverged"
    given = json.loads(result.stdout.splitlines()[-1])
    assert given == [64, str(tmp_path / "run"), [2, 5], "StopSignal", True, 7.5]


_FINISHED = """
import runpy
import music_jax.train
music_jax.train.train_and_evaluate = lambda *_, **__: None
runpy.run_module("music_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("name", "more"), [("it's mine; $HOME", ()), ("größer/", ("--import=uuid",))]
)
def test_a_finished_run_shows_the_next_commands_in_a_terminal_only(name, more, tmp_path):
    run = [*more, f"--workdir={tmp_path}/{name}"]
    command = [sys.executable, "-c", _FINISHED, DIGITS, *run]
    code, drawn = run_in_terminal(command, env={"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"})
    assert code == 0
    head, *lines = drawn.strip().splitlines()
    assert head == "Next:"
    output = f"--output={os.path.join(tmp_path, name, 'backbone.safetensors')}"
    assert [shlex.split(line[26:]) for line in lines] == [
        ["python", "-m", "music_jax.report", *run],
        ["python", "-m", "music_jax.evaluate", *run],
        ["python", "-m", "music_jax.export", *run, "--format=safetensors", output],
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("module", [_MAIN, _LINEAR_EVAL])
def test_help_is_printed_and_is_no_error(module):
    code, out, _ = run(module, "--help")
    assert code == 0
    for text in ("--workdir", "--config", "--coordinator_address", "Exit codes"):
        assert text in out
