"""ResNets compared with numpy in float64, on images that are not square, and their layers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view

from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.models import BACKBONES, resnet
from music_jax.models.network import INIT_COMPILER_OPTIONS
from music_jax.models.resnet import (
    BasicBlock,
    BatchNorm,
    Bottleneck,
    ResNet,
    max_pool_gradient,
)
from music_jax.models.vision_transformer import VisionTransformer

_RESNET = functools.partial(
    ResNet, block=BasicBlock, stage_sizes=(3,), widths=(8,), stem="cifar", zero_init_residual=False
)
_VIT = functools.partial(VisionTransformer, width=24, depth=3, num_heads=3, patch_size=4)


def _windows(x, size, stride):
    return sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]


def _conv(conv, x, stride=1):
    kernel = conv["kernel"]
    pad = kernel.shape[0] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return np.einsum("bhwcij,ijco->bhwo", _windows(x, kernel.shape[0], stride), kernel)


def _norm(norm, x):
    return norm["scale"] * (x - norm["mean"]) / np.sqrt(norm["var"] + 1e-5) + norm["bias"]


def _relu(x):
    return np.maximum(x, 0)


def _block(block, x, stride):
    """Applies a basic block, or a bottleneck whose 3 x 3 convolution has the stride."""
    strides = (stride, 1) if "conv3" not in block else (1, stride, 1)
    y = x
    for i, s in enumerate(strides, 1):
        y = _norm(block[f"norm{i}"], _conv(block[f"conv{i}"], y, s))
        y = y if i == len(strides) else _relu(y)
    if "shortcut" in block:
        x = _norm(block["shortcut"]["norm"], _conv(block["shortcut"]["conv"], x, stride))
    return _relu(y + x)


def _features(weights, images, stem_stride, pools, strides, grid):
    x = _relu(_norm(weights["norm"], _conv(weights["conv"], images, stem_stride)))
    if pools:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        x = _windows(padded, 3, 2).max((-2, -1))
    for i, stride in enumerate(strides):
        x = _block(weights["blocks"][i], x, stride)
    rows, columns = (
        [(math.floor(i * side / grid), math.ceil((i + 1) * side / grid)) for i in range(grid)]
        for side in x.shape[1:3]
    )
    cells = [x[:, a:b, c:d].mean((1, 2)) for a, b in rows for c, d in columns]
    return x.shape[1:3], np.concatenate(cells, axis=1)


def _merged(a, b):
    if not isinstance(a, dict):
        return a
    return {k: _merged(a[k], b[k]) if k in a and k in b else a.get(k, b.get(k)) for k in {*a, *b}}


@pytest.mark.parametrize(
    ("block", "options", "stem", "strides", "grid", "last_map"),
    [
        (BasicBlock, {"stem": "imagenet"}, (2, True), (1, 1, 2), 1, (3, 4)),
        (BasicBlock, {"stem": "cifar", "first_stride": 2}, (1, False), (2, 1, 2), 2, (5, 7)),
        (Bottleneck, {"stem": "strided"}, (2, False), (1, 1, 2), 2, (5, 7)),
        (Bottleneck, {"stem": "imagenet", "stem_width": 5}, (2, True), (1, 1, 2), 2, (3, 4)),
    ],
)
def test_features_match_numpy(block, options, stem, strides, grid, last_map):
    model = ResNet(
        block=block,
        stage_sizes=(2, 1),
        widths=(4, 6),
        channels=3,
        dtype=jnp.dtype("float32"),
        rngs=nnx.Rngs(0),
        pool_grid=grid,
        **options,
    )
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(0, 1 / np.sqrt(np.prod(x.shape[:-1])), x.shape)
        return rng.uniform(0.5, 2, x.shape) if name == "var" else rng.normal(0.3, 1, x.shape)

    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = (
        jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(x)) for x in (params, stats)
    )
    images = rng.normal(size=(2, 19, 26, 3))

    @functools.partial(jax.jit, compiler_options=INIT_COMPILER_OPTIONS)
    def features(params, stats, images):
        return nnx.merge(graph, params, stats, copy=True)(images, train=False)

    found = features(*jax.tree.map(np.float32, (params, stats, images)))
    shape, expected = _features(_merged(params, stats), images, *stem, strides, grid)
    assert shape == last_map
    assert model.num_features == expected.shape[1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    # Stem, first and second stage; in a stage two 3 x 3 convolutions, a shortcut, their scales and
    # offsets.
    ("name", "parameters", "width"),
    [
        (
            "small_resnet",
            [
                27 * 24 + 2 * 24,
                9 * 24 * 32 + 9 * 32 * 32 + 24 * 32 + 6 * 32,
                9 * 32 * 64 + 9 * 64 * 64 + 32 * 64 + 6 * 64,
            ],
            64,
        ),
        (
            "tiny_resnet",
            [
                27 * 16 + 2 * 16,
                9 * 16 * 24 + 9 * 24 * 24 + 16 * 24 + 6 * 24,
                9 * 24 * 48 + 9 * 48 * 48 + 24 * 48 + 6 * 48,
            ],
            48,
        ),
    ],
)
def test_the_small_resnets_pool_a_grid_of_4_at_a_quarter_of_the_stems_resolution(
    name, parameters, width
):
    model = nnx.eval_shape(
        lambda: BACKBONES[name].make(
            channels=3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0), stem="cifar"
        )
    )
    sizes = [
        sum(x.size for x in jax.tree.leaves(nnx.state(parts, nnx.Param)))
        for parts in (nnx.List([model.conv, model.norm]), *model.blocks)
    ]
    assert sizes == parameters
    assert (model.num_features, model.pool_grid) == (16 * width, 4)
    assert [block.conv1.strides for block in model.blocks] == [2, 2]


def _input(shape=(6, 2, 5, 5, 3)):
    scale = jnp.asarray([1.0, 3.0]).reshape(1, 2, 1, 1, 1)
    return scale * jax.random.normal(jax.random.key(0), shape) + scale


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("size", "stride", "height", "width"),
    [
        (3, 1, 2, 2),
        (3, 2, 4, 4),
        (3, 2, 3, 5),
        (3, 1, 1, 1),
        (3, 2, 1, 2),
        (3, 1, 2, 4),
        pytest.param(7, 2, 9, 8, marks=pytest.mark.slow),
    ],
)
def test_a_convolution_of_a_small_map_is_that_of_xla_with_its_gradients(
    size, stride, height, width, dtype
):
    conv = resnet._conv(5, 7, size, stride, dtype, nnx.Rngs(0))
    structure, params = nnx.split(conv)
    x = jax.random.normal(jax.random.key(1), (4, height, width, 5))

    def loss(apply, params, x):
        y = apply(nnx.merge(structure, params), x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    (_, expected), theirs = jax.value_and_grad(
        functools.partial(loss, lambda conv, x: conv(x)), argnums=(0, 1), has_aux=True
    )(params, x)
    (_, found), ours = jax.value_and_grad(
        functools.partial(loss, resnet._convolve), argnums=(0, 1), has_aux=True
    )(params, x)
    assert found.dtype == expected.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.1, "atol": 0.1}
    for a, b in zip(
        jax.tree.leaves((found, ours)), jax.tree.leaves((expected, theirs)), strict=True
    ):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), **tolerance)


def test_no_convolution_of_a_small_map_has_a_kernel_larger_than_the_map():
    """XLA exchanges them, and on CPUs such programs are slow."""
    conv = resnet._conv(5, 7, 3, 2, jnp.float32, nnx.Rngs(0))
    structure, params = nnx.split(conv)

    def loss(params, x):
        return jnp.sum(jnp.square(resnet._convolve(nnx.merge(structure, params), x)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    assert "convolution" not in gradient.lower(params, jnp.ones((4, 4, 4, 5))).as_text()
    assert "convolution" in gradient.lower(params, jnp.ones((4, 6, 6, 5))).as_text()


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 9), (8, 12)])
def test_the_gradient_of_max_pooling_goes_to_the_first_maximum_as_xla_scatters_it(size, dtype):
    """Values of few kinds, most of which occur several times in a window; exact sums."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 2, (3, *size, 2)), dtype)
    pooled, scatter = jax.vjp(
        lambda x: nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))), x
    )
    cotangent = jnp.asarray(rng.integers(-9, 9, pooled.shape), dtype)
    gradient = jax.jit(max_pool_gradient)(x, pooled, cotangent)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, scatter(cotangent)[0])


def test_the_gradient_of_max_pooling_keeps_float64_and_the_axes_of_vmap():
    with jax.enable_x64(True):
        x, cotangent = (
            jax.random.normal(jax.random.key(i), shape, jnp.float64)
            for i, shape in enumerate([(2, 3, 7, 6, 4), (2, 3, 4, 3, 4)])
        )

        def scatter(x, cotangent):
            return jax.vjp(resnet._pool, x)[1](cotangent)[0]

        found = jax.vmap(max_pool_gradient)(x, jax.vmap(resnet._pool)(x), cotangent)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, jax.vmap(scatter)(x, cotangent), rtol=1e-14)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_the_gradient_of_max_pooling_scatters_nothing_on_gpus(platform):
    """There the sums of a scatter depend on the order in which the threads run."""
    step = jax.jit(jax.grad(lambda x: resnet._max_pool(x).sum()))
    x = jax.ShapeDtypeStruct((2, 9, 8, 3), jnp.float32)
    program = step.trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert ("scatter" in program) == (platform in ("cpu", "tpu"))
