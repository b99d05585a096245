"""Absent slices: their memory, and the real step compiled for one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from music_jax.config import default_config
from music_jax.errors import UserError
from music_jax.plan import compiling
from music_jax.workdir.directory import user_directory

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
    usable = found.hbm_bytes * found.devices_per_chip
    assert 0.93 * published_gib * _GIB < usable <= published_gib * _GIB


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
    found = compiling.measure(config, four_chips, steps_per_epoch=1, with_objective=False)
    assert not found.fits
    assert found.hbm_needed_bytes >= 2**18 * 2**18 * 2 > found.hbm_available_bytes
    assert found.flops is None


def test_an_unreadable_program_falls_back_to_the_counts_of_xla(four_chips, monkeypatch):
    config = _small_config()

    def product(recipe, state, mesh, images_shape):
        whole = NamedSharding(mesh, PartitionSpec())
        matrix = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=whole)
        return jax.jit(lambda x: x @ x, out_shardings=whole).lower(matrix)

    def unreadable(compiled):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(compiling, "lower_step", product)
    monkeypatch.setattr(compiling, "read", unreadable)
    found = compiling.measure(config, four_chips, steps_per_epoch=1, with_objective=True)
    assert found.fits
    assert found.flops == pytest.approx(2 * 256**3, rel=0.02)
    assert found.argument_bytes == 2 * 256**2
    assert found.received_bytes is None
    assert found.objective_flops is None
    assert "cannot read" in found.estimates["received_bytes"]


def test_a_batch_that_cannot_be_divided_is_an_error(four_chips):
    config = default_config()
    config.batch_size = 6
    with pytest.raises(UserError, match="batch_size = 6 cannot be divided over 4 devices"):
        compiling.measure(config, four_chips, steps_per_epoch=1, with_objective=False)
    config.batch_size, config.accumulation_steps = 68, 2
    with pytest.raises(UserError, match="over 4 devices in accumulation_steps = 2; use 64 or 72"):
        compiling.measure(config, four_chips, steps_per_epoch=1, with_objective=False)


def _cached(program="a program", chips="v5e:2x2", size=1):
    """Asks the cache; returns the size that it gives and whether it was made now."""
    made = []

    def make():
        made.append(size)
        return compiling.StepCost(size, size, fits=False, hbm_available_bytes=1.0)

    return compiling.cached(compiling.cache_key(program, chips), make).chips, bool(made)


def test_the_same_program_is_compiled_once():
    assert _cached(size=1) == (1, True)
    assert _cached(size=2) == (1, False)


@pytest.mark.parametrize("other", [{"program": "another"}, {"chips": "v5e:2x4"}])
def test_another_program_or_slice_is_not_in_the_cache(other):
    _cached(size=1)
    assert _cached(size=2, **other) == (2, True)


def test_results_of_another_compiler_are_not_taken(monkeypatch):
    _cached(size=1)
    monkeypatch.setattr(compiling, "_version", lambda package: "99")
    assert _cached(size=2) == (2, True)


@pytest.mark.parametrize("damage", ["", "{", '{"size": 1}', "[1]", "\0"])
def test_a_damaged_cache_file_is_replaced(damage):
    _cached(size=1)
    (file,) = user_directory("cache", "plan").iterdir()
    file.write_text(damage)
    assert _cached(size=2) == (2, True)
    assert _cached(size=3) == (2, False)


def test_without_a_writable_cache_everything_is_compiled(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _cached(size=1) == (1, True)
    assert _cached(size=2) == (2, True)
