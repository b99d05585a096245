import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_jax.objectives import barlow_twins_loss
from tests.objectives.cases import cases, relative_error

CASES = cases("baseline_objectives")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", CASES)
def test_value_and_gradients_are_the_references(number, dtype):
    case = CASES[number]
    with jax.enable_x64(dtype == "float64"):
        za, zb = (jnp.asarray(case[name], dtype) for name in ("za", "zb"))
        step = jax.value_and_grad(barlow_twins_loss, (0, 1))
        loss, gradients = jax.jit(step)(za, zb)
        value = barlow_twins_loss(za, zb)
    assert loss.dtype == dtype
    tolerance = {"float32": 2e-5, "float64": 1e-10}[dtype]
    assert relative_error(loss, case["barlow_loss"]) < tolerance
    assert relative_error(value, loss) < tolerance
    for name, gradient in zip("ab", gradients, strict=True):
        assert relative_error(gradient, case[f"barlow_grad_{name}"]) < tolerance


def by_definition(za, zb, weight):
    za, zb = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (za, zb))
    correlation = za.T @ zb / len(za)
    diagonal = np.diag(correlation)
    off_diagonal = (correlation**2).sum() - (diagonal**2).sum()
    return ((1 - diagonal) ** 2).sum() + weight * off_diagonal


@pytest.mark.parametrize(("batch", "dim"), [(6, 40), (40, 6), (8, 8)])
def test_value_is_the_definitions_whichever_is_larger(batch, dim):
    za, zb = np.random.default_rng(0).normal(size=(2, batch, dim))
    loss = barlow_twins_loss(np.float32(za), np.float32(zb), off_diagonal_weight=0.1)
    np.testing.assert_allclose(loss, by_definition(za, zb, 0.1), rtol=1e-5)


def test_a_batch_smaller_than_the_embedding_builds_no_square_of_the_embedding():
    step = jax.jit(jax.grad(functools.partial(barlow_twins_loss)))
    small, large = (np.zeros((batch, 64), np.float32) for batch in (8, 128))
    assert "64x64" not in step.lower(small, small).as_text()
    assert "64x64" in step.lower(large, large).as_text()


def test_a_collapsed_batch_has_a_finite_gradient():
    z = jnp.ones((4, 6))
    assert jnp.isfinite(jax.grad(barlow_twins_loss)(z, z)).all()


def test_bfloat16_embeddings_give_a_float32_loss():
    z = jnp.asarray(CASES["00"]["za"], jnp.bfloat16)
    loss = barlow_twins_loss(z, z[::-1])
    assert loss.dtype == jnp.float32
    exact = z.astype(jnp.float32)
    np.testing.assert_allclose(loss, barlow_twins_loss(exact, exact[::-1]), rtol=1e-6)
