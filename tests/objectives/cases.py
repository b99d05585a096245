"""Reference cases, and the relative error with which tests compare."""

import pathlib
from typing import Any

import numpy as np

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"

# From random embeddings [batch, dim] to extreme ones.
EXTREMES = {
    "random": lambda z: z,
    "constant": lambda z: np.broadcast_to(z[:1], z.shape),
    "constant and huge": lambda z: np.broadcast_to(1e4 * z[:1], z.shape),
    "huge": lambda z: 1e4 * z,
    "tiny": lambda z: 1e-8 * z,
    "duplicates": lambda z: np.repeat(z[::2], 2, axis=0),
    "zero": lambda z: 0 * z,
}


def extreme_views(name: str, batch: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two views that agree in part, float32 [batch, dim], made extreme."""
    rng = np.random.default_rng(0)
    common, *noise = rng.normal(size=(3, batch, dim))
    za, zb = (EXTREMES[name](common + 0.5 * x).astype(np.float32) for x in noise)
    return za, zb


def cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Returns the cases of `reference/NAME.npz` by number."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(REFERENCE / f"{name}.npz") as file:
        for key in file.files:
            number, field = key.split("/")
            found.setdefault(number, {})[field] = file[key]
    return found


def relative_error(actual: Any, expected: Any) -> float:
    """Returns the largest deviation relative to the largest expected element.

    Elementwise ratios are not meaningful for gradients, many of whose elements are near zero.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))
