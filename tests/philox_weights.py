"""Weights that are computed from the names of tensors, so that no file is needed."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np


def philox_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """A network's tensors, by torch's names and shapes, such that its features are of order one."""
    return {name: _tensor(name, tuple(shape)) for name, shape in shapes.items()}


def philox_images(count: int, size: int, channels: int) -> np.ndarray:
    """Uint8 [count, size, size, channels]: blocks of 8 pixels of one color, and noise."""
    rng = _rng(f"images {count} {size} {channels}")
    blocks = rng.integers(0, 200, (count, -(-size // 8), -(-size // 8), channels))
    blocks = blocks.repeat(8, axis=1).repeat(8, axis=2)[:, :size, :size]
    return (blocks + rng.integers(0, 56, blocks.shape)).astype(np.uint8)


def _rng(name: str) -> np.random.Generator:
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = _rng(name)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        values = rng.uniform(0.5, 2.0, shape)
    elif name.endswith("running_mean") or (name.endswith("bias") and len(shape) == 1):
        values = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1:  # the scale of a normalization
        values = rng.uniform(0.5, 1.5, shape)
    else:
        values = rng.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))
    return values.astype(np.float32)
