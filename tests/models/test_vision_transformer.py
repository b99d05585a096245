"""Vision transformers compared with timm.

`reference/vision_transformer.npz` is timm 1.0.31's `VisionTransformer(img_size=32, patch_size=8,
embed_dim=24, depth=2, num_heads=3, num_classes=0, global_pool="token")` in float64 (PyTorch 2.13),
with random parameters and MoCo v3's position embedding in place of its own: the features of random
images, and gradients of the features' product with `cotangent`.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from music_jax.config import default_config
from music_jax.models import BACKBONES, network, vision_transformer
from music_jax.models.network import init_network
from music_jax.models.vision_transformer import VisionTransformer, sincos_positions

_REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "vision_transformer.npz"
_PATCH = 8

# Parameters of timm's vit_small_patch16_224 and vit_base_patch16_224 without head, and of their
# position embedding, [197, width], in whose place there are none here.
_TIMM_SIZES = {"vit_s16": (21_665_664, 75_648), "vit_b16": (85_798_656, 151_296)}


@pytest.fixture(scope="module")
def reference():
    with np.load(_REFERENCE) as file:
        return dict(file)


def _tiny(dtype=jnp.float32, remat=False):
    return VisionTransformer(
        width=24,
        depth=2,
        num_heads=3,
        patch_size=_PATCH,
        channels=3,
        dtype=jnp.dtype(dtype),
        rngs=nnx.Rngs(0),
        remat=remat,
    )


def _from_timm(tensors, prefix):
    """Converts arrays from the names and axes of timm to those of this package."""
    ours = {}
    for name, array in tensors.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        if name == "cls_token":
            array = array.reshape(-1)
        elif (
            name == "patch_embed.proj.weight"
        ):  # [width, channels, y, x] to [(y, x, channels), width]
            array = array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
        elif array.ndim == 2:
            array = array.T
        for theirs, here in (
            ("cls_token", "class_token"),
            ("patch_embed.proj", "patches"),
            ("attn.proj", "attention.output"),
            ("attn.qkv", "attention.qkv"),
            ("mlp.fc1", "mlp_in"),
            ("mlp.fc2", "mlp_out"),
            ("norm.weight", "norm.scale"),
            ("norm1.weight", "norm1.scale"),
            ("norm2.weight", "norm2.scale"),
            ("weight", "kernel"),
        ):
            name = name.replace(theirs, here)
        ours[tuple(int(part) if part.isdigit() else part for part in name.split("."))] = array
    return ours


def _with_weights(model, reference):
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    weights = _from_timm(reference, "param/")
    assert {path for path, _ in flat} == weights.keys()
    params = nnx.from_flat_state(
        [(path, v.replace(jnp.asarray(weights[path]))) for path, v in flat]
    )

    @jax.jit
    def features(params, images):
        return nnx.merge(graph, params)(images, train=True)

    return features, params


def _images(reference):
    return reference["images"].transpose(0, 2, 3, 1)  # [batch, height, width, channels]


def test_positions_match_moco_v3(reference):
    np.testing.assert_allclose(sincos_positions(4, 4, 24), reference["positions"], atol=1e-6)


def test_positions_of_a_grid_that_is_not_square():
    rows, columns = np.repeat([0, 1], 3), np.tile([0, 1, 2], 2)  # row by row
    expected = [
        wave(place * frequency)
        for place in (rows, columns)
        for wave in (np.sin, np.cos)
        for frequency in (1.0, 0.01)
    ]
    np.testing.assert_allclose(sincos_positions(2, 3, 8), np.transpose(expected), atol=1e-7)


def test_a_smaller_image_gets_the_positions_of_the_same_regions():
    """A 2 x 2 grid over one of 5 x 5, whose patches are 2.5 of the others' wide."""
    centers = np.array([0.75, 3.25])  # 1.25 and 3.75 patches from the border
    rows, columns = np.repeat(centers, 2), np.tile(centers, 2)
    expected = [
        wave(place * frequency)
        for place in (rows, columns)
        for wave in (np.sin, np.cos)
        for frequency in (1.0, 0.01)
    ]
    found = sincos_positions(2, 2, 8, grid=5)
    np.testing.assert_allclose(found, np.transpose(expected), atol=1e-7)
    np.testing.assert_array_equal(sincos_positions(5, 5, 8, grid=5), sincos_positions(5, 5, 8))


def test_local_views_have_positions_in_the_grid_of_the_crops(monkeypatch):
    config = default_config()
    config.backbone.name = "vit_s16"
    backbone = nnx.eval_shape(lambda: network._make_backbone(config, nnx.Rngs(0)))
    asked = []

    def positions(*sizes, grid):
        asked.append((*sizes, grid))
        return sincos_positions(*sizes, grid=grid)

    monkeypatch.setattr(vision_transformer, "sincos_positions", positions)
    for size in (224, 96):
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        nnx.eval_shape(lambda backbone, x: backbone(x, train=True), backbone, images)
    assert asked == [(14, 14, 384, 14), (6, 6, 384, 14)]


def test_weights_are_initialized_as_in_moco_v3():
    """Xavier's uniform distribution for separate queries, keys and values; a token of 1e-6."""
    model = VisionTransformer(
        width=160, depth=1, num_heads=4, channels=3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)
    )
    block = model.blocks[0]
    for linear, inputs, outputs in (
        (model.patches, 16 * 16 * 3, 160),
        (block.attention.qkv, 160, 160),
        (block.attention.output, 160, 160),
        (block.mlp_in, 160, 640),
        (block.mlp_out, 640, 160),
    ):
        kernel, bound = np.asarray(linear.kernel[...]), np.sqrt(6 / (inputs + outputs))
        assert 0.999 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.015)
        np.testing.assert_array_equal(linear.bias[...], 0)
    # Within 4 standard errors.
    np.testing.assert_allclose(np.std(model.class_token[...]), 1e-6, rtol=4 / np.sqrt(2 * 160))
    np.testing.assert_allclose(np.mean(model.class_token[...]), 0, atol=4e-6 / np.sqrt(160))


@pytest.mark.parametrize("remat", [False, True])
def test_features_and_gradients_match_timm(reference, remat):
    features, params = _with_weights(_tiny(remat=remat), reference)
    images = _images(reference)
    np.testing.assert_allclose(features(params, images), reference["features"], atol=1e-5)

    grads = jax.grad(lambda p: jnp.sum(features(p, images) * reference["cotangent"]))(params)
    found = {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(grads)}
    expected = _from_timm(reference, "grad/")
    assert len(expected) == 5
    for path, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[path] / scale, gradient / scale, atol=1e-5)


def test_bfloat16_is_accurate_and_gives_float32_features(reference):
    features, params = _with_weights(_tiny(jnp.bfloat16), reference)
    found = features(params, _images(reference))
    assert found.dtype == jnp.float32
    error = np.linalg.norm(found - reference["features"]) / np.linalg.norm(reference["features"])
    assert 1e-5 < error < 2e-2  # the products are in bfloat16


@pytest.mark.parametrize("name", sorted(_TIMM_SIZES))
def test_models_have_as_many_parameters_as_timms(name):
    config = default_config()
    config.backbone.name = name
    params, _ = jax.eval_shape(lambda: init_network(config, jax.random.key(0)))
    with_positions, positions = _TIMM_SIZES[name]
    count = sum(x.size for x in jax.tree.leaves(params["backbone"]))
    assert count == with_positions - positions


@pytest.mark.parametrize(("name", "heads"), [("vit_s16", 6), ("vit_b16", 12)])
def test_models_have_the_heads_of_timm_and_patches_of_16(name, heads):
    spec = BACKBONES[name]
    model = nnx.eval_shape(
        lambda: spec.make(channels=3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    )
    assert {block.attention.num_heads for block in model.blocks} == {heads}
    assert spec.image_multiple == model.patch_size == 16


def test_images_of_other_sizes_use_the_same_weights():
    model = _tiny()
    found = jax.eval_shape(
        lambda images: model(images, train=False), jax.ShapeDtypeStruct((2, 48, 16, 3), jnp.float32)
    )
    assert found.shape == (2, 24)
