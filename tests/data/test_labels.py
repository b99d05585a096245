"""Labels from values of columns and files."""

import pytest

from music_jax.data.labels import number_labels


@pytest.mark.parametrize("make", [int, str])
def test_numbers_of_images_are_not_classes(make):
    found = number_labels([make(i) for i in range(1001)], "the column 'id'")
    assert (found.num_classes, found.labels.max()) == (0, -1)
    assert "the 1,001 values in the column 'id' are too many" in found.no_classes
    assert number_labels([make(i) for i in range(1000)], "x").num_classes == 1000
    assert number_labels([make(i // 2) for i in range(3000)], "x").num_classes == 1500
