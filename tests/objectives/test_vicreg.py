import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_jax.objectives import vicreg_loss
from tests.objectives.cases import cases, relative_error

CASES = cases("baseline_objectives")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", CASES)
def test_value_and_gradients_are_the_references(number, dtype):
    case = CASES[number]
    with jax.enable_x64(dtype == "float64"):
        za, zb = (jnp.asarray(case[name], dtype) for name in ("za", "zb"))
        step = jax.value_and_grad(vicreg_loss, (0, 1))
        loss, gradients = jax.jit(step)(za, zb)
        value = vicreg_loss(za, zb)
    assert loss.dtype == dtype
    tolerance = {"float32": 2e-5, "float64": 1e-10}[dtype]
    assert relative_error(loss, case["vicreg_loss"]) < tolerance
    assert relative_error(value, loss) < tolerance
    for name, gradient in zip("ab", gradients, strict=True):
        assert relative_error(gradient, case[f"vicreg_grad_{name}"]) < tolerance


def by_definition(za, zb, similarity, variance, covariance):
    loss = similarity * ((za - zb) ** 2).mean()
    for z in (za, zb):
        covariances = np.cov(z.T)
        diagonal = np.diag(covariances)
        loss += variance * np.maximum(0, 1 - np.sqrt(diagonal + 1e-4)).mean() / 2
        loss += covariance * ((covariances**2).sum() - (diagonal**2).sum()) / z.shape[1]
    return loss


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize(("batch", "dim"), [(6, 40), (40, 6), (8, 8)])
def test_each_term_is_the_definitions_whichever_is_larger(batch, dim, weights):
    za, zb = 0.7 * np.random.default_rng(0).normal(size=(2, batch, dim))
    names = ("similarity_weight", "variance_weight", "covariance_weight")
    loss = vicreg_loss(np.float32(za), np.float32(zb), **dict(zip(names, weights, strict=True)))
    np.testing.assert_allclose(loss, by_definition(za, zb, *weights), rtol=1e-5)


def test_a_batch_smaller_than_the_embedding_builds_no_square_of_the_embedding():
    step = jax.jit(jax.grad(functools.partial(vicreg_loss)))
    small, large = (np.zeros((batch, 64), np.float32) for batch in (8, 128))
    assert "64x64" not in step.lower(small, small).as_text()
    assert "64x64" in step.lower(large, large).as_text()


def test_a_collapsed_batch_has_a_finite_gradient():
    z = jnp.ones((4, 6))
    assert jnp.isfinite(jax.grad(vicreg_loss)(z, z)).all()


def test_bfloat16_embeddings_give_a_float32_loss():
    z = jnp.asarray(CASES["00"]["za"], jnp.bfloat16)
    loss = vicreg_loss(z, z[::-1])
    assert loss.dtype == jnp.float32
    exact = z.astype(jnp.float32)
    np.testing.assert_allclose(loss, vicreg_loss(exact, exact[::-1]), rtol=1e-6)
