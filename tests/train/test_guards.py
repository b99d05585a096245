"""Steps that trip a guard or do not, and the statistics of known embeddings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

from music_jax.config import default_config
from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.train.failures import read_trip
from music_jax.train.guards import (
    STATISTICS,
    embedding_statistics,
    init_guard_state,
    watch,
)

_HEALTHY = {
    "usage_entropy": 0.99,
    "dead_units": 0.0,
    "embedding_std": 0.8,
    "effective_rank": 30.0,
}


def _guards(**fields):
    config = default_config()
    config.guards.update(fields)
    return config_dict.FrozenConfigDict(config.guards)


def _watched(losses, *, guards=None, grad_norm=1.0, statistics=_HEALTHY, state=None):
    """The state after steps of these losses; the statistics are numbers or one list a name."""
    step_function = jax.jit(functools.partial(watch, guards or _guards()))
    state, goods = state or init_guard_state(), []
    for i, loss in enumerate(losses):
        now = {
            name: np.float32(np.broadcast_to(v, len(losses))[i]) for name, v in statistics.items()
        }
        good, state = step_function(
            state, np.int32(i + 1), np.float32(loss), np.float32(grad_norm), now
        )
        goods.append(bool(good))
    return state, goods


def _descent(steps, seed=0):
    """A loss that falls steeply, then slowly, with noise that shrinks with it."""
    rng, step = np.random.default_rng(seed), np.arange(steps)
    return 100 * np.exp(-step / 20) + 3 * np.exp(-step / 200) - 7 + 0.05 * rng.normal(size=steps)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_descent_a_slow_rise_and_a_fall_trip_nothing(sign):
    losses = sign * _descent(400)
    state, goods = _watched([*losses, losses[-1] - 5.0])
    assert all(goods)
    assert read_trip(state) is None
    assert int(state.losses) == 401


def test_a_loss_spike_trips_at_its_step_and_rejects_all_later_updates():
    losses = _descent(300)
    losses[250] += 10.0
    state, goods = _watched(losses)
    assert goods == [True] * 250 + [False] * 50
    trip = read_trip(state)
    assert (trip.step, trip.first_step, trip.what) == (251, 251, "the loss spiked")
    np.testing.assert_allclose(trip.seen["loss"], losses[250], rtol=1e-6)
    np.testing.assert_allclose(trip.seen["loss_mean"], losses[225:250].mean(), atol=0.2)
    before, _ = _watched(losses[:250])
    np.testing.assert_array_equal(state.loss_mean, before.loss_mean)  # the spike is no part of it


def test_the_running_mean_and_deviation_are_those_of_numpy():
    losses = np.random.default_rng(0).normal(3.0, 2.0, 25)
    state, _ = _watched(losses)
    np.testing.assert_allclose(state.loss_mean, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(state.loss_variance, losses.var(), rtol=1e-5)


@pytest.mark.parametrize(
    "fields", [{"loss_spike_deviations": 0.0}, {"warmup_steps": 300}, {"enabled": False}]
)
def test_a_loss_spike_that_is_not_checked_for(fields):
    losses = _descent(300)
    losses[250] += 10.0
    assert all(_watched(losses, guards=_guards(**fields))[1])


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("bad", ["loss", "grad_norm"])
def test_non_finite_values_trip_from_the_first_step(enabled, bad):
    loss, norm = (np.nan, 1.0) if bad == "loss" else (1.0, np.inf)
    state, goods = _watched([loss, 1.0], grad_norm=norm, guards=_guards(enabled=enabled))
    assert goods == [False, False]
    trip = read_trip(state)
    assert (trip.step, trip.what) == (1, "the loss or the gradient was not finite")


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("usage_entropy", 0.05, "the segments used their units unevenly"),
        ("dead_units", 0.97, "most units were dead"),
        ("embedding_std", 0.005, "the embeddings hardly varied"),
        ("effective_rank", 1.05, "the embeddings varied along hardly any dimension"),
    ],
)
def test_a_collapse_trips_once_it_has_lasted(name, value, what):
    healthy = _HEALTHY[name]
    # Short ones pass; the last begins at step 151.
    course = [value] * 90 + [healthy] * 20 + [value] * 39 + [healthy] + [value] * 100
    state, goods = _watched(np.ones(250), statistics=_HEALTHY | {name: course})
    assert goods == [True] * 199 + [False] * 51
    trip = read_trip(state)
    assert (trip.step, trip.first_step, trip.what) == (200, 151, what)
    np.testing.assert_allclose(trip.seen[name], value, rtol=1e-6)


def test_baselines_have_no_usage():
    statistics = {name: v for name, v in _HEALTHY.items() if name != "usage_entropy"}
    assert all(_watched(np.ones(200), statistics=statistics)[1])


def _embeddings(rank, batch=512, dim=200, seed=0):
    """Samples of a Gaussian whose covariance has `rank` equal eigenvalues."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(dim, rank)))[0]
    return (rng.normal(size=(batch, rank)) @ basis.T).astype(np.float32)


@pytest.mark.parametrize("dim", [40, 200])
@pytest.mark.parametrize("rank", [1, 2, 5, 30])
def test_effective_rank_is_that_of_the_eigenvalues(rank, dim):
    z = _embeddings(rank, dim=dim) + 0.3
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(np.cov(unit.T, bias=True).astype(np.float64))
    expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    found = embedding_statistics(jnp.asarray(z))["effective_rank"]
    np.testing.assert_allclose(
        found, expected, rtol=1e-4 if dim == 40 else 0.01 if rank == 1 else 0.15
    )


def test_deviation_and_usage_are_those_of_numpy():
    z = _embeddings(30) * 2 + 0.5
    found = embedding_statistics(jnp.asarray(z), num_segments=25, temperature=0.5)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(
        found["embedding_std"], unit.std(axis=0).mean() * np.sqrt(200), rtol=1e-4
    )
    e = np.exp(z.reshape(512, 25, 8) / 0.5)
    usage = (e / e.sum(axis=2, keepdims=True)).mean(axis=0)
    expected = -(usage * np.log(usage)).sum(axis=1).mean() / np.log(8)
    np.testing.assert_allclose(found["usage_entropy"], expected, rtol=1e-4)
    assert found["dead_units"] == 0


def test_statistics_are_those_of_the_centered_embeddings_if_the_objective_centers_them():
    z = np.random.default_rng(0).normal(size=(40, 8)) + 20 * np.arange(8)
    z = z.astype(np.float32)
    plain = embedding_statistics(z, num_segments=2)
    found = embedding_statistics(z, num_segments=2, center=True)
    expected = embedding_statistics(z - z.mean(axis=0), num_segments=2)
    for name in plain:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
        assert abs(plain[name] - expected[name]) > 0.1


def test_statistics_of_collapsed_embeddings():
    alike = embedding_statistics(jnp.ones((64, 32)), num_segments=4)
    assert float(alike["embedding_std"]) < 1e-6
    assert float(alike["effective_rank"]) < 1.001  # of the rounding
    zeros = embedding_statistics(jnp.zeros((64, 32)), num_segments=4)
    assert float(zeros["embedding_std"]) == float(zeros["effective_rank"]) == 0
    one_unit = 50 * jnp.tile(jnp.eye(8)[0], (64, 4))
    used = embedding_statistics(one_unit, num_segments=4)
    assert float(used["usage_entropy"]) < 1e-6
    np.testing.assert_allclose(used["dead_units"], 7 / 8)
    half = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)) * (np.arange(32) % 2))
    np.testing.assert_allclose(embedding_statistics(half.astype(jnp.float32))["dead_units"], 0.5)


def test_a_batch_smaller_than_a_segment_is_no_collapse():
    codes = 50 * jnp.tile(jnp.eye(64)[:4], (1, 3))  # 4 samples, each at its own unit
    found = embedding_statistics(codes, num_segments=3)
    np.testing.assert_allclose(found["usage_entropy"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(found["dead_units"], 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_statistics_on_four_devices_are_those_of_the_global_batch_with_little_communication(dtype):
    z = jnp.asarray(_embeddings(30, dim=640), dtype)
    function = functools.partial(embedding_statistics, num_segments=10)
    expected = jax.jit(function)(z)
    mesh = make_data_mesh(4, fsdp=2)
    jitted = jax.jit(function, in_shardings=batch_sharding(mesh))
    found = jitted(jax.device_put(z, batch_sharding(mesh)))
    for name in STATISTICS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)
    text = jitted.lower(z).compile().as_text()
    assert "all-reduce" in text
    assert not any(kind in text for kind in ("all-gather", "all-to-all", "collective-permute"))
