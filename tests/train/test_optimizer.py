"""The optimizers and the schedule that a config describes, against plain numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from music_jax.config import default_config
from music_jax.train.optimizer import OPTIMIZERS, make_schedule

RATES = (0.3, 0.2, 0.1)


def optimizer_config(name):
    """Every field differs from its default and from the others."""
    config = default_config()
    config.optimizer.name = name
    config.optimizer.weight_decay = 0.07
    config.optimizer.momentum = 0.8
    return config.optimizer


def moved(name):
    """A matrix and a bias, and their gradients, through three steps of an optimizer."""
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    grads = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in RATES]
    optimizer = OPTIMIZERS[name](lambda step: jnp.asarray(RATES)[step], optimizer_config(name))

    @jax.jit
    def step(params, state, grad):
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam divides by an integer's power
        for grad in grads:
            grad = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grad)
            params, state = step(params, state, grad)
    return start, grads, params


def test_sgd_has_momentum_and_decays_matrices_alone():
    start, grads, found = moved("sgd")
    for name, decay in (("kernel", 0.07), ("bias", 0.0)):
        w, velocity = start[name], 0.0
        for rate, grad in zip(RATES, grads, strict=True):
            velocity = 0.8 * velocity + grad[name] + decay * w
            w = w - rate * velocity
        np.testing.assert_allclose(found[name], w, rtol=1e-5)


def test_lars_adapts_and_decays_matrices_alone():
    start, grads, found = moved("lars")
    for name, decay in (("kernel", 0.07), ("bias", 0.0)):
        w, velocity = start[name], 0.0
        for rate, grad in zip(RATES, grads, strict=True):
            g = grad[name] + decay * w
            if name == "kernel":
                g = 1e-3 * np.linalg.norm(w) / np.linalg.norm(g) * g
            velocity = 0.8 * velocity + g
            w = w - rate * velocity
        np.testing.assert_allclose(found[name], w, rtol=1e-5)


def test_adamw_decays_matrices_alone():
    start, grads, found = moved("adamw")
    for name, decay in (("kernel", 0.07), ("bias", 0.0)):
        w, mean, square = start[name], 0.0, 0.0
        for t, (rate, grad) in enumerate(zip(RATES, grads, strict=True), 1):
            mean = 0.9 * mean + 0.1 * grad[name]
            square = 0.999 * square + 0.001 * grad[name] ** 2
            ratio = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
            w = w - rate * (ratio + decay * w)
        np.testing.assert_allclose(found[name], w, atol=1e-5)


def test_the_sgd_of_a_run_saved_before_its_decay_was_masked_has_the_same_state():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    before = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lambda step: 0.1, momentum=0.9))
    now = OPTIMIZERS["sgd"](lambda step: 0.1, optimizer_config("sgd"))
    assert jax.tree.structure(before.init(params)) == jax.tree.structure(now.init(params))


@pytest.mark.parametrize("step", [0, 3, 14, 15, 31, 34])
def test_the_schedule_is_that_of_the_config(step):
    config = default_config()
    config.batch_size, config.num_epochs = 96, 7
    config.optimizer.base_learning_rate = 0.4
    config.optimizer.warmup_epochs = 3
    config.optimizer.final_scale = 0.02
    peak = 0.4 * 96 / 256
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 15) / 20))
    expected = peak * step / 15 if step < 15 else peak * (0.02 + 0.98 * cosine)
    assert make_schedule(config, 5)(step) == pytest.approx(expected, rel=1e-5)
