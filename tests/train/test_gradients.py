"""Gradients of a batch in microbatches against plain JAX's, which keeps everything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from music_jax.models.network import Projector
from music_jax.objectives import vicreg_loss
from music_jax.train.gradients import accumulated_gradients, batch_gradients

_BATCH, _STEPS = 12, 3


def _problem(hidden_sizes):
    """A network with batch normalization in its hidden layers, its parameters and a batch."""
    head = Projector(5, hidden_sizes, 6, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(head, nnx.Param, nnx.BatchStat)

    def embed(params, stats, images, sample_index):
        # What is done to a sample depends on its index alone, as augmentation does.
        images = images * jnp.cos(sample_index.astype(jnp.float32))[:, None, None]
        head = nnx.merge(graph, params, stats, copy=True)
        embeddings = head(images.reshape(-1, 5), train=True, num_views=2)
        return embeddings.reshape(-1, 2, 6), nnx.state(head, nnx.BatchStat)

    images = jax.random.normal(jax.random.key(1), (_BATCH, 2, 5))
    return embed, params, stats, images, jnp.arange(_BATCH, dtype=jnp.uint32) + 7


def _objective(a, b):
    loss = vicreg_loss(a, b)
    return loss, {"twice": 2 * loss}


def _check(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _accumulated(embed, *batch):
    function = functools.partial(accumulated_gradients, embed, _objective, steps=_STEPS)
    return jax.jit(function)(*batch)


def test_without_normalization_the_gradient_is_that_of_the_batch():
    embed, *batch = _problem(hidden_sizes=())
    found = _accumulated(embed, *batch)
    _check(found, batch_gradients(embed, _objective, *batch))


@pytest.mark.parametrize("hidden_sizes", [(), (8,)])
def test_the_gradient_is_that_of_the_batch_loss_with_microbatches_normalized_separately(
    hidden_sizes,
):
    embed, params, stats, images, index = _problem(hidden_sizes)

    def loss_of(params):
        new_stats, embeddings = stats, jnp.zeros((_BATCH, 2, 6))
        for m in range(_STEPS):
            rows = slice(m, None, _STEPS)
            part, new_stats = embed(params, new_stats, images[rows], index[rows])
            embeddings = embeddings.at[rows].set(part)
        return vicreg_loss(embeddings[:, 0], embeddings[:, 1]), new_stats

    (loss, new_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    found = _accumulated(embed, params, stats, images, index)
    _check(
        (found.loss, found.metrics["twice"], found.grads, found.batch_stats),
        (loss, 2 * loss, grads, new_stats),
    )


def test_activations_of_one_microbatch_are_held_at_a_time():
    width = 512

    def embed(params, stats, images, index):
        x = images @ params[0]
        for _ in range(4):
            x = jnp.sin(x @ params[1])
        return x[..., :8], stats

    params = (jnp.zeros((5, width)), jnp.zeros((width, width)))
    batch = (params, {}, jnp.zeros((1024, 2, 5)), jnp.zeros(1024, jnp.uint32))
    memory = {}
    for steps in (1, 8):
        function = functools.partial(accumulated_gradients, embed, _objective, steps=steps)
        memory[steps] = jax.jit(function).lower(*batch).compile().memory_analysis()
    assert memory[8].temp_size_in_bytes < 0.4 * memory[1].temp_size_in_bytes
