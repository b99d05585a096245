"""A 1 x 1 convolution normalised by its input's covariance, against the two one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from music_jax.mesh import batch_sharding, make_data_mesh
from music_jax.models.batch_norm import BatchNorm
from music_jax.models.pointwise_norm import convolve_and_normalize


def _modules(num_views, zero_scale=False):
    conv = nnx.Conv(4, 12, (1, 1), use_bias=False, rngs=nnx.Rngs(0))
    norm = BatchNorm(12)
    if not zero_scale:
        norm.scale[...] = jax.random.normal(jax.random.key(1), (12,))
    else:
        norm.scale[...] = jnp.zeros(12)
    norm.bias[...] = jax.random.normal(jax.random.key(2), (12,))
    shape = (5, num_views, 6, 6, 4)
    x = jax.random.normal(jax.random.key(3), shape)
    x = jax.nn.relu(x + jnp.arange(num_views, dtype=jnp.float32).reshape(1, -1, 1, 1, 1))
    return conv, norm, x.reshape(-1, 6, 6, 4)


def _one_after_the_other(x, conv, norm, *, num_views):
    return norm(conv(x), train=True, num_views=num_views)


@pytest.mark.parametrize("num_views", [1, 2, 3])
@pytest.mark.parametrize("zero_scale", [False, True])
def test_output_statistics_and_gradients_are_those_of_the_two(num_views, zero_scale):
    conv, norm, x = _modules(num_views, zero_scale)
    graph, params, stats = nnx.split((conv, norm), nnx.Param, nnx.BatchStat)
    weights = jax.random.normal(jax.random.key(4), (*x.shape[:3], 12))

    def run(function, params, x):
        conv, norm = nnx.merge(graph, params, stats, copy=True)
        y = function(x, conv, norm, num_views=num_views)
        return jnp.sum(weights * jnp.tanh(y)), (y, norm.mean[...], norm.var[...])

    found, expected = (
        jax.jit(jax.value_and_grad(lambda p, x, f=f: run(f, p, x), (0, 1), has_aux=True))(params, x)
        for f in (convolve_and_normalize, _one_after_the_other)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected
    )


def test_a_constant_channel_is_as_finite_as_after_the_plain_normalisation():
    conv, norm, x = _modules(2)
    y = convolve_and_normalize(jnp.ones_like(x), conv, norm, num_views=2)
    np.testing.assert_allclose(y, jnp.broadcast_to(norm.bias[...], y.shape), atol=1e-2)


def test_statistics_are_those_of_the_global_batch():
    conv, norm, x = _modules(2)
    x = jnp.concatenate([x[:8], 3.0 * x[2:]])
    graph, state = nnx.split((conv, norm))

    @jax.jit
    def apply(x):
        conv, norm = nnx.merge(graph, state, copy=True)
        return convolve_and_normalize(x, conv, norm, num_views=2), norm.var[...]

    sharding = batch_sharding(make_data_mesh(4))
    found, expected = apply(jax.device_put(x, sharding)), apply(x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
    assert found[0].sharding.is_equivalent_to(sharding, 4)


def test_bfloat16_gives_what_the_two_give_to_its_precision():
    conv, norm, x = _modules(2)
    conv.dtype = jnp.bfloat16
    x = x.astype(jnp.bfloat16)
    found = convolve_and_normalize(x, conv, norm, num_views=2)
    expected = _one_after_the_other(x, conv, norm, num_views=2)
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.03, atol=0.03
    )
