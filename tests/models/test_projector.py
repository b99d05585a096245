"""The projection head against plain numpy, and its initial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from music_jax.models.projector import Projector


@pytest.mark.parametrize("hidden_sizes", [(), (7, 4)])
def test_embeddings_are_those_of_plain_numpy(hidden_sizes):
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


def test_kernels_are_drawn_as_pytorch_draws_a_linear_layers():
    """Uniform between -1 / sqrt(inputs) and 1 / sqrt(inputs)."""
    head = Projector(300, (200,), 250, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    for linear, inputs in ((head.hidden[0], 300), (head.output, 200)):
        kernel = np.asarray(linear.kernel[...])
        bound = 1 / np.sqrt(inputs)
        assert 0.999 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.01)
    np.testing.assert_array_equal(head.hidden[0].bias[...], 0)
