"""Batch normalization of several views in one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.models.batch_norm import BatchNorm


def _input(shape=(6, 2, 5, 5, 3)):
    scale = jnp.asarray([1.0, 3.0]).reshape(1, 2, 1, 1, 1)
    return scale * jax.random.normal(jax.random.key(0), shape) + scale


def test_each_view_is_normalized_by_its_own_statistics_as_flax_does_in_two_passes():
    x = _input()
    ours = BatchNorm(3)
    theirs = nnx.BatchNorm(3, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))
    y = ours(x.reshape(12, 5, 5, 3), train=True, num_views=2).reshape(x.shape)
    for view in range(2):
        expected = theirs(x[:, view], use_running_average=False)
        np.testing.assert_allclose(y[:, view], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.mean[...], theirs.mean[...], rtol=1e-5)
    np.testing.assert_allclose(ours.var[...], theirs.var[...], rtol=1e-5)


def test_a_constant_channel_has_no_negative_variance():
    norm = BatchNorm(2)
    norm.bias[...] = jnp.asarray([0.25, -0.5])
    x = jnp.broadcast_to(jnp.asarray([1234.567, -4321.123]), (37, 2))
    y = norm(x, train=True, num_views=1)
    assert jnp.isfinite(y).all()
    assert (norm.var[...] >= 0.9).all()  # 0.9 of 1, plus a tenth of the batch's


def test_inference_uses_the_running_statistics():
    norm = BatchNorm(3)
    x = _input().reshape(12, 5, 5, 3)
    for _ in range(200):
        norm(x, train=True, num_views=1)
    y = norm(x, train=False, num_views=1)
    np.testing.assert_allclose(jnp.mean(y, (0, 1, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(jnp.var(y, (0, 1, 2)), 1.0, atol=1e-3)


def test_statistics_are_float32_whatever_the_input():
    norm = BatchNorm(3)
    y = norm(_input().reshape(12, 5, 5, 3).astype(jnp.bfloat16), train=True, num_views=2)
    assert y.dtype == jnp.bfloat16
    assert norm.mean[...].dtype == norm.var[...].dtype == jnp.float32


@pytest.mark.parametrize("devices", [2, 4])
def test_statistics_are_those_of_the_global_batch(devices):
    x = _input((8, 2, 5, 5, 3)).reshape(16, 5, 5, 3)
    graph, params, stats = nnx.split(BatchNorm(3), nnx.Param, nnx.BatchStat)

    @jax.jit
    def apply(x):
        norm = nnx.merge(graph, params, stats, copy=True)
        return norm(x, train=True, num_views=2)

    mesh = make_data_mesh(devices)
    sharded = apply(jax.device_put(x, batch_sharding(mesh)))
    np.testing.assert_allclose(sharded, apply(x), rtol=1e-5, atol=1e-6)
    assert sharded.sharding.is_equivalent_to(batch_sharding(mesh), sharded.ndim)


@pytest.mark.parametrize("train", [True, False])
def test_pooling_with_it_is_pooling_after_it(train):
    def pool(x):
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    def step(scale, x, together):
        norm = BatchNorm(4)
        norm.scale[...], norm.bias[...] = scale, jnp.asarray([0.1, -0.2, 0.3, 0.0])
        if together:
            y = norm(x, train=train, num_views=2, max_pool=pool)
        else:
            y = pool(norm(x, train=train, num_views=2))
        return jnp.sum(jnp.sin(y)), (y, norm.mean[...], norm.var[...])

    scale = jnp.asarray([1.5, -0.7, 0.3, -2.0])  # normalizing falls where it is negative
    x = _input((6, 2, 8, 8, 4)).reshape(12, 8, 8, 4)
    gradient = jax.value_and_grad(step, (0, 1), has_aux=True)
    expected, found = (gradient(scale, x, together) for together in (False, True))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
