"""Absent slices: their memory, the real step compiled for one, and the largest batch that fits."""

import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import processes
import psutil
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from music_jax.config import default_config
from music_jax.distributed.mesh import check_divisible, make_data_mesh
from music_jax.errors import UserError
from music_jax.plan import compiling, programs
from music_jax.plan.costs import StepCost
from music_jax.train.step import lower_step
from music_jax.workdir.run_config import as_json

_GIB = 2**30


def _small_config():
    config = default_config()
    config.batch_size, config.crop.size = 4, 32
    config.backbone.name, config.objective.num_segments = "small_resnet", 4
    return config


@pytest.mark.parametrize(
    ("topology", "chips", "devices", "published_gib"),
    [("v5e:2x2", 4, 4, 16), ("v3:2x2", 4, 8, 32), ("v4:2x2x1", 4, 4, 32), ("v6e:4x4", 16, 16, 32)],
)
def test_a_slice_is_as_large_as_documented(topology, chips, devices, published_gib):
    found = compiling.open_slice(topology)
    assert (found.chips, found.mesh.size) == (chips, devices)
    # XLA keeps a little of the memory for itself.
    usable = found.hbm_bytes * devices / chips
    assert 0.93 * published_gib * _GIB < usable <= published_gib * _GIB


def test_several_slices_are_side_by_side_with_parameters_sharded_within_one():
    found = compiling.open_slice("v5e:2x2", slices=2)
    assert (found.chips, found.slices, found.mesh.shape) == (8, 2, {"data": 2, "fsdp": 4})
    assert [{device.slice_index for device in row} for row in found.mesh.devices] == [{0}, {1}]
    assert found.chip_of_device == compiling.open_slice("v5e:2x2").chip_of_device


def test_a_slice_that_does_not_exist_is_an_error():
    with pytest.raises(UserError, match=r"v5e:3x5.*such as v5e:4x8"):
        compiling.open_slice("v5e:3x5")


def test_a_step_that_does_not_fit_is_a_result_and_not_an_error(four_chips, monkeypatch):
    config = _small_config()

    def too_large(recipe, state, mesh, images_shape):
        whole = NamedSharding(mesh, PartitionSpec())
        matrix = jax.ShapeDtypeStruct((2**18, 2**18), jnp.bfloat16, sharding=whole)
        return jax.jit(lambda x: x @ x, out_shardings=whole).lower(matrix)

    monkeypatch.setattr(compiling, "lower_step", too_large)
    found = compiling.measure(config, four_chips, 1, with_objective=False)
    assert not found.fits
    assert found.hbm_needed_bytes >= 2**18 * 2**18 * 2 > found.hbm_available_bytes
    assert found.flops is None


def _product(recipe, state, mesh, images_shape):
    whole = NamedSharding(mesh, PartitionSpec())
    matrix = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=whole)
    return jax.jit(lambda x: x @ x, out_shardings=whole).lower(matrix)


def test_no_traffic_between_slices_is_unknown_instead_of_none(monkeypatch):
    """Every step exchanges gradients, so that a count of 0 means that they are not recognized."""
    config = _small_config()
    config.batch_size = 8
    monkeypatch.setattr(compiling, "lower_step", _product)
    slices = compiling.open_slice("v5e:2x2", slices=2)
    found = compiling.measure(config, slices, 1, with_objective=False)
    assert found.received_bytes == 0
    assert (found.dcn_bytes, found.dcn_transfers) == (None, None)
    assert "cannot read" in found.estimates["dcn_bytes"]


def test_an_unreadable_program_falls_back_to_the_counts_of_xla(four_chips, monkeypatch):
    config = _small_config()

    def unreadable(compiled):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(compiling, "lower_step", _product)
    monkeypatch.setattr(programs, "read", unreadable)
    found = compiling.measure(config, four_chips, 1, with_objective=True)
    assert found.fits
    assert found.flops == pytest.approx(2 * 256**3, rel=0.02)
    assert found.argument_bytes == 2 * 256**2
    assert found.received_bytes is None
    assert found.objective_flops is None
    assert "cannot read" in found.estimates["received_bytes"]


def test_local_views_are_in_the_step_that_is_compiled(four_chips, monkeypatch):
    flops = []

    def counted(recipe, state, mesh, images):
        lowered = lower_step(recipe, state, make_data_mesh(1), images)
        flops.append(lowered.cost_analysis()["flops"])
        whole = NamedSharding(mesh, PartitionSpec())
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
        return jax.jit(lambda x: x + len(flops), out_shardings=whole).lower(number)

    monkeypatch.setattr(compiling, "lower_step", counted)
    config = _small_config()
    config.projector.hidden_sizes = ()
    for count in (0, 2, 4):
        config.local_views.update({"count": count, "size": 16})
        compiling.measure(config, four_chips, 1, with_objective=False)
    # A local view has a quarter of the pixels of each of the two views, and is in two more pairs.
    assert flops[2] - flops[1] == pytest.approx(flops[1] - flops[0], rel=0.02)
    assert flops[2] > 1.5 * flops[0]


@pytest.mark.parametrize(
    ("batch_size", "accumulation_steps", "expected"),
    [
        (6, 1, "batch_size = 6 cannot be divided over 4 devices"),
        (68, 2, "over 4 devices in accumulation_steps = 2; use 64 or 72"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_an_error(batch_size, accumulation_steps, expected):
    config = default_config()
    config.batch_size, config.accumulation_steps = batch_size, accumulation_steps
    with pytest.raises(UserError, match=expected):
        compiling.check(as_json(config), "v5e:2x2")


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_the_search_for_the_largest_batch_starts_at_that_of_the_config(
    four_chips, monkeypatch, capsys, accumulation_steps
):
    def measure(config, slice_, steps_per_epoch, *, with_objective):
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

    monkeypatch.setattr(compiling, "open_slice", lambda topology, fsdp, slices: four_chips)
    monkeypatch.setattr(compiling, "measure", measure)
    config = runpy.run_path(str(processes.ROOT / "configs" / "digits.py"))["get_config"]()
    config.batch_size = 64
    config.accumulation_steps = accumulation_steps
    cost, largest = compiling.run(as_json(config), "v5e:2x2", 1437, find_batch_size=True)
    fits = 4 * 77
    assert fits - max(4 * accumulation_steps, fits // 32) <= largest <= fits
    assert cost.batch_size == 64
    assert "v5e:2x2: a batch of 64 needs 21% and fits" in capsys.readouterr().out


@pytest.mark.slow
def test_a_busy_worker_ends_when_its_parent_is_killed():
    start = (
        "import concurrent.futures as f, multiprocessing, os, time;"
        "from music_jax.plan import compiling;"
        "spawn = multiprocessing.get_context('spawn');"
        "pool = f.ProcessPoolExecutor(1, spawn, initializer=compiling.prepare_process);"
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

    found = compiling.largest_batch(memory_share, _UNIT, start * _UNIT)
    assert found % _UNIT == 0
    assert limit * _UNIT / 1.04 - _UNIT < found <= limit * _UNIT
    assert found == 0 or found in asked
    assert len(asked) == len(set(asked)) <= 20


def test_memory_linear_in_the_batch_takes_few_compilations():
    asked = []

    def memory_share(batch):
        asked.append(batch)
        return 0.1 + batch / 100_000

    assert 87_000 < compiling.largest_batch(memory_share, 32, 2048) <= 90_000
    assert len(asked) <= 8
