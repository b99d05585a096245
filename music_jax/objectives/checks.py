"""Checks of the arguments: each error says what was expected, what came and what to do."""

import jax
import jax.numpy as jnp


def check_embeddings(embeddings: jax.Array, name: str = "embeddings") -> None:
    """Raises ValueError unless `embeddings` is a floating array of shape [batch, dim]."""
    if not hasattr(embeddings, "shape") or not hasattr(embeddings, "dtype"):
        raise ValueError(
            f"{name}: expected an array of shape [batch, dim], got {type(embeddings).__name__}; "
            "convert it with jnp.asarray"
        )
    if embeddings.ndim != 2:
        raise ValueError(
            f"{name}: expected shape [batch, dim], got {tuple(embeddings.shape)}; flatten all but "
            "the batch axis"
        )
    if 0 in embeddings.shape:
        raise ValueError(
            f"{name}: expected at least one sample and one unit, got {tuple(embeddings.shape)}"
        )
    if not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise ValueError(
            f"{name}: expected a floating dtype, got {embeddings.dtype}; cast it first, with "
            "embeddings.astype(jnp.float32)"
        )


def check_pair(embeddings_a: jax.Array, embeddings_b: jax.Array) -> None:
    """Raises ValueError unless both views are [batch, dim], of one shape and one floating dtype."""
    check_embeddings(embeddings_a, "embeddings_a")
    check_embeddings(embeddings_b, "embeddings_b")
    if embeddings_a.shape != embeddings_b.shape:
        raise ValueError(
            "expected two views of the same samples, of equal shapes, got "
            f"{tuple(embeddings_a.shape)} and {tuple(embeddings_b.shape)}"
        )
    if embeddings_a.dtype != embeddings_b.dtype:
        raise ValueError(
            f"expected two views of equal dtypes, got {embeddings_a.dtype} and "
            f"{embeddings_b.dtype}; cast one to the other"
        )


def check_segments(dim: int, num_segments: int, *, at_least: int = 1) -> None:
    """Raises ValueError unless `dim` units fall into `num_segments` segments of equal size."""
    if isinstance(num_segments, bool) or not hasattr(num_segments, "__index__"):
        raise ValueError(f"num_segments: expected an int, got {num_segments!r}")
    if num_segments < at_least:
        why = "; the cross-segment term needs two different segments" if at_least > 1 else ""
        raise ValueError(f"num_segments: expected at least {at_least}, got {num_segments}{why}")
    if dim % num_segments:
        raise ValueError(
            f"expected dim to be a multiple of num_segments, got dim {dim} and num_segments "
            f"{num_segments} (remainder {dim % num_segments}); choose dim = num_segments * units"
        )


def check_temperature(temperature: float | jax.Array) -> None:
    """Raises ValueError for a temperature that is known not to be a positive finite number."""
    if isinstance(temperature, (int, float)) and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive finite number, got {temperature}")


def check_batch(batch: int, method: str) -> None:
    """Raises ValueError for a global batch of one, over which there is no variance."""
    if batch < 2:
        raise ValueError(
            f"{method}: expected a global batch of at least 2 samples, since it normalizes or "
            f"measures over the batch, got {batch}"
        )
