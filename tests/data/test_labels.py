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


def test_lists_of_lists_are_no_labels():
    found = number_labels([[[0, 1]], [[2]], [[0]]], "the column 'boxes'")
    assert (found.num_classes, found.labels.tolist()) == (0, [-1, -1, -1])
    assert found.no_classes == "the labels in the column 'boxes' are lists of lists"


def test_a_matrix_of_labels_that_takes_too_much_memory_is_not_made():
    found = number_labels([[i % 900 * 1165] for i in range(5000)], "x")
    assert found.num_classes == 0
    assert "labels of 1,047,336 classes for 5,000 images take too much memory" in found.no_classes
