"""TensorBoard, Weights & Biases and profiles of a run, read by the programs that display them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import DIGITS, ROOT, SMALL, metrics, run, start

_MAIN = "music_jax.main"

# wandb as far as it is used, which notes what it is told.
_WANDB = """
import json, os
class Image:
    def __init__(self, array):
        self.shape = list(array.shape)
class Run:
    step = 0
    def log(self, values, step):
        self.step = step
        note(step=step, values={k: getattr(v, "shape", v) for k, v in values.items()})
    def finish(self, exit_code):
        note(exit_code=exit_code)
def note(**what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")
def init(**arguments):
    if os.environ.get("OFFLINE_PLEASE"):
        raise RuntimeError("no API key\\nconfigured")
    note(init={k: v for k, v in arguments.items() if k != "config"} | {
        "seed": arguments["config"]["seed"]})
    return Run()
"""

_READ = """
import json, sys, types
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")  # TensorBoard's own reader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

read = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "images": 0}).Reload()
tags = read.Tags()
scalars = {tag: [[e.step, e.value] for e in read.Scalars(tag)] for tag in tags["scalars"]}
images = {tag: [[e.step, [e.width, e.height]] for e in read.Images(tag)] for tag in tags["images"]}
print(json.dumps({"scalars": scalars, "images": images}))
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Installs a fake `wandb` package; returns the file in which it records its calls."""
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_WANDB)
    notes = tmp_path / "notes.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("NOTES", str(notes))
    return notes


@pytest.mark.slow
def test_a_run_that_was_killed_shows_every_step_once_in_tensorboard_and_wandb(tmp_path, wandb):
    workdir, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    arguments = (
        _MAIN,
        DIGITS,
        *SMALL,
        f"--config.dataset.data_dir={tmp_path / 'tfds'}",
        f"--workdir={workdir}",
        "--config.tensorboard=true",
        "--config.wandb_project=digits",
        "--profile=20:21",
    )
    process = start(*arguments)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= 10:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert list(workdir.glob("events.out.tfevents.*"))

    code, out, err = run(*arguments)
    assert code == 0, err
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 2
    steps = list(range(1, 23))
    assert [line["step"] for line in metrics(workdir)] == steps

    shown = _read_events(workdir)
    losses = shown["scalars"]["loss"]
    assert [step for step, _ in losses] == steps
    expected = [line["loss"] for line in metrics(workdir)]
    assert [value for _, value in losses] == pytest.approx(expected, rel=1e-6)
    linear = json.loads((workdir / "linear_eval.json").read_text())["top1"]
    assert shown["scalars"]["linear_top1"] == [[22, pytest.approx(linear)]]
    for tag, size in (("views", [512, 128]), ("joint_probability", [512, 512])):
        found = shown["images"][tag]
        assert [step for step, _ in found] == [1, 4, 8, 12, 16, 20, 22]
        assert all(picture == size for _, picture in found)

    notes = [json.loads(line) for line in wandb.read_text().splitlines()]
    first, second = (note["init"] for note in notes if "init" in note)
    assert first == second
    assert (first["project"], first["resume"], first["seed"]) == ("digits", "allow", 0)
    assert first["id"] == json.loads((workdir / "wandb.json").read_text())["id"]
    assert notes[-1] == {"exit_code": 0}
    assert any(note.get("values", {}).get("views") == [128, 512, 1] for note in notes)

    assert "saved the profile in " in out
    (trace,) = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
    assert b"training_step" in trace.read_bytes()


def _read_events(workdir):
    done = subprocess.run(
        [sys.executable, "-c", _READ, str(workdir)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
        timeout=200,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_training_loads_no_tensorflow(tmp_path):
    told = (
        "import sys, runpy, atexit;"
        "atexit.register(lambda: print('tensorflow' in sys.modules));"
        "sys.argv[0] = 'main'; runpy.run_module('music_jax.main', run_name='__main__')"
    )
    arguments = [*SMALL, f"--config.dataset.data_dir={tmp_path / 'tfds'}", "--profile=99:100"]
    done = subprocess.run(
        [sys.executable, "-c", told, DIGITS, *arguments, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert "cannot profile steps 99 to 100: the training has steps 1 to 22" in done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.slow
def test_wandb_that_cannot_be_reached_is_one_clear_line(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("OFFLINE_PLEASE", "1")
    code, _, err = run(
        _MAIN,
        DIGITS,
        *SMALL,
        f"--config.dataset.data_dir={tmp_path / 'tfds'}",
        f"--workdir={tmp_path / 'run'}",
        "--config.wandb_project=digits",
    )
    assert code == 2
    assert "RuntimeError: no API key configured; WANDB_MODE=offline" in err.splitlines()[-1]


@pytest.mark.parametrize("steps", ["5", "5:4", "0:3"])
def test_profile_of_no_steps_is_refused_at_once(tmp_path, steps):
    code, _, err = run(_MAIN, DIGITS, f"--workdir={tmp_path / 'run'}", f"--profile={steps}")
    assert code == 2
    assert f"--profile={steps} must be START:STOP" in err
    assert not (tmp_path / "run").exists()
