"""The command as a user runs it."""

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import faked_claims as faked
import psutil
import pytest
from processes import DIGITS, ROOT, run, start

from music_jax import distributed
from music_jax.claims import __main__ as command
from music_jax.claims import run_cells
from music_jax.claims.planning import missing_cells
from music_jax.distributed.shares import Share
from music_jax.errors import StoppedError, UnusableDataError

_CLAIMS = "music_jax.claims"
_SMALL = (
    DIGITS,
    "--budget=small",
    "--config.num_epochs=40",
    "--config.optimizer.warmup_epochs=0",
    "--config.backbone.name=tiny_resnet",
    "--seeds=2",
    "--only=1",
)
_SEARCHED, _REFERENCES = 4 + 2 + 2, 1 + 1 + 2 + 2


def _done(output):
    return {path: path.stat().st_mtime_ns for path in output.glob("*/*/**/*.json")}


def _workers(process):
    children = psutil.Process(process.pid).children()
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.mark.slow
def test_workers_share_a_comparison_and_another_objective_joins_it(tmp_path):
    output = tmp_path / "out"
    arguments = (
        *_SMALL,
        f"--config.dataset.data_dir={tmp_path / 'tfds'}",
        f"--output={output}",
        f"--runs={tmp_path / 'runs'}",
        "--workers=1",
    )
    compared = (*arguments, "--objectives=vicreg")
    killed = start(_CLAIMS, *compared, "--worker=0/2")
    deadline = time.monotonic() + 600
    while not _done(output) and time.monotonic() < deadline:
        time.sleep(0.1)
    before, workers = _done(output), _workers(killed)
    os.kill(workers[0].pid, signal.SIGKILL)  # the command starts another one
    time.sleep(1)
    workers = _workers(killed)
    killed.kill()
    killed.communicate()
    assert not psutil.wait_procs(workers, timeout=30)[1]  # none is left behind
    assert before

    both = [start(_CLAIMS, *compared, f"--worker={i}/2") for i in range(2)]
    ended = [process.communicate(timeout=1800) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    after = _done(output)
    assert len(after) == _SEARCHED + _REFERENCES
    assert before.items() <= after.items()  # what was done was left alone
    (table,) = json.loads((output / "claims.json").read_text())["claims"]
    assert {row["series"]: row["seeds"] for row in table["rows"]} == {
        "vicreg": 2, "raw_pixels": 1, "hog_svm": 1, "random_backbone": 2, "supervised": 2,
    }  # fmt: skip
    for row in table["rows"]:
        assert 0.2 < row["measures"]["linear_top1"]["mean"] < 1

    pages = [(output / name).read_bytes() for name in ("claims.json", "claims.csv")]
    code, out, err = run(_CLAIMS, *compared, "--tables_only")
    assert code == 0, err
    assert "1. Objectives" in out
    assert [(output / name).read_bytes() for name in ("claims.json", "claims.csv")] == pages

    page = (ROOT / "docs" / "how_to" / "claims.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_objective.py").write_text(example)
    joined = (*arguments, "--objectives=vicreg,mine", "--import=my_objective")
    process = start(_CLAIMS, *joined, env={"PYTHONPATH": str(tmp_path)})
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    assert len(_done(output)) == len(after) + _SEARCHED
    assert after.items() <= _done(output).items()
    assert "mine minus vicreg, linear: " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config=FILE is missing"),
        ((DIGITS, "--seeds=0"), "--seeds=0"),
        ((DIGITS, "--only=9"), "there is no claim '9'"),
        ((DIGITS, "--budget=tiny"), "--budget=tiny"),
        ((DIGITS, "--worker=2/2"), "--worker=2/2 must be I/N"),
        ((DIGITS, "--worker=1"), "--worker=1 must be I/N"),
        ((DIGITS, "--objectives=music,mine"), "'mine' is neither one of music, music_centered"),
        ((DIGITS, "--tables_only", "--workers=0"), "--workers=0"),
        ((DIGITS, "--config.knn.k=0"), "config.knn.k must be at least 1; got 0"),
        ((DIGITS, "--config.seed=98"), "the final trainings have the seeds from 100 on"),
        ((DIGITS, "--config.dataset.path=/photos"), "leave config.dataset.path unset"),
        ((DIGITS, "--config.evaluation.test=/photos"), "config.evaluation.test unset"),
    ],
)
def test_wrong_input_is_one_clear_line(tmp_path, arguments, message):
    output = (f"--output={tmp_path / 'out'}", f"--runs={tmp_path / 'runs'}")
    code, out, err = run(_CLAIMS, *arguments, *output)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_results_are_in_a_directory_named_after_the_dataset(tmp_path):
    """Rows without results make tables as well."""
    arguments = (DIGITS, "--tables_only", "--only=1", "--objectives=vicreg")
    found = subprocess.run(
        [sys.executable, "-m", _CLAIMS, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "results" / "digits" / "claims.md").is_file()


def test_cells_of_a_worker_that_does_not_run_are_named(tmp_path, monkeypatch):
    sweep = faked.make_sweep(tmp_path / "out", methods=("vicreg",))
    runs = faked.epath.Path(tmp_path / "runs")
    mine = [cell for cell in missing_cells(sweep) if cell.is_in_share(Share(1, 3))]
    for cell in mine:
        faked.finish(sweep, cell)
    monkeypatch.setattr(run_cells, "_POLL_SECONDS", 0.1)
    begun = time.monotonic()
    with pytest.raises(StoppedError, match=r"cells of other workers are missing, such as search"):
        run_cells.run_missing(sweep, runs=runs, cores=[], share=Share(1, 3), patience=1.0)
    assert 1.0 < time.monotonic() - begun < 10.0  # waited for signs of life


@pytest.mark.parametrize("state", ["silent", "failed", "failed before", "failed in this sweep"])
def test_workers_that_only_wait_do_not_wait_for_each_other(tmp_path, monkeypatch, state):
    """Two of three workers are done; the third one has ended, or is still in a queue."""
    sweep = faked.make_sweep(tmp_path / "out", methods=("vicreg",))
    runs = faked.epath.Path(tmp_path / "runs")
    for cell in missing_cells(sweep):
        if not cell.is_in_share(Share(0, 3)):
            faked.finish(sweep, cell)
    monkeypatch.setattr(run_cells, "_POLL_SECONDS", 0.1)
    sweep_of_third = "8" if state == "failed in this sweep" else "7"
    monkeypatch.setenv("MUSIC_JAX_SWEEP", sweep_of_third)
    third = run_cells._SignsOfLife(runs, Share(0, 3))
    if state in ("failed before", "failed in this sweep"):
        third.fail()
    monkeypatch.setenv("MUSIC_JAX_SWEEP", "8")

    def wait(index):
        run_cells.run_missing(sweep, runs=runs, cores=[], share=Share(index, 3), patience=2.0)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = [pool.submit(wait, index) for index in (1, 2)]
        deadline = time.monotonic() + 30  # a failure before they have begun does not count
        while state == "failed" and time.monotonic() < deadline:
            third.fail()
            if not concurrent.futures.wait(waiting, timeout=0.2).not_done:
                break
        errors = [future.exception(timeout=30) for future in waiting]
    if state in ("failed", "failed in this sweep"):
        assert all(isinstance(error, UnusableDataError) for error in errors)
        assert "worker 0/3 failed: see its output" in str(errors[0])
    else:  # a launcher that starts them again gives way to the third one
        assert all(isinstance(error, StoppedError) for error in errors)


def test_a_worker_waits_as_long_as_one_that_it_needs_runs(tmp_path, monkeypatch):
    sweep = faked.make_sweep(tmp_path / "out", methods=("vicreg",))
    runs = faked.epath.Path(tmp_path / "runs")
    monkeypatch.setattr(run_cells, "_POLL_SECONDS", 0.1)
    for cell in missing_cells(sweep):
        if cell.is_in_share(Share(1, 2)):
            faked.finish(sweep, cell)
    other = run_cells._SignsOfLife(runs, Share(0, 2))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        share = Share(1, 2)
        waiting = pool.submit(
            run_cells.run_missing, sweep, runs=runs, cores=[], share=share, patience=1.0
        )
        for _ in range(8):
            other.give()
            time.sleep(0.25)
            assert not waiting.done()
        with pytest.raises(StoppedError):
            waiting.result(timeout=30)


def test_a_container_that_limits_the_cpu_time_has_fewer_workers(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    monkeypatch.setattr(distributed, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 8, 9}, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for workers, expected in ((None, [3, 5]), (5, [3, 5, 8, 9, 3])):
        monkeypatch.setattr(command.flags, "FLAGS", types.SimpleNamespace(workers=workers))
        assert command._cores() == expected
