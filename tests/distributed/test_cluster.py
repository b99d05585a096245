"""Runs of two processes over loopback: joining, stopping, resuming and ending together."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import DIGITS, ROOT, SMALL, free_port, metrics, run, start

from music_jax.distributed import cluster
from music_jax.errors import UserError

_MAIN = "music_jax.main"

# AdamW divides by the root of tiny squares, which lets rounding grow faster than elsewhere; a low
# learning rate keeps the comparison to the arithmetic of the step.
_RUN = (
    DIGITS,
    *SMALL,
    "--config.optimizer.base_learning_rate=1e-5",
    "--config.local_views.count=2",
    "--config.local_views.size=6",
    "--config.online.every_steps=11",
    "--config.online.measures=('knn', 'rankme', 'lidar')",
    "--config.online.view_images=64",
    "--config.online.num_views=2",
)


def _flags(process, port):
    address = f"--coordinator_address=127.0.0.1:{port}"
    return (address, "--num_processes=2", f"--process_id={process}"), {}


def _slurm(process, port):
    return (), {
        "SLURM_JOB_ID": "1234",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
        "JAX_COORDINATOR_PORT": str(port),
    }


def _open_mpi(process, port):
    return (), {
        "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
        "JAX_COORDINATOR_PORT": str(port),
    }


def _saved(workdir):
    """Returns the steps of the complete checkpoints."""
    return {path.name for path in workdir.glob("checkpoints/*") if path.name.isdigit()}


def _losses(workdir):
    return [line["loss"] for line in metrics(workdir) if line["step"]]


def start_two(told, *arguments):
    """Starts two processes that find each other in one of the supported ways."""
    port = free_port()
    processes = []
    for i in range(2):
        flags, environment = told(i, port)
        processes.append(start(_MAIN, *arguments, *flags, env=environment))
    return processes


def end(processes, timeout):
    """Their outputs and errors, once both have ended; kills them if they do not."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"--config.dataset.data_dir={tmp_path_factory.mktemp('tfds')}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """The workdir of the same run by one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    code, _, err = run(_MAIN, *_RUN, data, f"--workdir={workdir}")
    assert code == 0, err
    return workdir


@pytest.mark.slow
def test_two_processes_train_as_one(alone, data, tmp_path):
    together = tmp_path / "together"
    processes = start_two(_slurm, *_RUN, data, f"--workdir={together}")
    results = end(processes, timeout=900)
    assert [p.returncode for p in processes] == [0, 0], [err[-2000:] for _, err in results]
    np.testing.assert_allclose(_losses(together), _losses(alone), rtol=1e-5)
    for name in ("online_knn", "online_rankme", "online_lidar"):
        a, b = ([x[name] for x in metrics(path) if name in x] for path in (alone, together))
        assert len(a) == 3
        np.testing.assert_allclose(b, a, rtol=0.02)
    for file in ("linear_eval.json", "knn.json"):
        a, b = (json.loads((path / file).read_text()) for path in (alone, together))
        assert abs(a["top1"] - b["top1"]) <= 0.01
    assert "in 2 process(es)" in results[0][0]
    assert "trained backbone" in results[0][0]
    assert "trained backbone" not in results[1][0]  # only the main process prints


@pytest.mark.slow
def test_a_signal_to_one_or_both_processes_stops_both_and_both_resume(alone, data, tmp_path):
    workdir = tmp_path / "run"
    last = 0
    for told, number, signaled in (
        (_open_mpi, signal.SIGINT, [1]),
        (_flags, signal.SIGTERM, [0, 1]),
    ):
        processes = start_two(told, *_RUN, data, f"--workdir={workdir}")
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and all(p.poll() is None for p in processes):
            log = workdir / "metrics.jsonl"
            # Of the second step: a process that has not ended its first would end all at once.
            if log.exists() and log.read_text().count("\n") > last + 2:  # with that of step 0
                break
            time.sleep(0.01)
        for i in signaled:
            processes[i].send_signal(number)
        results = end(processes, timeout=300)
        assert [p.returncode for p in processes] == [75, 75], [err[-2000:] for _, err in results]
        stopped = metrics(workdir)[-1]["step"]
        assert last < stopped < 22
        assert (workdir / "checkpoints" / str(stopped)).is_dir()
        for _, err in results:
            assert f"saved at step {stopped} of 22; rerun the command" in err.splitlines()[-1]
        last = stopped
    assert [line["step"] for line in metrics(workdir)] == list(range(last + 1))
    np.testing.assert_allclose(_losses(workdir), _losses(alone)[:last], rtol=1e-5)


def test_an_error_of_one_process_ends_both_with_its_exit_code(data, tmp_path):
    # Only the main process prepares the dataset; the other waits for it.
    wrong = "--config.dataset.name=digitz"
    processes = start_two(_flags, *_RUN, data, wrong, f"--workdir={tmp_path / 'run'}")
    (_, first), (_, second) = end(processes, timeout=300)
    assert [p.returncode for p in processes] == [2, 2], second[-2000:]
    assert first.splitlines()[-1].startswith("error: TFDS has no dataset 'digitz'")
    assert "error: process 0 ended the run: TFDS has no dataset 'digitz'" in second
    assert "Traceback" not in first + second


def test_several_processes_that_cannot_find_each_other_are_refused(tmp_path):
    # Open MPI from 5 on does not say where its first process is.
    environment = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    process = start(_MAIN, DIGITS, f"--workdir={tmp_path / 'run'}", env=environment)
    ((_, err),) = end([process], timeout=300)
    assert process.returncode == 2
    assert "OMPI_COMM_WORLD_SIZE says that there are 2 processes" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_reports_it_and_ends(data, tmp_path):
    workdir = tmp_path / "run"
    first, second = processes = start_two(_flags, *_RUN, data, f"--workdir={workdir}")
    deadline = time.monotonic() + 600
    while not _saved(workdir) and time.monotonic() < deadline:
        time.sleep(0.01)
    second.kill()
    (_, err), _ = end(processes, timeout=120)
    assert first.returncode == 1, err[-2000:]
    assert "error: another process of the run does not answer" in err
    assert "Traceback" not in err
    assert _saved(workdir)


_JOIN = """
import sys, time
from absl import app, logging
from music_jax.distributed import cluster
logging.set_verbosity(logging.FATAL)
def main(argv):
    cluster.join_cluster(argv[1], int(argv[2]), int(argv[3]))
    print("joined", flush=True)
    time.sleep(200)
app.run(main)  # which has Python print the threads' tracebacks at an abort, as for all commands
"""


def _joined(count):
    """Starts processes that only join a run."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", _JOIN, address, str(count)]
    processes = [
        subprocess.Popen(
            [*command, str(i)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for i in range(count)
    ]
    assert [process.stdout.readline() for process in processes] == ["joined\n"] * count
    return processes


def test_when_process_0_is_killed_the_others_report_it_at_once():
    processes = _joined(3)
    processes[0].kill()
    results = end(processes, timeout=60)
    for process, (_, err) in list(zip(processes, results, strict=True))[1:]:
        assert process.returncode == 1, err
        assert err.splitlines()[-1].startswith("error: another process of the run does not answer")
        assert "Fatal Python error" not in err


def test_another_abort_still_prints_the_tracebacks():
    processes = _joined(2)
    processes[1].send_signal(signal.SIGABRT)
    _, err = processes[1].communicate(timeout=60)
    processes[0].kill()
    processes[0].communicate()
    assert processes[1].returncode == -signal.SIGABRT
    assert "most recent call first" in err
    assert "does not answer" not in err


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_when_one_process_is_suspended_the_others_report_it_and_end(stopped):
    processes = _joined(3)
    processes[stopped].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    others = processes[:stopped] + processes[stopped + 1 :]
    try:
        for process in others:
            _, err = process.communicate(timeout=75 - (time.monotonic() - began))
            assert process.returncode == 1, err
            assert "error: another process of the run does not answer" in err.splitlines()[-1]
            assert "Fatal Python error" not in err
            assert "Traceback" not in err
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_process_that_waits_for_the_others_reports_it():
    port = free_port()
    for index in (0, 1):
        process = subprocess.Popen(
            [sys.executable, "-c", _JOIN, f"127.0.0.1:{port}", "3", str(index)],
            cwd=ROOT,
            text=True,
            stderr=subprocess.PIPE,
        )
        try:
            assert process.stderr.readline() == (
                f"process {index} of 3 waits for the others at 127.0.0.1:{port}, 0 s so far\n"
            )
        finally:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", 2, None), "go together: give all three"),
        ((None, None, 0), "go together: give all three"),
        ((None, 2, 0), "go together: give all three"),
        (("host", 2, 0), "--coordinator_address must be HOST:PORT, .* got 'host'"),
        (("host:port", 2, 0), "--coordinator_address must be HOST:PORT, .* got 'host:port'"),
        (("host:0", 2, 0), "with a port up to 65535; got 'host:0'"),
        (("host:65536", 2, 0), "with a port up to 65535; got 'host:65536'"),
        (("host:1", 2, 2), r"--process_id must be in \[0, num_processes = 2\); got 2"),
        (("host:1", 2, -1), r"--process_id must be in .*; got -1"),
        (("host:1", 1, 1), r"--process_id must be in .*; got 1"),
        (("host:1", 0, 0), "--num_processes must be at least 1; got 0"),
    ],
)
def test_flags_that_do_not_name_a_process_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        cluster.join_cluster(*flags)


# What the client of Kubernetes does in a pod that has no service account, and other clusters may.
_FAILING_CLIENT = """
class config:
    @staticmethod
    def load_incluster_config():
        raise {error}("no\\ntoken")
"""
_JOIN_ALONE = """
from music_jax.distributed import cluster
from music_jax.errors import UserError
try:
    cluster.join_cluster({flags})
    print("alone")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("flags", "error", "expected"),
    [
        (
            "None, None, None",
            "type('Own', (Exception,), {})",
            "cannot find out whether this cluster",
        ),
        ("None, None, None", "KeyError", "cannot find out whether this cluster runs further"),
        ("None, 1, None", "OSError", "alone"),
        ("'127.0.0.1:1', 1, 0", "OSError", "alone"),
    ],
)
def test_a_cluster_client_that_fails_is_an_error_unless_flags_replace_it(
    flags, error, expected, tmp_path
):
    (tmp_path / "kubernetes.py").write_text(_FAILING_CLIENT.format(error=error))
    environment = os.environ | {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
    }
    done = subprocess.run(
        [sys.executable, "-c", _JOIN_ALONE.format(flags=flags)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.startswith(expected), done.stderr
    assert done.stdout.count("\n") == 1
    if expected != "alone":
        assert "token" in done.stdout
        assert "--num_processes=1 if it does not" in done.stdout
