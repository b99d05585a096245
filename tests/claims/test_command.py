"""`python -m music_jax.claims` from start to end, as processes."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
from processes import DIGITS, SMALL, metrics, run, start

_CLAIMS = "music_jax.claims"
_TINY = (
    "--config.num_epochs=1",
    "--config.optimizer.warmup_epochs=0",
    "--config.linear_eval.num_epochs=2",
    "--config.objective.num_segments=4",
    "--config.objective.units_per_segment=4",
    "--only=1",
    "--seeds=2",
)
_NUM_CELLS = 4 * (5 + 2) + 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"--config.dataset.data_dir={tmp_path_factory.mktemp('tfds')}"


def _done(output):
    return {path: path.stat().st_mtime_ns for path in output.glob("*/*/result.json")}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_what_is_missing(tmp_path, data):
    output, table = tmp_path / "out", tmp_path / "RESULTS.md"
    arguments = (DIGITS, *_TINY, data, f"--output={output}", f"--results={table}", "--workers=2")
    process = start(_CLAIMS, *arguments)
    deadline = time.monotonic() + 300
    while len(_done(output)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    before = _done(output)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)  # of which the sweep recovers by itself
    time.sleep(1)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(workers, timeout=30)[1]  # none is left behind
    assert len(before) < _NUM_CELLS

    code, out, err = run(_CLAIMS, *arguments, timeout=1800)
    assert code == 0, err
    after = _done(output)
    assert len(after) == _NUM_CELLS
    assert before.items() <= after.items()  # what was done was left alone
    assert f"{_NUM_CELLS}/{_NUM_CELLS}" in err.replace(".0", "")
    assert "1. Objectives" in out

    tables = json.loads((output / "claims.json").read_text())["claims"]
    assert [row["seeds"] for row in tables[0]["rows"]] == [2] * 5
    for row in tables[0]["rows"]:
        assert 0.1 < row["measures"]["linear_top1"]["mean"] < 1
        assert ("joint_code_accuracy" in row["measures"]) == (row["series"] == "music")
    assert (output / "claim-1.png").exists()
    assert f"{_NUM_CELLS} of {_NUM_CELLS} cells done" in table.read_text()

    code, out, _ = run(_CLAIMS, *arguments)
    assert code == 0
    assert _done(output) == after


@pytest.mark.slow
def test_a_cell_trains_what_the_main_command_trains(tmp_path, data):
    # At this rate, steps do not magnify what is rounded in another order.
    rate = "--config.optimizer.base_learning_rate=1e-3"
    arguments = (DIGITS, *SMALL, rate, "--config.knn.enabled=False", data)
    main = start(
        "music_jax.main",
        *arguments,
        f"--workdir={tmp_path / 'main'}",
    )
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(main.pid, {core})  # as the worker, before it has threads
    _, err = main.communicate(timeout=900)
    assert main.returncode == 0, err
    config = json.loads((tmp_path / "main" / "config.json").read_text())["config"]
    cell = tmp_path / "cell"
    task = {"directory": str(cell), "config": config, "in_memory": True}
    task |= {"searching": False, "collapsed_start": False}
    worker = start("music_jax.claims.worker", stdin=subprocess.PIPE)
    setup = {"core": core, "directory": str(tmp_path)}
    worker.stdin.write(f"{json.dumps(setup)}\n{json.dumps(task)}\n")
    worker.stdin.flush()
    assert json.loads(worker.stdout.readline()) == {"error": None}
    worker.communicate()  # its input ends, and so does the worker
    assert worker.returncode == 0

    expected = {line["step"]: line["loss"] for line in metrics(tmp_path / "main")}
    found = {line["step"]: line["loss"] for line in metrics(cell)}
    assert set(found) == {11, 22}  # one line an epoch
    wanted = [expected[step] for step in found]
    np.testing.assert_allclose(list(found.values()), wanted, rtol=1e-5)
    top1 = json.loads((tmp_path / "main" / "linear_eval.json").read_text())["top1"]
    result = json.loads((cell / "result.json").read_text())
    assert result["linear_top1"] == pytest.approx(top1, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config=FILE is missing"),
        ((DIGITS, "--seeds=0"), "--seeds must be at least 1; got 0"),
        ((DIGITS, "--only=9"), "no claim '9'"),
        ((DIGITS, "--tables_only", "--workers=0"), "--workers=0"),
        ((DIGITS, "--tables_only", "--results={tmp}"), "cannot be written: it is a directory"),
        ((DIGITS, "--tables_only", "--results=/dev/null/R.md"), "R.md cannot be written"),
        ((DIGITS, "--config.knn.k=0"), "config.knn.k must be at least 1; got 0"),
    ],
)
def test_wrong_input_is_one_clear_line(tmp_path, arguments, message):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    code, _, err = run(_CLAIMS, *arguments, f"--output={tmp_path / 'sweep'}")
    assert code == 2
    assert message in err
    assert "Traceback" not in err
