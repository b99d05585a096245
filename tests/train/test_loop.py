"""What a training is probed with, decided before its first step."""

import cv2
import numpy as np
import pytest

from music_jax.config import default_config
from music_jax.data import datasets
from music_jax.errors import NotMeasurableError
from music_jax.train.loop import _probed


def test_a_set_without_labels_is_trained_on_and_not_probed_unless_it_is_named(tmp_path, capsys):
    for name in ("a", "b"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((4, 4), np.uint8))
    config = default_config()
    config.dataset.path = str(tmp_path)
    source = datasets.training_source(config)
    probed, why_not = _probed(config, source)
    assert probed is None
    assert "no images to test with; name labelled images" in why_not
    assert f"the backbone will not be probed: {why_not}" in capsys.readouterr().out
    config.evaluation.test = str(tmp_path)
    with pytest.raises(NotMeasurableError, match="every image must lie in one of two or more"):
        _probed(config, source)
