"""Barlow Twins, VICReg and SimCLR against references, and what holds for all three."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from music_jax.objectives import barlow_twins_loss, simclr_loss, vicreg_loss
from tests.objectives.cases import cases, relative_error

CASES = cases("baseline_objectives")
LOSSES = [barlow_twins_loss, vicreg_loss, simclr_loss]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", CASES)
@pytest.mark.parametrize(("loss", "name"), [(barlow_twins_loss, "barlow"), (vicreg_loss, "vicreg")])
def test_value_and_gradients_match_the_reference(loss, name, number, dtype):
    case = CASES[number]
    with jax.enable_x64(dtype == "float64"):
        za, zb = (jnp.asarray(case[view], dtype) for view in ("za", "zb"))
        found, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(za, zb)
        value = loss(za, zb)
    assert found.dtype == dtype
    tolerance = {"float32": 2e-5, "float64": 1e-10}[dtype]
    assert relative_error(found, case[f"{name}_loss"]) < tolerance
    assert relative_error(value, found) < tolerance
    for view, gradient in zip("ab", gradients, strict=True):
        assert relative_error(gradient, case[f"{name}_grad_{view}"]) < tolerance


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_embeddings_give_a_float32_loss(loss):
    z = jnp.asarray(CASES["00"]["za"], jnp.bfloat16)
    found = loss(z, z[::-1])
    assert found.dtype == jnp.float32
    exact = z.astype(jnp.float32)
    np.testing.assert_allclose(found, loss(exact, exact[::-1]), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_collapsed_batch_has_a_finite_gradient(loss, value):
    z = jnp.full((4, 6), value)
    assert jnp.isfinite(jax.grad(loss)(z, z)).all()


@pytest.mark.parametrize("loss", [barlow_twins_loss, vicreg_loss])
def test_a_batch_smaller_than_the_embedding_builds_no_square_of_the_embedding(loss):
    step = jax.jit(jax.grad(loss))
    small, large = (np.zeros((batch, 64), np.float32) for batch in (8, 128))
    assert "64x64" not in step.lower(small, small).as_text()
    assert "64x64" in step.lower(large, large).as_text()


def barlow_twins_by_definition(za, zb, weight):
    za, zb = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (za, zb))
    correlation = za.T @ zb / len(za)
    diagonal = np.diag(correlation)
    off_diagonal = (correlation**2).sum() - (diagonal**2).sum()
    return ((1 - diagonal) ** 2).sum() + weight * off_diagonal


@pytest.mark.parametrize(("batch", "dim"), [(6, 40), (40, 6), (8, 8)])
def test_barlow_twins_matches_its_definition_for_any_ratio_of_batch_to_dim(batch, dim):
    za, zb = np.random.default_rng(0).normal(size=(2, batch, dim))
    loss = barlow_twins_loss(np.float32(za), np.float32(zb), off_diagonal_weight=0.1)
    np.testing.assert_allclose(loss, barlow_twins_by_definition(za, zb, 0.1), rtol=1e-5)


def vicreg_by_definition(za, zb, similarity, variance, covariance):
    loss = similarity * ((za - zb) ** 2).mean()
    for z in (za, zb):
        covariances = np.cov(z.T)
        diagonal = np.diag(covariances)
        loss += variance * np.maximum(0, 1 - np.sqrt(diagonal + 1e-4)).mean() / 2
        loss += covariance * ((covariances**2).sum() - (diagonal**2).sum()) / z.shape[1]
    return loss


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize(("batch", "dim"), [(6, 40), (40, 6), (8, 8)])
def test_each_vicreg_term_matches_its_definition_for_any_ratio_of_batch_to_dim(batch, dim, weights):
    za, zb = 0.7 * np.random.default_rng(0).normal(size=(2, batch, dim))
    names = ("similarity_weight", "variance_weight", "covariance_weight")
    loss = vicreg_loss(np.float32(za), np.float32(zb), **dict(zip(names, weights, strict=True)))
    np.testing.assert_allclose(loss, vicreg_by_definition(za, zb, *weights), rtol=1e-5)


def by_optax(za, zb, temperature):
    labels = jnp.tile(jnp.arange(len(za)), 2)
    return optax.losses.ntxent(jnp.concatenate([za, zb]), labels, temperature=temperature)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_simclr_and_its_gradients_match_optax(temperature, dtype):
    for case in CASES.values():
        with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
            za, zb = (jnp.asarray(case[name], dtype) for name in ("za", "zb"))
            expected, wanted = jax.jit(jax.value_and_grad(by_optax, (0, 1)))(za, zb, temperature)

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


def test_simclr_matches_the_formula_of_the_paper():
    za, zb = np.random.default_rng(0).normal(size=(2, 5, 3))
    z = np.concatenate([za, zb])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    losses = []
    for i in range(10):
        weights = [np.exp(z[i] @ z[k] / 0.3) for k in range(10) if k != i]
        losses.append(-np.log(np.exp(z[i] @ z[(i + 5) % 10] / 0.3) / sum(weights)))
    loss = simclr_loss(np.float32(za), np.float32(zb), temperature=0.3)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_simclr_builds_no_product_of_both_views_and_the_embedding():
    step = jax.jit(jax.grad(simclr_loss, (0, 1)))
    z = np.zeros((256, 512), np.float32)
    memory = step.lower(z, z).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16e6  # optax's: 1.6 GB


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_simclr_rejects_an_invalid_temperature(temperature):
    z = CASES["00"]["za"]
    with pytest.raises(ValueError, match="temperature: expected a positive finite number"):
        simclr_loss(z, z, temperature=temperature)


def test_simclr_similarities_use_the_highest_precision():
    z = np.zeros((8, 4), np.float32)
    text = str(jax.make_jaxpr(jax.grad(simclr_loss, (0, 1)))(z, z))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST") > 2
