"""Bits that differ between devices, or between two runs of the same step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from music_jax.config import default_config
from music_jax.distributed.mesh import make_data_mesh
from music_jax.train.failures import CheckedStep, _differing
from music_jax.train.guards import init_guard_state
from music_jax.train.state import TrainState, state_shardings
from tests.poisoned_main import flip_a_bit


def _state(mesh, dtype=jnp.float32):
    params = {
        "bias": jnp.arange(5).astype(dtype),
        "kernel": jnp.arange(2**17).reshape(512, 256).astype(dtype),
    }
    state = TrainState(
        step=jnp.asarray(7, jnp.int32),
        params=params,
        batch_stats={"mean": jnp.arange(3.0)},
        opt_state=optax.trace(0.9).init(params),
        guard=init_guard_state(),
    )
    return jax.device_put(state, state_shardings(state, mesh))


def _checks(state, mesh, *, step_function=None, replicas=2, determinism=3):
    config = default_config()
    config.guards.check_replicas_every_steps = replicas
    config.guards.check_determinism_every_steps = determinism
    return CheckedStep(config, step_function, state, mesh)


@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_flipped_bit_on_one_device_is_found(fsdp, dtype):
    mesh = make_data_mesh(4, fsdp=fsdp)
    state = _state(mesh, dtype)
    checks = _checks(state, mesh)
    assert checks.replicas(2, state, saving=False) is None
    wrong = flip_a_bit(state)
    assert checks.replicas(1, wrong, saving=False) is None  # not due
    found = checks.replicas(2, wrong, saving=False)
    assert found == "devices differ in params/bias on cpu:3 of process 0"
    assert checks.replicas(1, wrong, saving=True) == found
    assert _checks(state, mesh, replicas=0).replicas(2, wrong, saving=True) is None


def test_devices_outside_the_majority_are_marked():
    checksums = np.array([[1, 1], [1, 2], [3, 1], [1, 2]], np.uint32)
    parts = np.array([["all", "a"], ["all", "b"], ["all", "a"], ["all", "b"]])
    assert np.argwhere(_differing(checksums, parts)).tolist() == [[2, 0]]
    tied = _differing(checksums, np.array([["all", "a"], ["all", "a"], ["all", "b"], ["all", "b"]]))
    assert np.argwhere(tied[:, 1]).ravel().tolist() == [0, 1, 2, 3]


def test_a_step_that_gives_other_bits_when_repeated_is_found():
    mesh = make_data_mesh(2)
    state = _state(mesh)
    calls = []

    def step_function(state, *batch):
        state = dataclasses.replace(state, step=state.step + 1)
        calls.append(1)
        return (flip_a_bit_of_two(state) if len(calls) == 3 else state), {"loss": jnp.ones(())}

    def flip_a_bit_of_two(state):
        mean = jax.device_put(
            np.nextafter(np.asarray(state.batch_stats["mean"]), np.float32(9)),
            state.batch_stats["mean"].sharding,
        )
        return dataclasses.replace(state, batch_stats={"mean": mean})

    checked_step = _checks(state, mesh, step_function=step_function)
    batch = (jnp.zeros(2), jnp.zeros(2))
    state, _, wrong = checked_step(3, state, batch)  # calls 1 and 2
    assert wrong is None
    assert len(calls) == 2
    state, _, wrong = checked_step(6, state, batch)  # 3 and 4
    assert wrong == (
        "repeating the step gave other bits in batch_stats/mean on cpu:0 of process 0, "
        "cpu:1 of process 0"
    )
    assert int(state.step) == 9
    checked_step(7, state, batch)
    assert len(calls) == 5  # not due: once
