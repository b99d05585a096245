"""The total coding rate against its formula in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_jax.objectives import tcr_loss
from tests.objectives.cases import EXTREMES, extreme_views, relative_error


def by_definition(za, zb, weight=200.0, epsilon_squared=0.2):
    """Returns the value and both gradients in float64."""
    views = [np.asarray(z, np.float64) for z in (za, zb)]
    batch, dim = za.shape
    norms = [np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12) for z in views]
    a, b = (z / norm for z, norm in zip(views, norms, strict=True))
    mean = (a + b) / 2
    length = np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    value, gradients = 0.0, []
    for z, norm in zip((a, b), norms, strict=True):
        matrix = np.eye(dim) + dim / (batch * epsilon_squared) * z.T @ z
        value -= np.linalg.slogdet(matrix)[1] / 4
        value -= weight / 2 * np.mean(np.sum(z * mean / length, axis=1))
        # The sum of both cosines is twice the length of the mean.
        slope = -dim / (batch * epsilon_squared) * z @ np.linalg.inv(matrix) / 2
        slope -= weight / (2 * batch) * mean / length
        gradients.append((slope - z * np.sum(z * slope, axis=1, keepdims=True)) / norm)
    return value, gradients


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize(("batch", "dim"), [(6, 16), (16, 6), (8, 8)])
def test_value_and_gradients_match_the_definition(batch, dim, name, dtype):
    views = extreme_views(name, batch, dim)
    options = {"similarity_weight": 3.0, "epsilon_squared": 0.5}
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(z, dtype) for z in views]
        step = jax.value_and_grad(lambda a, b: tcr_loss(a, b, **options), (0, 1))
        found, gradients = jax.jit(step)(*arrays)
        value, default = tcr_loss(*arrays, **options), tcr_loss(*arrays)
    assert found.dtype == dtype
    if name == "zero":
        assert not any(np.asarray(x).any() for x in (found, *gradients))
        return
    tolerance = {"float32": 1e-5, "float64": 1e-10}[dtype]
    expected, expected_gradients = by_definition(*views, 3.0, 0.5)
    assert relative_error(found, expected) < tolerance
    assert relative_error(value, found) < 1e-6
    assert relative_error(default, by_definition(*views)[0]) < tolerance
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, wanted) < tolerance


def test_bfloat16_embeddings_give_a_float32_loss():
    views = [jnp.asarray(z, jnp.bfloat16) for z in extreme_views("random", 6, 16)]
    found, gradient = jax.value_and_grad(tcr_loss)(*views)
    expected, wanted = jax.value_and_grad(tcr_loss)(*(z.astype(jnp.float32) for z in views))
    assert (found.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    assert relative_error(found, expected) < 1e-6
    assert relative_error(gradient, wanted) < 1e-2


def test_opposite_views_have_a_finite_gradient():
    z = extreme_views("random", 6, 16)[0]
    assert jnp.isfinite(jax.grad(tcr_loss)(z, -z)).all()


def test_the_matrix_is_the_smaller_one():
    step = jax.jit(jax.grad(tcr_loss))
    small, large = (np.zeros((batch, 64), np.float32) for batch in (8, 128))
    assert "64x64" not in step.lower(small, small).as_text()
    assert "128x128" not in step.lower(large, large).as_text()
