"""Reference cases, and the relative error with which tests compare."""

import pathlib
from typing import Any

import numpy as np

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"


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
