"""The launcher for Slurm on a real one: stopping, requeueing and failing."""

import os
import re
import shutil
import time

import cv2
import numpy as np
import pytest
from processes import DIGITS, ROOT, checkpoint, metrics, run
from slurm_cluster import missing, slurm_cluster

_STEPS = 60
_BOTH_NODES = ("--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=2")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := missing():
        end = pytest.fail if os.environ.get("REQUIRE_SLURM") else pytest.skip
        end(f"Slurm cannot run here: {reason}")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def slurm(cluster):
    yield cluster
    cluster.run("scancel", "--user=root")


def wait(condition, timeout, log=str):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, log()
        time.sleep(0.2)


class Training:
    """A job that trains on both nodes."""

    def __init__(self, slurm, directory, *arguments, options=()):
        self.slurm = slurm
        self.workdir = directory / "run"
        self.slow = directory / "slow"  # while it exists, a step takes about a second
        self._log = directory / "log"
        self._stops = 0
        self.slow.touch()
        self.number = slurm.submit(
            *(*_BOTH_NODES, f"--output={self._log}", *options, "launch/slurm.sbatch"),
            *("--config=tests/paced_digits.py", f"--workdir={self.workdir}", *arguments),
            f"--config.dataset.options={{'slow_while': '{self.slow}'}}",
            ACCELERATOR="cpu",
        )

    def log(self):
        return self._log.read_text() if self._log.exists() else ""

    def wait_for_step(self, step, timeout=300):
        """Waits until the run has trained a number of steps, each of which it logs."""
        file = self.workdir / "metrics.jsonl"
        wait(lambda: file.exists() and file.read_text().count("\n") >= step, timeout, self.log)

    def wait_until_saved(self, timeout=60):
        """Waits until both processes have stopped once more; returns the step that they saved."""
        said = re.compile(rf"stopped: saved at step (\d+) of {_STEPS}")
        self._stops += 1
        wait(lambda: len(said.findall(self.log())) == 2 * self._stops, timeout, self.log)
        first, second = said.findall(self.log())[-2:]
        assert first == second
        return int(first)

    def set_time_limit(self, minutes):
        self.slurm.run("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")

    def finish(self, *states):
        """Lets the steps be quick, waits for the job's end, and returns what Slurm says."""
        self.slow.unlink()
        return self.slurm.wait_for(self.number, *states)


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    training = Training(cluster, tmp_path_factory.mktemp("undisturbed"))
    job = training.finish("COMPLETED", "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "0"), training.log()
    return training


def assert_same(training, undisturbed):
    """Checks that all arrays of two runs are the same, byte for byte, and each step logged once."""
    found, expected = (checkpoint(t.workdir, _STEPS) for t in (training, undisturbed))
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    losses = [[(x["step"], x["loss"]) for x in metrics(t.workdir)] for t in (training, undisturbed)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, _STEPS + 1))


@pytest.mark.slow
def test_two_nodes_train_each_with_its_cores(undisturbed):
    cores = min(2, len(os.sched_getaffinity(0)))
    assert undisturbed.log().count(f"cores: {cores}\n") == 2
    assert "in 2 process(es)" in undisturbed.log()
    assert "trained backbone" in undisturbed.log()
    assert (undisturbed.workdir / "linear_eval.json").exists()


@pytest.mark.slow
def test_two_tasks_of_a_node_train_as_two_nodes_each_with_its_core(slurm, undisturbed, tmp_path):
    one_node = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1")
    training = Training(slurm, tmp_path, options=one_node)
    job = training.finish("COMPLETED", "FAILED")
    assert (job["ExitCode"], job["NumNodes"]) == ("0:0", "1"), training.log()
    assert training.log().count("cores: 1\n") == 2
    assert_same(training, undisturbed)


@pytest.mark.slow
def test_a_preempted_run_saves_and_goes_on(slurm, undisturbed, tmp_path):
    training = Training(slurm, tmp_path)
    training.wait_for_step(2)
    high = slurm.submit("--partition=high", *_BOTH_NODES, "--output=/dev/null", "--wrap=true")
    saved = training.wait_until_saved()
    slurm.wait_for(high, "COMPLETED", timeout=60)
    job = training.finish("COMPLETED", "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1"), training.log()
    assert f"resuming     after step {saved}" in training.log()
    assert_same(training, undisturbed)


@pytest.mark.slow
def test_the_time_limit_saves_and_requeues_and_scancel_saves_and_ends(slurm, tmp_path):
    training = Training(slurm, tmp_path, options=["--time=60", "--signal=TERM@120"])
    training.wait_for_step(2)
    _, minutes, _ = slurm.job(training.number)["RunTime"].split(":")
    # Slurm looks at the time every half minute.
    training.set_time_limit(int(minutes) + 2)
    saved = training.wait_until_saved()
    training.set_time_limit(60)
    training.wait_for_step(saved + 2)
    assert f"resuming     after step {saved}" in training.log()
    assert "stopped; requeueing" in training.log()

    slurm.run("scancel", training.number)
    assert training.wait_until_saved() > saved
    job = slurm.wait_for(training.number, "CANCELLED", timeout=60)
    assert job["Restarts"] == "1"
    assert "not requeued" in training.log()


@pytest.mark.slow
def test_a_run_goes_on_once_a_lost_node_is_back(slurm, undisturbed, tmp_path):
    training = Training(slurm, tmp_path)
    training.wait_for_step(6)
    with slurm.without_power("n2"):
        slurm.wait_for(training.number, "PENDING", "FAILED", timeout=120)
    job = training.finish("COMPLETED", "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1"), training.log()
    assert "another process of the run does not answer" in training.log()
    assert_same(training, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "code"),
    [
        ("--config.dataset.name=digitz", 2),
        ("--config.optimizer.base_learning_rate=1e9", 3),
    ],
)
def test_wrong_input_and_divergence_end_the_job(slurm, tmp_path, argument, code):
    training = Training(slurm, tmp_path, argument)
    job = training.finish("COMPLETED", "FAILED")
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", f"{code}:0"), training.log()
    assert job["Restarts"] == "0"
    assert "error: " in training.log()


# Plays python: members 2 and 3 are stopped by a signal the first time, with everything saved.
# Member 3, the last one, has the number of the whole array as its own.
_STAND_IN = """#!/usr/bin/env bash
echo "$*"
if ((SLURM_ARRAY_TASK_ID >= 2 && ${SLURM_RESTART_COUNT:-0} == 0)); then
  trap 'exit 75' TERM
  touch "waiting-$SLURM_ARRAY_TASK_ID"
  sleep 60 &
  wait
fi
"""


@pytest.mark.slow
def test_a_sweep_gives_each_member_its_share_and_requeues_those_that_are_stopped(slurm, tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch/environment.sh").write_text("venv=.\nensure_environment() { :; }\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(_STAND_IN)
    (tmp_path / "bin/python").chmod(0o755)

    number = slurm.submit(
        *("--gpus-per-node=0", "--cpus-per-task=1", "launch/sweep.sbatch"),
        *("--config=c.py", "--output=a b"),
        directory=tmp_path,
    )
    for i in (2, 3):
        wait((tmp_path / f"waiting-{i}").exists, timeout=60)
        slurm.run("scancel", "--signal=TERM", f"{number}_{i}")
    jobs = [slurm.wait_for(f"{number}_{i}", "COMPLETED", "FAILED", timeout=60) for i in range(4)]
    assert [job["ExitCode"] for job in jobs] == 4 * ["0:0"]
    assert [job["Restarts"] for job in jobs] == ["0", "0", "1", "1"]
    for i in range(4):
        given = f"-m music_jax.claims --worker={i}/4 --config=c.py --output=a b\n"
        log = (tmp_path / f"music_jax_sweep-{number}_{i}.log").read_text()
        assert log.count(given) == 1 + (i >= 2), log


@pytest.mark.slow
def test_a_sweep_has_the_tables_of_one_process_although_a_member_is_killed(slurm, tmp_path):
    compared = (
        *(DIGITS, "--budget=small", "--only=1", "--objectives=vicreg", "--seeds=2"),
        *("--config.num_epochs=40", "--config.optimizer.warmup_epochs=0"),
        "--config.backbone.name=tiny_resnet",
        f"--config.dataset.data_dir={tmp_path / 'tfds'}",
    )

    def arguments(name, workers):
        return *compared, *(f"--{x}={tmp_path / name / x}" for x in ("output", "runs")), workers

    log = f"{tmp_path}/log-%a"
    number = slurm.submit(
        *("--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}", "launch/sweep.sbatch"),
        *arguments("array", "--workers=1"),
        ACCELERATOR="cpu",
    )
    output = tmp_path / "array/output"

    def logs():
        return "".join(path.read_text() for path in sorted(tmp_path.glob("log-*")))

    wait(lambda: list(output.glob("search/**/*.json")), 600, logs)
    slurm.run("scontrol", "requeue", f"{number}_1")
    jobs = [slurm.wait_for(f"{number}_{i}", "COMPLETED", "FAILED", timeout=900) for i in range(4)]
    assert [job["ExitCode"] for job in jobs] == 4 * ["0:0"], logs()
    assert int(jobs[1]["Restarts"]) >= 1

    code, _, err = run("music_jax.claims", *arguments("one", "--workers=2"))
    assert code == 0, err
    for table in ("claims.csv", "claims.json"):
        assert (output / table).read_bytes() == (tmp_path / "one/output" / table).read_bytes()


@pytest.mark.slow
def test_an_array_packs_the_images_of_one_process_although_a_member_is_killed(slurm, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 64, 64, 3), np.uint8)
    for i, image in enumerate(pixels):
        path = tmp_path / f"photos/{i % 3}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)
    given = (f"--source={tmp_path / 'photos'}", "--shorter_side=48", "--shard_size=8")
    log, packed = tmp_path / "log-%a", tmp_path / "packed"
    number = slurm.submit(
        *("--array=0-1", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}"),
        *("launch/sweep.sbatch", "pack", *given, f"--output={packed}"),
        ACCELERATOR="cpu",
    )

    def logs():
        return "".join(path.read_text() for path in sorted(tmp_path.glob("log-*")))

    wait(lambda: len(list(packed.glob("images-*"))) > 3, 300, logs)
    slurm.run("scontrol", "requeue", f"{number}_0")
    jobs = [slurm.wait_for(f"{number}_{i}", "COMPLETED", "FAILED", timeout=300) for i in range(2)]
    assert [job["ExitCode"] for job in jobs] == 2 * ["0:0"], logs()
    assert int(jobs[0]["Restarts"]) >= 1

    code, _, err = run("music_jax.pack", *given, f"--output={tmp_path / 'whole'}")
    assert code == 0, err
    files = [{f.name: f.read_bytes() for f in d.iterdir()} for d in (packed, tmp_path / "whole")]
    assert len(files[0]) > 3000 / 8
    assert files[0] == files[1]
