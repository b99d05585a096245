"""ResNets compared with numpy in float64, on images that are not square."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view

from music_jax.models import BACKBONES
from music_jax.models.network import INIT_COMPILER_OPTIONS
from music_jax.models.resnet import BasicBlock, Bottleneck, ResNet


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
