"""Online measures: against scikit-learn and plain numpy, on images that stay the same."""

import dataclasses

import numpy as np
import pytest
from pixel_runs import digits_source, pixel_config, pixel_run
from sklearn.neighbors import KNeighborsClassifier
from tfds_sets import IMAGES, LABELS

from music_jax.evaluation import features, online
from music_jax.evaluation.online import OnlineEvaluation


def _evaluation(tmp_path, source, *measures, num_images=60, view_images=20, seed=0):
    config = pixel_config()
    config.seed = seed
    config.online.update({"measures": measures, "num_images": num_images, "num_views": 2})
    config.online.view_images = view_images
    config.knn.k = 3
    run = pixel_run(tmp_path, source, source, config)
    evaluation = OnlineEvaluation(config, source, run.network, run.mesh, run.skipped)
    return lambda: evaluation(run.params, run.batch_stats), run


@pytest.fixture
def read(monkeypatch):
    """The images of each set that features are extracted of, as they were stored."""
    found = []

    def recorded(self, extractor, source, *given, **options):
        found.append([source.record(i) for i in range(len(source))])
        return extract(self, extractor, source, *given, **options)

    extract = features.FrozenNetwork.extract
    monkeypatch.setattr(features.FrozenNetwork, "extract", recorded)
    return found


def _exp_entropy(values):
    p = values / values.sum() + 1e-7
    return np.exp(-np.sum(p * np.log(p)))


def test_the_measures_are_those_of_the_pixels(tmp_path, monkeypatch):
    banks = []
    predict = online.knn_predict
    monkeypatch.setattr(
        online, "knn_predict", lambda *given, **more: banks.append(given) or predict(*given, **more)
    )
    views = []
    lidar = online.lidar
    monkeypatch.setattr(online, "lidar", lambda x: views.append(x) or lidar(x))
    measure, run = _evaluation(tmp_path, digits_source("a", range(100)), "knn", "rankme", "lidar")
    found = measure()
    assert list(found) == ["online_knn", "online_rankme", "online_lidar", "online_seconds"]
    (neighbors, labels, queries), *_ = banks
    assert (len(neighbors), len(queries)) == (48, 12)
    pixels = np.asarray(run.normalize(IMAGES[:100, ..., None])).reshape(100, -1)
    used = np.concatenate([neighbors, queries])
    rows = np.argmin(np.abs(used[:, None] - pixels[None]).sum(axis=-1), axis=1)
    np.testing.assert_allclose(used, pixels[rows], atol=1e-5)
    assert len(set(rows)) == 60
    classifier = KNeighborsClassifier(
        3, metric="cosine", weights=lambda x: np.exp((1 - x) / run.config.knn.temperature)
    )
    classifier.fit(neighbors, LABELS[rows[:48]])
    assert found["online_knn"] == classifier.score(queries, LABELS[rows[48:]])
    np.testing.assert_array_equal(labels, LABELS[rows[:48]])
    expected = _exp_entropy(np.linalg.svd(used, compute_uv=False))
    np.testing.assert_allclose(found["online_rankme"], expected, rtol=1e-6)
    # Both views are the image: all of the covariance within classes is delta times the identity.
    (views,) = views
    assert views.shape == (20, 2, 64)
    between = np.cov(views[:, 0].T.astype(np.float64))
    expected = _exp_entropy(np.maximum(np.linalg.eigvalsh(between), 0))
    np.testing.assert_allclose(found["online_lidar"], expected, rtol=1e-4)


def test_the_images_are_the_same_for_all_seeds_and_others_are_not_read(tmp_path, read):
    source = digits_source("a", range(100))
    measured = [_evaluation(tmp_path, source, "knn", seed=seed)[0] for seed in (0, 1)]
    first, second = (measure() for measure in measured)
    assert first["online_knn"] == second["online_knn"] == measured[0]()["online_knn"]
    assert read[0] == read[1] == read[2]
    assert len(read[0]) == 60


def test_without_labels_the_other_measures_remain(tmp_path, capsys):
    unlabeled = dataclasses.replace(
        digits_source("a", range(30)), num_classes=0, class_names=(), no_classes=""
    )
    found = _evaluation(tmp_path, unlabeled, "knn", "rankme")[0]()
    assert list(found) == ["online_rankme", "online_seconds"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "online_knn is not measured: the images of a have no labels"
    few = digits_source("few", range(30), unlabeled=range(1, 30))
    assert list(_evaluation(tmp_path, few, "knn")[0]()) == ["online_seconds"]
    (line,) = capsys.readouterr().out.splitlines()
    assert "of the 30 images of few that were drawn, 1 have a label; a larger" in line
    half = digits_source("half", range(60), unlabeled=range(0, 60, 2))
    assert 0 <= _evaluation(tmp_path, half, "knn")[0]()["online_knn"] <= 1


def test_images_of_several_classes_are_measured_without_knn(tmp_path, capsys):
    source = digits_source("tags", range(30))
    tags = np.eye(10, dtype=np.int8)
    records = [source.record(i) for i in range(30)]
    records = [record | {"label": tags[record["label"]]} for record in records]
    source = dataclasses.replace(source, read=records.__getitem__, multi_label=True)
    found = _evaluation(tmp_path, source, "knn", "rankme")[0]()
    assert list(found) == ["online_rankme", "online_seconds"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "online_knn is not measured: the images of tags may have several classes each"


def test_images_that_cannot_be_decoded_are_excluded(tmp_path):
    source = digits_source("a", range(30))
    for i in range(0, 10):
        source.record(i)["image"] = b"broken"
    measure, run = _evaluation(tmp_path, source, "knn", "rankme")
    assert set(measure()) == {"online_knn", "online_rankme", "online_seconds"}
    assert len(run.skipped) == 10


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_network_without_finite_features_is_not_measured(value, tmp_path, capsys):
    _, run = _evaluation(tmp_path, digits_source("a", range(30)), "rankme")
    source = digits_source("a", range(30))
    run.config.online.measures = ("rankme", "lidar")
    evaluation = OnlineEvaluation(run.config, source, run.network, run.mesh, run.skipped)
    params = run.params | {"scale": run.params["scale"] * np.float32(value)}
    assert list(evaluation(params, {})) == ["online_seconds"]
    assert capsys.readouterr().out.count("some features are not finite") == 2 * (value != 0)
