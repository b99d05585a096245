import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_jax.objectives import joint_probability, segment_codes, segment_probabilities
from music_jax.objectives.probabilities import MIN_PROBABILITY, clamp
from tests.objectives.cases import cases, relative_error


def embeddings(batch=6, dim=12, seed=0, scale=3.0):
    return scale * np.random.default_rng(seed).normal(size=(batch, dim)).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2])
def test_segment_probabilities_are_numpys_softmax(temperature):
    z = embeddings()
    p = jax.jit(segment_probabilities, static_argnames="num_segments")(
        z, num_segments=3, temperature=temperature
    )
    exponentials = np.exp(z.astype(np.float64).reshape(6, 3, 4) / temperature)
    np.testing.assert_allclose(p, exponentials / exponentials.sum(-1, keepdims=True), rtol=2e-6)
    np.testing.assert_allclose(jnp.sum(p, axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_narrow_embeddings_give_float32_probabilities(dtype):
    z = jnp.asarray(embeddings(), dtype)
    p = segment_probabilities(z, num_segments=3)
    assert p.dtype == jnp.float32
    assert jnp.array_equal(p, segment_probabilities(z.astype(jnp.float32), num_segments=3))


def test_the_temperature_has_a_gradient():
    def first(temperature):
        return segment_probabilities(embeddings(), num_segments=3, temperature=temperature)[0, 0, 0]

    slope = jax.grad(first)(jnp.float32(1.5))
    assert abs(slope - (first(1.51) - first(1.49)) / 0.02) < 1e-3
    assert abs(slope) > 1e-2


def test_codes_are_the_most_probable_units():
    z = embeddings()
    codes = jax.jit(segment_codes, static_argnames="num_segments")(z, num_segments=3)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, z.reshape(6, 3, 4).argmax(-1))


def test_clamp_passes_the_gradient_from_the_least_probability_upwards():
    p = jnp.array([0.5, MIN_PROBABILITY, 1e-9], jnp.float32)
    np.testing.assert_array_equal(clamp(p), np.float32([0.5, 1e-8, 1e-8]))
    np.testing.assert_array_equal(jax.grad(lambda p: jnp.sum(clamp(p)))(p), [1, 1, 0])


def test_joint_probability_is_clamped_and_swaps_with_the_views():
    case = cases("music_objective")["05"]  # saturated
    za, zb = case["za"], case["zb"]
    joint = joint_probability(za, zb, num_segments=4)
    assert jnp.min(joint) > 0.99e-16
    pa, pb = (
        np.maximum(np.asarray(segment_probabilities(z, num_segments=4), np.float64), 1e-8)
        for z in (za, zb)
    )
    expected = np.einsum("ni,nj->ij", pa.reshape(16, 32), pb.reshape(16, 32)) / 16
    assert relative_error(joint, expected) < 1e-6
    np.testing.assert_allclose(joint_probability(zb, za, num_segments=4), joint.T, rtol=1e-5)


def test_joint_probability_of_soft_codes_sums_to_one_in_each_pair_of_segments():
    joint = joint_probability(embeddings(), embeddings(seed=1), num_segments=3)
    np.testing.assert_allclose(joint.reshape(3, 4, 3, 4).sum((1, 3)), 1, rtol=1e-5)
