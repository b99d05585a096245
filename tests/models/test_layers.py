"""Batch normalization of several views, the projection head, and rematerialization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.models.layers import BatchNorm, Projector, RunningMean
from music_jax.models.resnet import BasicBlock, ResNet
from music_jax.models.vision_transformer import VisionTransformer

_RESNET = functools.partial(
    ResNet, block=BasicBlock, stage_sizes=(3,), widths=(8,), stem="cifar", zero_init_residual=False
)
_VIT = functools.partial(VisionTransformer, width=24, depth=3, num_heads=3, patch_size=4)


def _input(shape=(6, 2, 5, 5, 3)):
    scale = jnp.asarray([1.0, 3.0]).reshape(1, 2, 1, 1, 1)
    return scale * jax.random.normal(jax.random.key(0), shape) + scale


def test_batch_norm_of_two_views_matches_two_passes_of_flax():
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
    assert (norm.var[...] >= 0.9).all()  # 0.9 * 1 + 0.1 * the batch's


def test_inference_uses_the_running_statistics():
    norm = BatchNorm(3)
    x = _input().reshape(12, 5, 5, 3)
    for _ in range(200):
        norm(x, train=True, num_views=1)
    y = norm(x, train=False, num_views=1)
    np.testing.assert_allclose(jnp.mean(y, (0, 1, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(jnp.var(y, (0, 1, 2)), 1.0, atol=1e-3)


def test_statistics_of_bfloat16_inputs_are_float32():
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
def test_fused_pooling_matches_pooling_the_result(train):
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

    scale = jnp.asarray([1.5, -0.7, 0.3, -2.0])  # a negative scale makes it a decreasing function
    x = _input((6, 2, 8, 8, 4)).reshape(12, 8, 8, 4)
    gradient = jax.value_and_grad(step, (0, 1), has_aux=True)
    expected, found = (gradient(scale, x, together) for together in (False, True))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden_sizes", [(), (7, 4)])
def test_projector_matches_numpy(hidden_sizes):
    head = Projector(5, hidden_sizes, 3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(head, nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(0)
    params, stats = (
        jax.tree.map(lambda x: rng.uniform(0.2, 1.5, x.shape) - 0.3, nnx.to_pure_dict(tree))
        for tree in (params, stats)
    )
    for norm in stats.get("norms", {}).values():
        norm["var"] += 0.5
    x = features = rng.normal(size=(6, 5))
    for i in range(len(hidden_sizes)):
        linear, norm, running = params["hidden"][i], params["norms"][i], stats["norms"][i]
        x = x @ linear["kernel"] + linear["bias"]
        x = (x - running["mean"]) / np.sqrt(running["var"] + 1e-5)
        x = np.maximum(norm["scale"] * x + norm["bias"], 0)
    assert set(params["output"]) == {"kernel"}  # no bias

    @jax.jit
    def embed(params, stats, features):
        return nnx.merge(graph, params, stats, copy=True)(features, train=False)

    found = embed(*jax.tree.map(np.float32, (params, stats, features)))
    np.testing.assert_allclose(found, x @ params["output"]["kernel"], rtol=1e-4, atol=1e-5)


def test_a_running_mean_is_tracked_in_training_and_subtracted_in_inference():
    center = RunningMean(3, momentum=0.8)
    views = np.random.default_rng(0).normal(2.0, size=(5, 2, 3)).astype(np.float32)
    z = jnp.asarray(views.reshape(10, 3), jnp.bfloat16)
    expected = np.zeros(3)
    for _ in range(2):
        np.testing.assert_array_equal(center(z, train=True, num_views=2), z)
        for mean in np.asarray(z, np.float32).reshape(5, 2, 3).mean(axis=0):
            expected = 0.8 * expected + 0.2 * mean
    np.testing.assert_allclose(center.mean[...], expected, rtol=1e-5)
    found = center(z, train=False, num_views=1)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found, np.asarray(z, np.float32) - expected, rtol=1e-2, atol=1e-2)


def test_projector_kernels_are_initialized_as_in_pytorch():
    """Uniform between -1 / sqrt(inputs) and 1 / sqrt(inputs)."""
    head = Projector(300, (200,), 250, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    for linear, inputs in ((head.hidden[0], 300), (head.output, 200)):
        kernel = np.asarray(linear.kernel[...])
        bound = 1 / np.sqrt(inputs)
        assert 0.999 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.01)
    np.testing.assert_array_equal(head.hidden[0].bias[...], 0)


def _loss(make, remat):
    """Returns a loss that also gives the new running statistics, and its parameters."""
    model = make(channels=3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0), remat=remat)
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))

    def loss_of(params):
        model = nnx.merge(graph, params, stats, copy=True)
        features = model(images, train=True, num_views=2)
        return jnp.sum(jnp.sin(features)), nnx.state(model, nnx.BatchStat)

    return loss_of, params


def _bytes_kept(loss_of, params):
    """Returns the size of the residuals of the gradient."""
    pullback = jax.eval_shape(lambda params: jax.vjp(loss_of, params, has_aux=True)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))


@pytest.mark.parametrize("make", [_RESNET, _VIT], ids=["resnet", "vit"])
def test_remat_gives_the_same_gradient_with_smaller_residuals(make):
    found, expected = (
        jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
        for loss_of, params in (_loss(make, remat) for remat in (True, False))
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    assert _bytes_kept(*_loss(make, True)) < 0.5 * _bytes_kept(*_loss(make, False))
