"""Weighted k-nearest-neighbour classification (Wu et al, arXiv 1805.01978)."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("num_classes", "k", "block_size"))
def knn_predict(
    train_features: jax.Array,
    train_labels: jax.Array,
    test_features: jax.Array,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    block_size: int = 256,
) -> jax.Array:
    """Predicts labels by a vote of the nearest training samples.

    Features are normalised to unit length; each of the `k` neighbours with the largest cosine
    similarity `s` votes for its label with weight `exp(s / temperature)`.

    Args:
      train_features: [train, features].
      train_labels: integers [train].
      test_features: [test, features].
      num_classes: number of labels.
      k: neighbours that vote; all training samples if there are fewer.
      temperature: of the weights.
      block_size: test samples that are compared at once, which bounds the memory to
        `block_size * train` similarities.

    Returns:
      int32 [test].

    Raises:
      ValueError: features and labels do not fit together.
    """
    if train_features.shape[0] != train_labels.shape[0]:
        raise ValueError(
            f"expected one label for each of {train_features.shape[0]} training features; got "
            f"{train_labels.shape[0]}"
        )
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            "expected features of one size; got "
            f"{train_features.shape[1]} (training) and {test_features.shape[1]} (test)"
        )
    bank = _unit(train_features)
    k = min(k, bank.shape[0])

    def predict(block: jax.Array) -> jax.Array:
        similarities, nearest = jax.lax.top_k(block @ bank.T, k)  # [block, k]
        # The largest similarity is 1, so subtracting 1 keeps the exponential in range.
        weights = jnp.exp((similarities - 1.0) / temperature)
        votes = jax.nn.one_hot(train_labels[nearest], num_classes)  # [block, k, classes]
        return jnp.argmax(jnp.einsum("bk,bkc->bc", weights, votes), axis=-1).astype(jnp.int32)

    num_test = test_features.shape[0]
    padding = -num_test % block_size
    blocks = jnp.pad(_unit(test_features), ((0, padding), (0, 0)))
    blocks = blocks.reshape(-1, block_size, blocks.shape[1])
    return jax.lax.map(predict, blocks).reshape(-1)[:num_test]


def _unit(features: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(features, axis=1, keepdims=True)
    return features / jnp.maximum(norms, 1e-12)
