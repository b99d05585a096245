"""The reference cases, and the measure of nearness to them."""

import pathlib
from typing import Any

import numpy as np

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"


def cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    """The cases of `reference/NAME.npz` by number."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(REFERENCE / f"{name}.npz") as file:
        for key in file.files:
            number, field = key.split("/")
            found.setdefault(number, {})[field] = file[key]
    return found


def relative_error(actual: Any, expected: Any) -> float:
    """Largest deviation over the largest element expected.

    Elementwise ratios say nothing of a gradient, many of whose elements are next to nothing.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))
