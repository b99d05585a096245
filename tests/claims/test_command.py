"""The command as a user runs it."""

import json
import os
import signal
import time

import psutil
import pytest
from processes import DIGITS, run, start

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


def _workers(process):
    children = psutil.Process(process.pid).children()
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_killed_sweep_resumes_with_what_is_missing(tmp_path, data):
    output, table = tmp_path / "out", tmp_path / "RESULTS.md"
    arguments = (DIGITS, *_TINY, data, f"--output={output}", f"--results={table}", "--workers=2")
    process = start(_CLAIMS, *arguments)
    deadline = time.monotonic() + 300
    while len(_done(output)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    before = _done(output)
    workers = _workers(process)
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)  # the sweep starts another one
    time.sleep(1)
    workers = _workers(process)
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
