"""The search for the largest batch, and ending with the parent process."""

import runpy
import subprocess
import sys

import processes
import psutil
import pytest

from music_jax.distributed.mesh import check_divisible
from music_jax.plan import worker
from music_jax.plan.compiling import StepCost
from music_jax.plan.worker import largest_batch


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_the_search_for_the_largest_batch_starts_at_that_of_the_config(
    four_chips, monkeypatch, capsys, accumulation_steps
):
    def measure(config, slice_, *, steps_per_epoch, with_objective):
        assert steps_per_epoch == max(1, 1437 // config.batch_size)
        check_divisible(config.batch_size, accumulation_steps, slice_.mesh)
        needed = config.batch_size / (4 * 77) * 16e9
        return StepCost(
            chips=slice_.chips,
            batch_size=config.batch_size,
            fits=needed <= 16e9,
            hbm_available_bytes=16e9,
            hbm_needed_bytes=needed,
            compile_seconds=1.0,
        )

    monkeypatch.setattr(worker, "open_slice", lambda topology, fsdp: four_chips)
    monkeypatch.setattr(worker, "measure", measure)
    config = runpy.run_path(str(processes.ROOT / "configs" / "digits.py"))["get_config"]()
    config.batch_size = 64
    config.accumulation_steps = accumulation_steps
    plan = worker.run(
        worker.Task(
            config=config.to_json(),
            topology="v5e:2x2",
            num_images=1437,
            decode_rate=1000.0,
            find_batch_size=True,
        )
    )
    fits = 4 * 77
    assert fits - max(4 * accumulation_steps, fits // 32) <= plan.largest_batch_size <= fits
    assert plan.cost.batch_size == 64
    assert "v5e:2x2: a batch of 64 needs 21% and fits" in capsys.readouterr().out


@pytest.mark.slow
def test_a_busy_worker_ends_when_its_parent_is_killed():
    start = (
        "import concurrent.futures as f, multiprocessing, os, time;"
        "from music_jax.plan import worker;"
        "spawn = multiprocessing.get_context('spawn');"
        "pool = f.ProcessPoolExecutor(1, spawn, initializer=worker.begin);"
        "pid = pool.submit(os.getpid).result(); pool.submit(time.sleep, 600);"
        "print(pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", start], stdout=subprocess.PIPE, text=True, cwd=processes.ROOT
    )
    assert parent.stdout is not None
    worker_process = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    try:
        assert not psutil.wait_procs([worker_process], timeout=30)[1]
    finally:
        if worker_process.is_running():
            worker_process.kill()


_UNIT = 4  # of the memory models below


@pytest.mark.parametrize("limit", [0, 1, 2, 31, 64, 65, 1000, 60_000])
@pytest.mark.parametrize("start", [1, 64, 2048])
@pytest.mark.parametrize("fixed", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("saved", [0.0, 0.2])
def test_the_largest_that_fits_is_found_to_within_3_percent_in_few_steps(
    limit, start, fixed, saved
):
    asked = []

    def memory_share(batch):
        assert batch % _UNIT == 0
        asked.append(batch)
        units = batch // _UNIT
        if units > limit:
            return 1.0 + (units - limit) / max(limit, 1)
        # Near the limit memory is saved, so that the need grows more slowly.
        share = fixed + (1 - fixed) * units / max(limit, 1)
        return min(share, 1 - saved + saved * units / max(limit, 1))

    found = largest_batch(memory_share, _UNIT, start * _UNIT)
    assert found % _UNIT == 0
    assert limit * _UNIT / 1.04 - _UNIT < found <= limit * _UNIT
    assert found == 0 or found in asked
    assert len(asked) == len(set(asked)) <= 20


def test_memory_linear_in_the_batch_takes_few_compilations():
    asked = []

    def memory_share(batch):
        asked.append(batch)
        return 0.1 + batch / 100_000

    assert 87_000 < largest_batch(memory_share, 32, 2048) <= 90_000
    assert len(asked) <= 8
