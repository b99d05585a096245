"""Networks: shapes, sizes compared with torchvision, and the initial state."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from music_jax.config import default_config
from music_jax.models.network import (
    INIT_COMPILER_OPTIONS,
    Projector,
    RunningMean,
    init_network,
    make_frozen_backbone,
    make_network,
)
from music_jax.models.resnet import BasicBlock, Bottleneck, pooling_cells

# Parameters of torchvision's ResNets without the classifier (model.fc).
_TORCHVISION_SIZES = {"resnet18": 11_176_512, "resnet34": 21_284_672, "resnet50": 23_508_032}


def _config(**backbone):
    config = default_config()
    config.objective.num_segments, config.objective.units_per_segment = 4, 6
    config.projector.hidden_sizes = (16,)
    config.backbone.update(backbone)
    return config


def _count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", sorted(_TORCHVISION_SIZES))
def test_resnets_have_as_many_parameters_as_torchvisions(name):
    config = _config(name=name, stem="imagenet")
    params, _ = jax.eval_shape(lambda: init_network(config, jax.random.key(0)))
    assert _count(params["backbone"]) == _TORCHVISION_SIZES[name]


@pytest.mark.parametrize(
    ("name", "stem", "side", "features"),
    [
        ("small_resnet", "strided", 28, 1024),
        ("small_resnet", "cifar", 8, 1024),
        ("pooled_resnet", "strided", 28, 96),
        ("resnet18", "cifar", 32, 512),
        ("resnet50", "imagenet", 64, 2048),
    ],
)
def test_shapes_of_features_and_embeddings(name, stem, side, features):
    config = _config(name=name, stem=stem)
    network = make_network(config)
    assert (network.num_features, network.num_embedding) == (features, 24)
    params, stats = jax.eval_shape(lambda: init_network(config, jax.random.key(0)))
    views = jax.ShapeDtypeStruct((3, 2, side, side, 3), jnp.float32)
    found, embeddings, new_stats = jax.eval_shape(network.embed, params, stats, views)
    assert found.shape == (3, 2, features)
    assert embeddings.shape == (3, 2, 24)
    assert jax.tree.structure(new_stats) == jax.tree.structure(stats)


@pytest.mark.parametrize(
    ("name", "stem", "side", "widths"),
    [
        ("tiny_resnet", "strided", 28, {14: (16,), 7: (24,), 4: (48,)}),
        ("small_resnet", "strided", 28, {14: (24,), 7: (32,), 4: (64,)}),
        ("pooled_resnet", "strided", 28, {14: (16,), 7: (24,), 4: (48,), 2: (96,)}),
        ("resnet18", "imagenet", 64, {32: (64,), 16: (64,), 8: (128,), 4: (256,), 2: (512,)}),
        ("resnet50", "cifar", 32, {
            32: (64, 128, 256), 16: (128, 256, 512), 8: (256, 512, 1024), 4: (512, 2048),
        }),
    ],
)  # fmt: skip
def test_channels_of_the_convolutions_at_each_resolution(name, stem, side, widths):
    config = _config(name=name, stem=stem)
    network = make_network(config)
    params, stats = jax.eval_shape(lambda: init_network(config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    text = str(jax.make_jaxpr(network.infer)(params, stats, images))
    found = {}
    for height, width, channels in re.findall(
        r"f32\[2,(\d+),(\d+),(\d+)\] = conv_general_dilated", text
    ):
        assert height == width
        found.setdefault(int(height), set()).add(int(channels))
    assert found == {resolution: set(channels) for resolution, channels in widths.items()}


def test_centered_embeddings_of_inference_are_those_less_the_running_mean():
    config = _config(name="small_resnet", stem="strided")
    params, stats = init_network(config, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    plain = make_network(config).infer(params, stats, images)
    config.objective.center = True
    _, centered_stats = init_network(config, jax.random.key(0))
    mean = centered_stats["projector"].pop("center")["mean"] + jnp.arange(24.0)
    assert jax.tree.structure(centered_stats) == jax.tree.structure(stats)
    centered_stats["projector"]["center"] = {"mean": mean}
    features, embeddings = make_network(config).infer(params, centered_stats, images)
    np.testing.assert_array_equal(features, plain[0])
    np.testing.assert_allclose(embeddings, plain[1] - mean[None], rtol=1e-6)
    config.objective.name = "vicreg"
    assert "center" not in init_network(config, jax.random.key(0))[1]["projector"]


def test_zero_init_residual_sets_the_last_scale_of_each_block():
    for zero in (True, False):
        config = _config(name="resnet18", stem="cifar", zero_init_residual=zero)
        params, _ = init_network(config, jax.random.key(0))
        for block in params["backbone"]["blocks"].values():
            assert np.all(block["norm2"]["scale"] == (0 if zero else 1))
            assert np.all(block["norm1"]["scale"] == 1)


def test_bfloat16_networks_keep_float32_parameters_and_features():
    config = _config(name="small_resnet", stem="strided")
    config.compute_dtype = "bfloat16"
    network = make_network(config)
    params, stats = init_network(config, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves((params, stats))} == {np.dtype("float32")}
    views = jax.random.normal(jax.random.key(1), (4, 2, 16, 16, 3))
    features, embeddings, stats = network.embed(params, stats, views)
    assert (features.dtype, embeddings.dtype) == (jnp.float32, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(stats)} == {np.dtype("float32")}


def test_embedding_two_views_matches_one_pass_per_view():
    config = _config(name="small_resnet", stem="strided")
    network = make_network(config)
    params, stats = init_network(config, jax.random.key(0))
    views = jax.random.normal(jax.random.key(1), (4, 2, 16, 16, 3))
    _, together, _ = network.embed(params, stats, views)
    for v in range(2):
        _, alone, _ = network.embed(params, stats, views[:, v : v + 1])
        np.testing.assert_allclose(together[:, v], alone[:, 0], rtol=1e-3, atol=1e-4)


def test_the_projector_uses_each_views_statistics_and_a_frozen_backbone_has_the_same_features():
    config = _config(name="tiny_resnet", stem="strided")
    network, frozen = make_network(config), make_frozen_backbone(config)
    init, embed, alone, whole = (
        functools.partial(jax.jit, compiler_options=INIT_COMPILER_OPTIONS)(function)
        for function in (
            functools.partial(init_network, config),
            network.embed,
            frozen.features,
            network.features,
        )
    )
    params, stats = init(jax.random.key(0))
    views = np.random.default_rng(0).normal(size=(5, 2, 16, 16, 3)).astype(np.float32)
    features, embeddings, new_stats = embed(params, stats, views)
    head = jax.tree.map(np.float64, params["projector"])
    x = np.asarray(features, np.float64) @ head["hidden"][0]["kernel"]
    hidden = np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), 0)
    np.testing.assert_allclose(
        embeddings, hidden @ head["output"]["kernel"], rtol=0, atol=1e-4 * np.abs(embeddings).max()
    )
    running = 0.9 * 0.1 * x.mean(0)[0] + 0.1 * x.mean(0)[1]
    found = new_stats["projector"]["norms"][0]["mean"]
    np.testing.assert_allclose(found, running, rtol=0, atol=1e-4 * np.abs(running).max())
    np.testing.assert_allclose(
        alone(params["backbone"], stats["backbone"], views[:, 0]),
        whole(params, stats, views[:, 0]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_inference_features_do_not_depend_on_the_rest_of_the_batch():
    config = _config(name="small_resnet", stem="strided")
    network = make_network(config)
    params, stats = init_network(config, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (5, 16, 16, 3))
    whole = network.features(params, stats, images)
    np.testing.assert_allclose(
        whole[:2], network.features(params, stats, images[:2]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    # The cells of torch.nn.AdaptiveAvgPool2d.
    [
        (7, 1, [(0, 7)]),
        (4, 2, [(0, 2), (2, 4)]),
        (7, 2, [(0, 4), (3, 7)]),
        (7, 3, [(0, 3), (2, 5), (4, 7)]),
        (1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_pooling_cells_match_pytorch(length, count, expected):
    assert pooling_cells(length, count) == expected


@pytest.mark.parametrize(("block", "last"), [(BasicBlock, "norm2"), (Bottleneck, "norm3")])
def test_kernels_are_initialized_by_fan_out_and_only_the_last_scale_is_zero(block, last):
    made = block(48, 32, 2, True, jnp.dtype("float32"), nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(made, nnx.Param))
    for name in [name for name in params if name.startswith("norm")]:
        np.testing.assert_array_equal(params[name]["scale"], 0 if name == last else 1)
    np.testing.assert_array_equal(params["shortcut"]["norm"]["scale"], 1)
    convolutions = [params[name] for name in params if name.startswith("conv")]
    for kernel in (conv["kernel"] for conv in (*convolutions, params["shortcut"]["conv"])):
        # He et al (arXiv 1502.01852) with fan_out, within 4 standard errors.
        size, _, _, c_out = kernel.shape
        deviation = np.sqrt(2 / (size**2 * c_out))
        np.testing.assert_allclose(np.std(kernel), deviation, rtol=4 / np.sqrt(2 * kernel.size))


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
