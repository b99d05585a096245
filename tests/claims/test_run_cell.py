"""What a cell keeps of its images in memory."""

import json
import runpy

import cv2
import numpy as np
import pytest

from music_jax.claims import run_cell
from music_jax.data.sources import Source
from music_jax.errors import UnusableDataError


def _load(monkeypatch, records):
    config = runpy.run_path("configs/shapes.py")["get_config"]()
    dataset = json.dumps(config.dataset.to_dict())
    source = Source("shapes:train", records, "image", "label", num_classes=4)
    monkeypatch.setattr(run_cell, "open_split", lambda dataset, split: source)
    run_cell._in_memory.cache_clear()
    return run_cell._in_memory(dataset, "train")


def _records():
    png = cv2.imencode(".png", np.full((8, 8, 3), (10, 20, 200), np.uint8))[1].tobytes()
    return [{"image": png, "label": i % 4, "hue": i // 4, "area": 0.5} for i in range(8)]


def test_images_and_all_labels_are_kept(monkeypatch):
    source, labels = _load(monkeypatch, _records())
    bitmap = cv2.imdecode(np.frombuffer(source.example(5)[0], np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(bitmap, np.full((8, 8, 3), (10, 20, 200)))
    assert list(labels) == ["label", "hue"]
    np.testing.assert_array_equal(labels["hue"], [0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [({"image": b"no image"}, "it"), ({"label": 9}, "label 9 is none of 4 classes")],
)
def test_a_damaged_image_is_named(monkeypatch, damage, reason):
    records = _records()
    records[3] |= damage
    with pytest.raises(UnusableDataError, match=rf"image 3 of shapes:train: .*{reason}"):
        _load(monkeypatch, records)
