"""Rematerialisation changes what is kept, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from music_jax.models.resnet import BasicBlock, ResNet
from music_jax.models.vision_transformer import VisionTransformer

_RESNET = functools.partial(
    ResNet, block=BasicBlock, stage_sizes=(4,), widths=(8,), stem="cifar", zero_init_residual=False
)
_VIT = functools.partial(VisionTransformer, width=24, depth=4, num_heads=3, patch_size=4)


def _gradient(make, remat):
    """A compiled function from parameters and images to loss, statistics and gradient."""
    model = make(channels=3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0), remat=remat)
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss_of(params, images):
        model = nnx.merge(graph, params, stats, copy=True)
        features = model(images, train=True, num_views=2)
        return jnp.sum(jnp.sin(features)), nnx.state(model, nnx.BatchStat)

    images = jax.random.normal(jax.random.key(0), (32, 16, 16, 3))
    compiled = (
        jax.jit(jax.value_and_grad(loss_of, has_aux=True)).lower(params, images).compile()
    )
    return compiled, compiled(params, images)


@pytest.mark.parametrize("make", [_RESNET, _VIT], ids=["resnet", "vit"])
def test_the_same_gradient_from_less_memory(make):
    plain, expected = _gradient(make, remat=False)
    remat, found = _gradient(make, remat=True)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    used = [c.memory_analysis().temp_size_in_bytes for c in (remat, plain)]
    print(used)
    assert used[0] < 0.7 * used[1]
