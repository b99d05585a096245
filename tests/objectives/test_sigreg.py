"""SIGReg against its formula in numpy, with all points of the integral and complex exponentials."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_jax.objectives import sigreg_loss
from tests.objectives.cases import EXTREMES, extreme_views, relative_error

KEY = jax.random.key(7)


def unit_directions(dim, slices):
    """Independent normal numbers of the key, which stand for the same directions in any dtype."""
    directions = np.asarray(jax.random.normal(KEY, (dim, slices), jnp.float32), np.float64)
    return directions / np.linalg.norm(directions, axis=0)


def by_definition(za, zb, weight, slices=6, points=17, limit=5.0):
    """Returns the value and both gradients in float64."""
    za, zb = (np.asarray(z, np.float64) for z in (za, zb))
    u, t = unit_directions(za.shape[1], slices), np.linspace(-limit, limit, points)
    normal = np.exp(-(t**2) / 2)
    value, gradients = (1 - weight) * np.mean((za - zb) ** 2) / 4, []
    for z, other in ((za, zb), (zb, za)):
        waves = np.exp(1j * t * (z @ u)[..., None])  # [N, M, T]
        difference = waves.mean(0) - normal
        statistics = len(z) * np.trapezoid(np.abs(difference) ** 2 * normal, t, axis=-1)
        value += weight * statistics.mean() / 2
        slopes = 2 * np.real(np.conj(difference) * 1j * t * waves)
        slopes = np.trapezoid(slopes * normal, t, axis=-1) / slices  # [N, M]
        gradients.append((1 - weight) * (z - other) / (2 * z.size) + weight * slopes @ u.T / 2)
    return value, gradients


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize(
    "options", [{"weight": 1.0}, {"weight": 0.05}, {"weight": 1.0, "points": 8, "limit": 3.0}]
)
def test_value_and_gradients_match_the_definition(options, name, dtype):
    views = extreme_views(name, 10, 7)
    expected, expected_gradients = by_definition(*views, **options)
    loss = functools.partial(
        sigreg_loss,
        key=KEY,
        num_slices=6,
        sigreg_weight=options["weight"],
        num_points=options.get("points", 17),
        t_max=options.get("limit", 5.0),
    )
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(z, dtype) for z in views]
        found, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays)
        assert relative_error(loss(*arrays), found) < 1e-6
    assert found.dtype == dtype
    # The angles, up to 2e5, have an error of 1e-2 in float32.
    tolerance = {"float32": 2e-2 if "huge" in name else 1e-5, "float64": 1e-9}[dtype]
    assert relative_error(found, expected) < tolerance
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=tolerance * np.abs(wanted).max() + 1e-30)


def test_bfloat16_embeddings_give_a_float32_loss():
    views = [jnp.asarray(z, jnp.bfloat16) for z in extreme_views("random", 10, 7)]
    step = jax.value_and_grad(functools.partial(sigreg_loss, key=KEY))
    found, gradient = step(*views)
    expected, wanted = step(*(z.astype(jnp.float32) for z in views))
    assert (found.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    assert relative_error(found, expected) < 1e-6
    assert relative_error(gradient, wanted) < 1e-2


def test_each_key_has_its_own_directions():
    z = extreme_views("random", 10, 7)[0]
    first, again, other = (
        sigreg_loss(z, z, key=jax.random.key(seed), num_slices=4) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_normal_embeddings_have_the_least_value():
    z = np.random.default_rng(0).normal(size=(512, 6)).astype(np.float32)
    loss = functools.partial(sigreg_loss, key=KEY, sigreg_weight=1.0)
    normal = loss(z, z)
    for other in (0 * z, 0.5 * z, 2 * z, z + 1, np.sign(z), z[:, :1] + 0 * z):
        assert loss(other, other) > 2 * normal


def test_the_gradient_stores_no_number_per_sample_direction_and_point():
    z = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    step = jax.jit(jax.grad(functools.partial(sigreg_loss, key=KEY), (0, 1)))
    memory = step.lower(z, z).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 9 * 512 * 1024 * 4  # those of one view
