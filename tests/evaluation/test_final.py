"""The evaluation at the end of a training."""

import cv2
import numpy as np
import pytest

from music_jax.config import default_config
from music_jax.data import datasets
from music_jax.errors import NotMeasurableError
from music_jax.evaluation.final import FinalEvaluation


def test_images_without_labels_are_not_evaluated_unless_they_are_named(tmp_path, capsys):
    for name in ("a", "b"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((4, 4), np.uint8))
    config = default_config()
    config.dataset.path = str(tmp_path)
    source = datasets.training_source(config)
    final = FinalEvaluation(config, tmp_path, source)
    assert final.sources is None
    said = capsys.readouterr().out
    assert "the backbone will not be probed: " in said
    assert "no images to test with; name labeled images" in said
    assert final.is_done(6)
    assert capsys.readouterr().out == f"{tmp_path} is done: 6 steps trained\n"
    config.evaluation.test = str(tmp_path)
    with pytest.raises(NotMeasurableError, match="every image must be in one of two or more"):
        FinalEvaluation(config, tmp_path, source)
