"""SimCLR's contrastive objective, as a baseline."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from music_jax.objectives.checks import check_batch, check_pair, check_temperature
from music_jax.objectives.global_batch import (
    AxisName,
    accumulation_dtype,
    axis_size,
    global_sum,
    over_global_batch,
)

# Under the square root, so that an embedding of zeros has a finite gradient.
EPSILON = 1e-12


def simclr_loss(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    temperature: float | jax.Array = 0.1,
    axis_name: AxisName | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> jax.Array:
    r"""The contrastive objective (NT-Xent) of two views' embeddings.

    .. math::

      -\frac{1}{2N} \sum_{i=1}^{2N} \log
      \frac{\exp(s_{i p(i)} / \tau)}{\sum_{j \ne i} \exp(s_{ij} / \tau)}

    where s is the cosine similarity among the 2N embeddings of both views and p(i) is the other
    view of i's sample. The negatives are those of the global batch.

    It is `optax.losses.ntxent` with each sample its own label, but by matrix products: optax
    multiplies [2N, 2N, D] element by element, which takes 1.6 GB where N is 256 and D is 512. On
    several devices each gathers the others' embeddings and compares its own samples with them. The
    three ways of calling there are those of :func:`music_loss`.

    Args:
      embeddings_a: [batch, dim] floating array, the first view.
      embeddings_b: [batch, dim] array of the same dtype, the second view of the same samples.
      temperature: of the softmax over the similarities.
      axis_name: axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.
      mesh: mesh of the batch, under `jit`.

    Returns:
      A scalar, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: if the views differ in shape or dtype, are not [batch, dim] or not floating, if
        the temperature is known not to be a positive finite number, or if the global batch is a
        single sample.

    Example:
      >>> import jax.numpy as jnp
      >>> from music_jax.objectives import simclr_loss
      >>> z = jnp.array([[1.0, 0], [0, 1]])
      >>> print(f"{simclr_loss(z, z):.4f} {simclr_loss(z, z, temperature=1.0):.4f}")
      0.0001 0.5514

    Reference:
      Chen et al, `A Simple Framework for Contrastive Learning of Visual Representations
      <https://arxiv.org/abs/2002.05709>`_, 2020
    """
    check_pair(embeddings_a, embeddings_b)
    check_temperature(temperature)
    return over_global_batch(
        _simclr,
        embeddings_a,
        embeddings_b,
        jnp.asarray(temperature, accumulation_dtype(embeddings_a.dtype)),
        axis_name=axis_name,
        mesh=mesh,
    )


@functools.partial(jax.jit, static_argnames="axis_name")
def _simclr(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    temperature: jax.Array,
    *,
    axis_name: AxisName | None,
) -> jax.Array:
    here = embeddings_a.shape[0]
    batch = here * axis_size(axis_name)
    check_batch(batch, "simclr_loss")
    a, b = _unit(embeddings_a), _unit(embeddings_b)
    all_a, all_b = _gather(a, axis_name), _gather(b, axis_name)  # [batch, dim]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * here
    itself = jnp.arange(batch)[None, :] == (first + jnp.arange(here))[:, None]  # [here, batch]
    positive = jnp.sum(a * b, axis=1)
    total = jnp.zeros((), a.dtype)
    for own, same_view, other_view in ((a, all_a, all_b), (b, all_b, all_a)):
        others = jnp.where(itself, -jnp.inf, _products(own, same_view) / temperature)
        positives = _products(own, other_view) / temperature
        similarities = jnp.concatenate([others, positives], axis=1)
        total += jnp.sum(jax.nn.logsumexp(similarities, axis=1) - positive / temperature)
    return global_sum(total, axis_name) / (2 * batch)


def _unit(z: jax.Array) -> jax.Array:
    z = jnp.asarray(z, accumulation_dtype(z.dtype))
    squares = jnp.sum(z**2, axis=1, keepdims=True)
    return z * jax.lax.rsqrt(jnp.maximum(squares, EPSILON))


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    """[a, b] inner products, exact where the device's default rounds them, as optax's are."""
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def _gather(z: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The rows of all devices along `axis_name`."""
    return z if axis_name is None else jax.lax.all_gather(z, axis_name, tiled=True)
