"""Tables of results."""

import json

import numpy as np
import pytest
from etils import epath

from music_jax.evaluation.results import (
    Classifier,
    Predictions,
    read_classifier,
    results_table,
    write_classifier,
    write_predictions,
)
from music_jax.workdir.files import write_json


@pytest.mark.parametrize(
    ("classes", "chance"), [(10, ["10.0", "50.0", "10.0"]), (3, ["33.3", "100.0", "33.3"])]
)
def test_results_table_shows_chance_level_and_baselines(classes, chance):
    linear = {"top1": 0.5, "top5": 0.9, "num_classes": classes}
    linear |= {"raw_pixels_top1": 0.25, "random_init_top1": None}
    rows = results_table({"linear": linear, "knn": {"top1": 0.4, "raw_pixels_top1": 0.2}})
    cells = {line[:16].strip(): line[16:].replace("%", "").split() for line in rows.splitlines()}
    assert cells["trained backbone"] == ["50.0", "90.0", "40.0"]
    assert cells["raw pixels"] == ["25.0", "20.0"]
    assert cells["chance"] == chance
    assert "random backbone" not in cells


@pytest.mark.parametrize("classes", [{}, {"num_classes": 0}, {"num_classes": "many"}])
def test_results_table_has_no_chance_level_without_the_number_of_classes(classes):
    linear = {"top1": 0.5, "top5": 0.9} | classes
    assert "chance" not in results_table({"linear": linear, "knn": {"top1": 0.4}})


def test_non_finite_numbers_are_not_written_as_json(tmp_path):
    path = epath.Path(tmp_path / "a.json")
    write_json(path, {"a": 1.5})
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, {"a": number})
    assert json.loads(path.read_text()) == {"a": 1.5}


def test_predictions_that_cannot_be_saved_are_a_warning(tmp_path, caplog):
    one, removed = np.ones(3, np.int32), epath.Path(tmp_path / "removed")
    write_predictions(removed, Predictions(one.astype(np.int64), one, one, 7))
    assert "the predictions of the linear probe: linear_eval.npz cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("kernel", "bias"),
    [((3, 2), (3,)), ((3, 2), (2, 1)), ((0, 2), (2,)), ((3,), ()), ((3, 0), (0,))],
)
def test_a_classifier_of_unexpected_shapes_is_not_read(tmp_path, kernel, bias):
    path = epath.Path(tmp_path)
    good = Classifier(np.ones((3, 2), np.float32), np.ones(2, np.float32), 7)
    write_classifier(path, good)
    found = read_classifier(path)
    np.testing.assert_array_equal(found.kernel, good.kernel)
    assert found.step == 7
    write_classifier(path, good._replace(kernel=np.ones(kernel, "f4"), bias=np.ones(bias, "f4")))
    with pytest.raises(ValueError, match="unexpected shape"):
        read_classifier(path)
