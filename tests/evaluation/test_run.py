"""Cached features: what they depend on."""

import dataclasses
import os

import cv2
import numpy as np
from etils import epath
from small_runs import small_config

from music_jax.data import datasets
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed.mesh import make_data_mesh
from music_jax.evaluation.run import Run


def _folder(path):
    for name in ("a", "b"):
        (path / name).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(path / name / f"{i}.png"), np.zeros((4, 4, 3), np.uint8))


def _run(tmp_path, images):
    return Run(
        config=small_config(),
        workdir=epath.Path(tmp_path),
        sources=None,
        images=images,
        network=None,
        params={},
        batch_stats={},
        step=3,
        mesh=make_data_mesh(),
        skipped=SkippedImages(epath.Path(tmp_path), max_share=0.5),
    )


def test_cached_labels_depend_on_the_class_names(tmp_path):
    source = Source("photos", [{}] * 3, "image", "label", 2, ("a", "b"))
    run = _run(tmp_path, source)
    renamed = dataclasses.replace(source, class_names=("b", "a"))
    assert run._key(source, "trained") == run._key(dataclasses.replace(source), "trained")
    assert run._key(source, "trained") != run._key(renamed, "trained")


def test_cached_features_depend_on_the_images_not_on_the_spelling_of_the_folder(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Run, "_weights", 0)
    folder = tmp_path / "photos"
    _folder(folder)
    run = _run(tmp_path, None)

    def key():
        return run._key(datasets.open_path(str(folder)), "trained")

    before = key()
    assert run._key(datasets.open_path(f"{folder}//"), "trained") == before
    image = folder / "a" / "1.png"
    content = bytearray(image.read_bytes())
    content[-1] ^= 1  # as large as before
    image.write_bytes(content)
    assert key() != before
    before = key()
    os.utime(image, ns=(1, 1))
    assert key() != before
