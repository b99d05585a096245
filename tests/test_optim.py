"""The optimizer and the schedule compared with reference values."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from music_jax.optim import lars, warmup_cosine

_REFERENCE = pathlib.Path(__file__).parent / "reference"


def _case(file, prefix):
    with np.load(_REFERENCE / file) as archive:
        return {k[len(prefix) :]: archive[k] for k in archive if k.startswith(prefix)}


@pytest.mark.parametrize("jit", [False, True])
def test_lars_matches_the_reference(jit):
    case = _case("lars.npz", "00/")
    rates = jnp.asarray(case["lrs"], jnp.float32)
    optimizer = lars(
        lambda step: rates[step],
        weight_decay=float(case["weight_decay"]),
        momentum=float(case["momentum"]),
        trust_coefficient=float(case["eta"]),
    )
    update = jax.jit(optimizer.update) if jit else optimizer.update
    params = {"w": jnp.asarray(case["w0"], jnp.float32), "b": jnp.asarray(case["b0"], jnp.float32)}
    state = optimizer.init(params)
    for step in range(len(rates)):
        grads = {
            "w": jnp.asarray(case["grads_w"][step], jnp.float32),
            "b": jnp.asarray(case["grads_b"][step], jnp.float32),
        }
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], case["w"][step], rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(params["b"], case["b"][step], rtol=2e-6, atol=1e-6)


def test_lars_updates_masked_parameters_by_plain_momentum():
    params = {"adapted": jnp.full((2,), 3.0), "plain": jnp.full((2, 2), 3.0)}
    optimizer = lars(
        1.0, weight_decay=0.5, trust_coefficient=0.1, mask={"adapted": True, "plain": False}
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # g = 1 + 0.5 * 3 = 2.5, scaled by 0.1 * |w| / |g| to 0.1 * 3.
    np.testing.assert_allclose(updates["adapted"], -0.3, rtol=1e-6)
    np.testing.assert_allclose(updates["plain"], -1.0, rtol=1e-6)


@pytest.mark.parametrize("zero", ["params", "grads"])
def test_lars_uses_a_trust_ratio_of_one_if_a_norm_is_zero(zero):
    params = {"w": jnp.full((2, 2), 0.0 if zero == "params" else 1.0)}
    grads = {"w": jnp.full((2, 2), 0.0 if zero == "grads" else 1.0)}
    optimizer = lars(1.0)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -grads["w"])


def test_lars_supports_norms_far_below_one():
    w, g = np.asarray([[0.03, -0.01, 0.0]]), np.asarray([[0.002, 0.001, -0.005]])
    optimizer = lars(1.0, trust_coefficient=0.1)
    params = {"w": jnp.asarray(w, jnp.float32)}
    updates, _ = optimizer.update(
        {"w": jnp.asarray(g, jnp.float32)}, optimizer.init(params), params
    )
    expected = -0.1 * np.linalg.norm(w) / np.linalg.norm(g) * g
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)


def test_lars_differs_from_optax_lars_under_a_schedule():
    def schedule(step):
        return jnp.asarray(step, jnp.float32) / 5

    params = jnp.ones((2, 2))
    moved = []
    for optimizer in (lars(schedule), optax.lars(schedule, weight_decay=0.0)):
        w, state = params, optimizer.init(params)
        for _ in range(5):
            updates, state = optimizer.update(jnp.ones((2, 2)), state, w)
            w = optax.apply_updates(w, updates)
        moved.append(float(jnp.mean(params - w)))
    assert moved[0] > 1.3 * moved[1], moved


@pytest.mark.parametrize("prefix", ["00/", "01/"])
def test_warmup_cosine_matches_the_reference(prefix):
    case = _case("learning_rate.npz", prefix)
    schedule = warmup_cosine(
        float(case["base_lr"]),
        batch_size=int(case["batch_size"]),
        steps_per_epoch=int(case["steps_per_epoch"]),
        num_epochs=int(case["epochs"]),
        warmup_epochs=int(case["warmup_epochs"]),
    )
    rates = jax.vmap(schedule)(jnp.arange(len(case["lr"])))
    np.testing.assert_allclose(rates, case["lr"], rtol=2e-5, atol=1e-7)


def test_warmup_cosine_without_warmup_starts_at_the_peak():
    schedule = warmup_cosine(
        0.1, batch_size=512, steps_per_epoch=3, num_epochs=2, warmup_epochs=0, final_scale=0.5
    )
    np.testing.assert_allclose([schedule(0), schedule(6)], [0.2, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"steps_per_epoch": 0},
        {"num_epochs": 0},
        {"warmup_epochs": 10},
        {"warmup_epochs": 9.95},  # rounds to all steps
        {"warmup_epochs": -1},
    ],
)
def test_warmup_cosine_rejects_invalid_lengths(wrong):
    arguments = {"batch_size": 256, "steps_per_epoch": 5, "num_epochs": 10, "warmup_epochs": 2}
    with pytest.raises(ValueError, match=r"must be|is all of the 50 steps"):
        warmup_cosine(0.1, **(arguments | wrong))


def test_warmup_cosine_supports_a_single_step():
    schedule = warmup_cosine(
        0.1, batch_size=1, steps_per_epoch=1, num_epochs=1, warmup_epochs=0, final_scale=0.5
    )
    np.testing.assert_allclose([schedule(0), schedule(1)], [0.1 / 256, 0.05 / 256], rtol=1e-6)


def test_lars_has_a_default_trust_coefficient_of_a_thousandth_and_no_decay():
    params = {"w": jnp.full((2, 2), 3.0)}
    optimizer = lars(1.0)
    updates, _ = optimizer.update({"w": jnp.ones((2, 2))}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -1e-3 * 3.0, rtol=1e-6)
