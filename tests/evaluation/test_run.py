"""Cached features: what they depend on; loading a run whose training images are gone."""

import dataclasses
import os

import cv2
import numpy as np
import pytest
from etils import epath
from listed_records import list_source
from small_runs import save_run, small_config
from tfds_sets import IMAGES, LABELS, write_set

from music_jax.config import FREE_FIELDS
from music_jax.data import datasets
from music_jax.data.skipped import SkippedImages
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import NotMeasurableError, UserError
from music_jax.evaluate import evaluate
from music_jax.evaluation.run import Run, _check_classes, _override, load_run


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
    source = list_source("photos", [{}] * 3, 2, ("a", "b"))
    run = _run(tmp_path, source)
    renamed = dataclasses.replace(source, class_names=("b", "a"))
    assert run._key(source, "trained") == run._key(dataclasses.replace(source), "trained")
    assert run._key(source, "trained") != run._key(renamed, "trained")


def test_cached_features_depend_on_the_images_not_on_the_spelling_of_the_folder(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Run, "weights_checksum", 0)
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


def test_one_class_suffices_to_test_with_but_not_to_learn_from():
    source = list_source("photos", [{}] * 3, 2, ("a", "b"))
    _check_classes(source, np.array([0, 1, -1]), "train")
    _check_classes(source, np.array([0, 0, -1]), "test")
    with pytest.raises(NotMeasurableError, match="labels of 1 classes; at least 2 are needed"):
        _check_classes(source, np.array([0, 0, -1]), "train")
    with pytest.raises(NotMeasurableError, match="labels of 0 classes; at least 1 are needed"):
        _check_classes(source, np.array([-1, -1, -1]), "test")


def _digit_folder(path, rows):
    for i in rows:
        (path / str(LABELS[i])).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path / str(LABELS[i]) / f"{i}.png"), IMAGES[i])
    return str(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run on a folder that is gone by now, and folders that are there."""
    directory = tmp_path_factory.mktemp("opening")
    config = small_config(name="tiny_resnet")
    config.crop.size = config.crop.eval_resize = 8
    config.dataset.update({"name": "", "path": str(directory / "gone")})
    save_run(directory / "run", config)
    config.dataset.update({"name": "digits", "path": "", "data_dir": str(directory / "nowhere")})
    save_run(directory / "tfds_run", config)
    _digit_folder(directory / "train", range(30))
    _digit_folder(directory / "test", range(100, 112))
    _digit_folder(directory / "moved", range(200, 205))
    write_set(directory / "tfds", "unlabeled", {"test": [-1] * 7})
    return directory


def _open(places, *, run="run", labels=True, images=True, **fields):
    overrides = {k.replace("__", "."): str(places / v) for k, v in fields.items()}
    return load_run(str(places / run), overrides=overrides, labels=labels, images=images)


def test_training_images_are_not_opened_if_both_evaluation_sets_are_named(places):
    for run in ("run", "tfds_run"):
        found = _open(places, run=run, evaluation__train="train", evaluation__test="test")
        assert (len(found.sources.train), len(found.sources.test)) == (30, 12)
        assert found.images is found.sources.test
    assert not os.path.exists(places / "nowhere")  # where the training set would be prepared


def test_without_labels_only_test_images_are_opened(places):
    found = _open(places, labels=False, evaluation__test="test")
    assert (found.sources, len(found.images)) == (None, 12)
    with pytest.raises(UserError, match="there is no folder"):
        _open(places, evaluation__test="test")


def test_training_images_may_have_been_moved(places):
    assert _open(places, labels=False, dataset__path="moved").images.name == str(places / "moved")
    with pytest.raises(UserError, match=r"trained on a folder; this one was trained on digits"):
        _open(places, run="tfds_run", dataset__path="moved")


def test_transfer_opens_none_of_the_images_of_the_run(places):
    assert len(_open(places, images=False).images) == 0
    sets = f"{places / 'train'}:{places / 'test'}"
    found = evaluate(
        str(places / "run"),
        protocols=(),
        transfer_sets=(sets,),
        overrides={"linear_eval.num_epochs": 1},
    )
    there = found["transfer"]["by_dataset"][sets]
    assert (there["linear"]["num_train"], there["knn"]["num_test"]) == (30, 12)


def test_protocols_without_labels_run_on_an_unlabeled_test_set(places, capsys):
    found = evaluate(
        str(places / "run"),
        protocols=("knn", "label_free", "fewshot"),
        overrides={
            "evaluation.train": str(places / "train"),
            "evaluation.test": "unlabeled:1.0.0:test",
            "dataset.data_dir": str(places / "tfds"),
            "evaluation.num_views": 2,
        },
    )
    assert list(found) == ["label_free"]
    assert found["label_free"]["num_images"] == 7
    assert found["label_free"]["data"] == {"images": "unlabeled:1.0.0:test"}
    said = [line for line in capsys.readouterr().out.splitlines() if "not measured" in line]
    assert len(said) == 1
    assert said[0].startswith("not measured: knn, fewshot: unlabeled:1.0.0:test cannot be")
    assert "none of its 7 images has a label" in said[0]


def test_the_error_lists_all_fields_that_can_be_overridden():
    with pytest.raises(UserError, match=r"config\.seed cannot change after training") as told:
        _override(small_config(), {"seed": 3})
    for field in FREE_FIELDS:
        assert field in str(told.value)
