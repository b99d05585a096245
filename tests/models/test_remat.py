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
    ResNet, block=BasicBlock, stage_sizes=(3,), widths=(8,), stem="cifar", zero_init_residual=False
)
_VIT = functools.partial(VisionTransformer, width=24, depth=3, num_heads=3, patch_size=4)


def _loss(make, remat):
    """A loss, with the new running statistics, and the parameters that it is a function of."""
    model = make(channels=3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0), remat=remat)
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))

    def loss_of(params):
        model = nnx.merge(graph, params, stats, copy=True)
        features = model(images, train=True, num_views=2)
        return jnp.sum(jnp.sin(features)), nnx.state(model, nnx.BatchStat)

    return loss_of, params


def _bytes_kept(loss_of, params):
    """What is kept for the gradient, by JAX's own account."""
    pullback = jax.eval_shape(lambda params: jax.vjp(loss_of, params, has_aux=True)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))


@pytest.mark.parametrize("make", [_RESNET, _VIT], ids=["resnet", "vit"])
def test_the_same_gradient_with_less_kept(make):
    found, expected = (
        jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
        for loss_of, params in (_loss(make, remat) for remat in (True, False))
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    assert _bytes_kept(*_loss(make, True)) < 0.5 * _bytes_kept(*_loss(make, False))
