"""The objective of a single discrete variable against its formula in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_jax.objectives import discrete_loss
from tests.objectives.cases import EXTREMES, extreme_views, relative_error


def by_definition(za, zb, temperature, sharpness, diversity):
    """Returns the value and both gradients in float64."""

    def log_softmax(z):
        z = np.asarray(z, np.float64) / temperature
        z = z - z.max(1, keepdims=True)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    def projected(p, slope):
        return p * (slope - np.sum(p * slope, axis=1, keepdims=True))

    logs = [log_softmax(z) for z in (za, zb)]
    value, gradients = 0.0, []
    for own, other in (logs, logs[::-1]):
        p, q = np.exp(own), np.exp(other)
        mean = p.mean(0)
        log_mean = np.log(np.maximum(mean, 1e-300))
        value += np.mean(np.sum(p * (own - other), 1))
        value -= sharpness * np.mean(np.sum(p * own, 1)) - diversity * mean @ log_mean
        slope = projected(p, own - other) + p - q  # of both divergences
        slope += -sharpness * projected(p, own) + diversity * projected(p, log_mean[None])
        gradients.append(slope / (2 * len(p) * temperature))
    return value / 2, gradients


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("options", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0)])
def test_value_and_gradients_match_the_definition(options, name, dtype):
    views = extreme_views(name, 10, 7)
    names = ("temperature", "sharpness_weight", "diversity_weight")
    loss = functools.partial(discrete_loss, **dict(zip(names, options, strict=True)))
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(z, dtype) for z in views]
        found, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays)
        np.testing.assert_allclose(loss(*arrays), found, rtol=1e-6, atol=1e-6)
    assert found.dtype == dtype
    expected, expected_gradients = by_definition(*views, *options)
    rounding = {"float32": 1e-6, "float64": 1e-14}[dtype]
    np.testing.assert_allclose(found, expected, rtol=10 * rounding, atol=rounding)
    relative = {"float32": 2e-5, "float64": 1e-10}[dtype]
    if name == "huge":
        relative *= 200  # differences of logits of up to 1e5 cancel
    if name == "tiny" and dtype == "float64":
        relative = 1e-6  # the definition's own rounding errors
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        bound = relative * np.abs(wanted).max() + (0 if name == "tiny" else 0.1 * rounding)
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=bound)


def test_bfloat16_embeddings_give_a_float32_loss():
    views = [jnp.asarray(z, jnp.bfloat16) for z in extreme_views("random", 10, 7)]
    found, gradient = jax.value_and_grad(discrete_loss)(*views)
    expected, wanted = jax.value_and_grad(discrete_loss)(*(z.astype(jnp.float32) for z in views))
    assert (found.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    assert relative_error(found, expected) < 1e-6
    assert relative_error(gradient, wanted) < 1e-2


def test_the_bound_is_reached_by_a_balanced_code():
    z = 60 * np.eye(5, dtype=np.float32)[np.arange(20) % 5]
    np.testing.assert_allclose(discrete_loss(z, z), -np.log(5), rtol=1e-6)
    collapsed = 60 * np.eye(5, dtype=np.float32)[np.zeros(20, int)]
    np.testing.assert_allclose(discrete_loss(collapsed, collapsed), 0, atol=1e-6)
