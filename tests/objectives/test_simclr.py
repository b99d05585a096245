import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from music_jax.objectives import simclr_loss
from tests.objectives.cases import cases, relative_error

CASES = cases("baseline_objectives")


def by_optax(za, zb, temperature):
    labels = jnp.tile(jnp.arange(len(za)), 2)
    return optax.losses.ntxent(jnp.concatenate([za, zb]), labels, temperature=temperature)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_value_and_gradients_are_those_of_optax(temperature, dtype):
    for case in CASES.values():
        with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
            za, zb = (jnp.asarray(case[name], dtype) for name in ("za", "zb"))
            expected, wanted = jax.value_and_grad(by_optax, (0, 1))(za, zb, temperature)

            def loss(a, b):
                return simclr_loss(a, b, temperature=temperature)

            found, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(za, zb)
            value = loss(za, zb)
        assert found.dtype == dtype
        tolerance = {"float32": 3e-5, "float64": 1e-10}[dtype]
        assert relative_error(found, expected) < tolerance
        assert relative_error(value, found) < tolerance
        for gradient, want in zip(gradients, wanted, strict=True):
            assert relative_error(gradient, want) < tolerance


def test_it_is_the_papers_formula():
    za, zb = np.random.default_rng(0).normal(size=(2, 5, 3))
    z = np.concatenate([za, zb])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    losses = []
    for i in range(10):
        weights = [np.exp(z[i] @ z[k] / 0.3) for k in range(10) if k != i]
        losses.append(-np.log(np.exp(z[i] @ z[(i + 5) % 10] / 0.3) / sum(weights)))
    loss = simclr_loss(np.float32(za), np.float32(zb), temperature=0.3)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_nothing_of_both_views_times_the_embedding_is_built():
    step = jax.jit(jax.grad(simclr_loss, (0, 1)))
    z = np.zeros((256, 512), np.float32)
    memory = step.lower(z, z).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16e6  # optax's: 1.6 GB


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_collapsed_batch_has_a_finite_gradient(value):
    z = jnp.full((4, 6), value)
    assert jnp.isfinite(jax.grad(simclr_loss)(z, z)).all()


def test_bfloat16_embeddings_give_a_float32_loss():
    z = jnp.asarray(CASES["00"]["za"], jnp.bfloat16)
    loss = simclr_loss(z, z[::-1])
    assert loss.dtype == jnp.float32
    exact = z.astype(jnp.float32)
    np.testing.assert_allclose(loss, simclr_loss(exact, exact[::-1]), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_told(temperature):
    z = CASES["00"]["za"]
    with pytest.raises(ValueError, match="temperature: expected a positive finite number"):
        simclr_loss(z, z, temperature=temperature)


def test_similarities_are_exact_on_every_device():
    z = np.zeros((8, 4), np.float32)
    text = str(jax.make_jaxpr(jax.grad(simclr_loss, (0, 1)))(z, z))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST") > 2
