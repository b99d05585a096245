"""What figures depend on, what they are taken on, and that JSON can hold them."""

import dataclasses
import json
import os
import types

import cv2
import numpy as np
import pytest
from etils import epath
from small_runs import small_config

from music_jax.config import FREE_FIELDS
from music_jax.data import datasets
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UserError
from music_jax.evaluation import feature_protocols
from music_jax.evaluation.features import SplitFeatures
from music_jax.evaluation.load_run import _apply
from music_jax.evaluation.run import Run
from music_jax.evaluation.runner import PROTOCOLS, envelope, measure
from music_jax.evaluation.transfer import on_dataset
from music_jax.workdir.files import write_json


def _folder(path, *, classes=("a", "b"), images=2):
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(images):
            cv2.imwrite(str(path / name / f"{i}.png"), np.zeros((4, 4, 3), np.uint8))
    return str(path)


def _run(tmp_path, config, sources, images):
    return Run(
        config=config,
        workdir=epath.Path(tmp_path),
        sources=sources,
        images=images,
        network=None,
        params={},
        batch_stats={},
        step=3,
        mesh=make_data_mesh(),
        skipped=SkippedImages(epath.Path(tmp_path), max_share=0.5),
    )


def test_a_transfer_from_the_images_of_the_training_learns_from_these(tmp_path):
    config = small_config()
    config.dataset.path = _folder(tmp_path / "train", images=3)
    config.evaluation.train = config.dataset.path
    config.evaluation.test = _folder(tmp_path / "test", images=1)
    sources = datasets.evaluation_sources(config, datasets.training_source(config))
    run = _run(tmp_path, config, sources, sources.test)
    other = _folder(tmp_path / "other", images=2)
    there = on_dataset(run, f"{config.dataset.path}:{other}")
    assert (len(there.sources.train), len(there.sources.test)) == (6, 4)
    assert there.images is there.sources.test


def test_labels_kept_on_disk_are_those_of_the_same_classes(tmp_path):
    source = Source("photos", [{}] * 3, "image", "label", 2, ("a", "b"))
    run = _run(tmp_path, small_config(), None, source)
    renamed = dataclasses.replace(source, class_names=("b", "a"))
    assert run._key(source, "trained") == run._key(dataclasses.replace(source), "trained")
    assert run._key(source, "trained") != run._key(renamed, "trained")


@pytest.mark.parametrize("flag", ["raw_pixels", "random_init"])
def test_neighbors_depend_on_which_comparisons_are_asked_for(flag):
    config = small_config()
    before = envelope("knn", config, 3)
    assert set(before["hyper_parameters"]) > {"knn", "evaluation"}
    config.linear_eval.num_epochs = 7
    assert envelope("knn", config, 3) == before
    config.linear_eval[flag] = True
    assert envelope("knn", config, 3) != before


def test_a_search_that_finds_nothing_has_no_figure(tmp_path):
    def features(label):
        rows = np.eye(4, dtype=np.float32)
        return SplitFeatures({"features": rows}, np.full(4, label, np.int32), np.arange(4))

    config = small_config()
    run = types.SimpleNamespace(
        config=config,
        train=lambda: features(0),
        test=lambda: features(1),
        without_label=lambda *splits: {},
    )
    found = feature_protocols.retrieval(run)
    assert found == {"map": None, "num_gallery": 4, "num_queries": 0}


def test_json_holds_no_number_that_it_has_no_name_for(tmp_path):
    path = epath.Path(tmp_path / "a.json")
    write_json(path, {"a": 1.5})
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, {"a": number})
    assert json.loads(path.read_text()) == {"a": 1.5}


def test_what_may_change_for_an_evaluation_is_all_named():
    with pytest.raises(UserError, match=r"config\.seed belongs to the training") as told:
        _apply(small_config(), {"seed": 3})
    for field in FREE_FIELDS:
        assert field in str(told.value)


def test_features_are_kept_by_what_the_images_are_not_by_how_the_folder_is_named(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Run, "_weights", 0)
    folder = tmp_path / "photos"
    _folder(folder)
    run = _run(tmp_path, small_config(), None, None)

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


def test_figures_of_images_that_have_changed_are_measured_again(tmp_path, monkeypatch):
    config = small_config()
    config.dataset.path = _folder(tmp_path / "train")
    config.evaluation.test = _folder(tmp_path / "test")
    measured = []

    def retrieval(run):
        measured.append(run)
        return {"map": 0.5}

    protocol = PROTOCOLS["retrieval"]._replace(measure=retrieval)
    monkeypatch.setitem(PROTOCOLS, "retrieval", protocol)

    def measure_and_count(**fields):
        config.evaluation.update(fields)
        sources = datasets.evaluation_sources(config, datasets.training_source(config))
        measure(_run(tmp_path, config, sources, sources.test), ["retrieval"])
        return len(measured)

    assert [measure_and_count(), measure_and_count()] == [1, 1]
    assert measure_and_count(test=f"{tmp_path}/./test/") == 1
    cv2.imwrite(str(tmp_path / "test" / "b" / "1.png"), np.ones((4, 4, 3), np.uint8))
    assert [measure_and_count(), measure_and_count()] == [2, 2]
    figures = json.loads((tmp_path / "retrieval.json").read_text())
    del figures["images_fingerprint"]  # as of an older version
    (tmp_path / "retrieval.json").write_text(json.dumps(figures))
    assert measure_and_count() == 3
