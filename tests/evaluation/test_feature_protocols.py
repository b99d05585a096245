"""Protocols with a frozen backbone, against numpy, scipy and scikit-learn on the same features."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from listed_records import list_source
from pixel_runs import digits_source, pixel_config, pixel_run
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_rand_score,
    average_precision_score,
    normalized_mutual_info_score,
)
from sklearn.neighbors import KNeighborsClassifier
from small_runs import small_config
from tfds_sets import IMAGES, LABELS, png

from music_jax.config import set_views
from music_jax.evaluation import feature_protocols
from music_jax.evaluation.feature_protocols import random_crop_probe
from music_jax.evaluation.features import SplitFeatures
from music_jax.metrics import linear_probe
from music_jax.metrics.few_shot import few_shot
from music_jax.metrics.label_free import alignment, alpha_req, lidar, rankme, uniformity
from music_jax.metrics.linear_probe import Heads, ProbeRecipe, split_for_validation
from music_jax.metrics.segments import gap_to_bound, measure_segments

_TRAIN, _TEST = np.arange(100), np.arange(650, 710)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = pixel_config()
    config.seed = 5
    config.objective.temperature = 3.0
    config.knn.update({"k": 7, "more_k": (2, 30), "temperature": 0.2})
    config.linear_eval.raw_pixels = True
    config.evaluation.view_images = 60
    set_views(config, flip_probability=0.5)
    config.few_shot.update({"shots": (2, 3), "draws": 3})
    directory = tmp_path_factory.mktemp("run")
    return pixel_run(
        directory, digits_source("train", _TRAIN), digits_source("test", _TEST), config
    )


def _features(run, rows):
    """What `LinearNetwork` makes of images by the config's mean and standard deviation."""
    x = ((IMAGES[rows].reshape(len(rows), -1) / 255 - 0.13) / 0.31).astype(np.float32)
    return x * np.asarray(run.params["scale"])


def _probabilities(run):
    """Softmax of each segment's part of the test images' embeddings."""
    embeddings = _features(run, _TEST).astype(np.float64) @ np.asarray(run.params["head"])
    scores = embeddings.reshape(len(_TEST), 6, 5) / 3.0
    exponentials = np.exp(scores - scores.max(axis=2, keepdims=True))
    return exponentials / exponentials.sum(axis=2, keepdims=True)


def test_knn_matches_scikit_learn(run):
    found = feature_protocols.knn(run)

    def top1(train, test, k):
        def weights(distances):
            return np.exp((1 - distances) / 0.2)

        theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
        return theirs.fit(train, LABELS[_TRAIN]).score(test, LABELS[_TEST])

    train, test = _features(run, _TRAIN), _features(run, _TEST)
    expected = {str(k): top1(train, test, k) for k in (2, 7, 30)}
    assert found["top1_by_k"] == pytest.approx(expected)
    assert found["top1"] == pytest.approx(expected["7"])
    raw = [IMAGES[rows].reshape(len(rows), -1) / 255 for rows in (_TRAIN, _TEST)]
    assert found["raw_pixels_top1"] == pytest.approx(top1(*raw, 7))
    assert found["random_init_top1"] is None
    assert (found["num_train"], found["num_test"]) == (100, 60)


def test_few_shot_reports_the_draws_and_their_student_interval(run):
    found = feature_protocols.fewshot(run)["top1_by_shots"]
    assert list(found) == ["2", "3"]
    for shots, figures in found.items():
        expected = few_shot(
            _features(run, _TRAIN),
            LABELS[_TRAIN],
            _features(run, _TEST),
            LABELS[_TEST],
            shots=int(shots),
            draws=3,
            seed=5,
        )
        np.testing.assert_allclose(figures["draws"], expected, atol=0.02)
        assert figures["top1"] == pytest.approx(np.mean(figures["draws"]))
        low, high = scipy.stats.t.interval(0.95, 2, 0, scipy.stats.sem(figures["draws"]))
        assert figures["interval"] == pytest.approx((high - low) / 2)


def test_retrieval_matches_the_mean_of_scikit_learn_over_the_queries(run):
    found = feature_protocols.retrieval(run)
    unit = [
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (_features(run, rows) for rows in (_TEST, _TRAIN))
    ]
    scores = unit[0].astype(np.float64) @ unit[1].T
    expected = [
        average_precision_score(LABELS[_TRAIN] == label, row)
        for row, label in zip(scores, LABELS[_TEST], strict=True)
    ]
    assert found == {
        "map": pytest.approx(np.mean(expected), abs=1e-3),
        "num_gallery": 100,
        "num_queries": 60,
    }


def test_clustering_matches_scikit_learn(run):
    found = feature_protocols.clustering(run)
    probabilities, labels = _probabilities(run), LABELS[_TEST]
    codes = probabilities.argmax(axis=2).T
    nmi = np.asarray([[normalized_mutual_info_score(a, b) for a in codes] for b in codes])
    agreement = (nmi.sum(axis=1) - 1) / 5
    segments = found["segments"]
    np.testing.assert_allclose([s["agreement"] for s in segments], agreement, atol=1e-6)
    expected = [normalized_mutual_info_score(labels, code) for code in codes]
    np.testing.assert_allclose([s["nmi"] for s in segments], expected, atol=1e-6)
    chosen, oracle = found["chosen_segment"], found["oracle_segment"]
    assert chosen.pop("rule").startswith("without labels")
    assert chosen == segments[np.argmax(agreement)] | {"segment": np.argmax(agreement)}
    best = int(np.argmax([s["accuracy"] for s in segments]))
    assert oracle.pop("rule").startswith("by the test labels")
    assert {"agreement": segments[best]["agreement"], **oracle} == segments[best] | {
        "segment": best
    }
    assert best != np.argmax(agreement)  # so that the one is not taken for the other
    joint = KMeans(10, n_init=10, random_state=5).fit_predict(
        np.sqrt(probabilities.astype(np.float32)).reshape(60, -1)
    )
    assert found["joint_code"]["num_clusters"] == found["joint_code"]["clusters"] == 10
    assert found["joint_code"]["adjusted_rand"] == pytest.approx(
        adjusted_rand_score(labels, joint), abs=0.02
    )
    assert found["num_images"] == 60


def test_label_free_measures_features_and_embeddings(run, monkeypatch):
    monkeypatch.setattr(feature_protocols, "_MAX_RANKED", 50)
    found = feature_protocols.label_free(run)
    features, views = _features(run, _TEST[:50]), run.views()
    for name, rows in (("features", features), ("embeddings", features @ run.params["head"])):
        several = views[name]
        assert several.shape == (60, 2, rows.shape[1])
        assert found[name] == {
            "rankme": pytest.approx(rankme(rows), rel=1e-4),
            "alpha_req": pytest.approx(alpha_req(rows), rel=1e-3),
            "uniformity": pytest.approx(uniformity(rows), rel=1e-4),
            "lidar": pytest.approx(lidar(several)),
            "alignment": pytest.approx(alignment(several[:, 0], several[:, 1])),
            "size": rows.shape[1],
        }
    assert (found["num_images"], found["num_viewed_images"], found["num_views"]) == (50, 60, 2)


def test_segment_metrics_are_in_nats_and_as_shares(run):
    found = feature_protocols.segments(run)
    measured = measure_segments(_probabilities(run))
    for name in ("usage_entropy", "confidence", "assignment_entropy"):
        values = getattr(measured, name)
        assert found[name] == pytest.approx(
            {"mean": values.mean(), "least": values.min(), "most": values.max()}, rel=1e-4
        )
    for name, values in found["by_segment"].items():
        np.testing.assert_allclose(values, getattr(measured, name), rtol=1e-3, atol=1e-5)
    matrix = np.asarray(found["mutual_information_matrix"])
    np.testing.assert_allclose(matrix, measured.mutual_information, rtol=1e-3, atol=1e-5)
    between = matrix[np.triu_indices(6, 1)]
    usage = found["usage_entropy"]["mean"]
    assert found["mutual_information"] == pytest.approx(
        {
            "mean": between.mean(),
            "least": between.min(),
            "most": between.max(),
            "bias": 16 / 120,  # (5 - 1)² / (2 * 60)
            "share_of_usage_entropy": between.mean() / usage,
        }
    )
    assert found["log_units"] == pytest.approx(np.log(5))
    assert found["usage_entropy_share"] == pytest.approx(usage / np.log(5))
    assert found["dead_units"] == measured.dead_units.sum()
    assert (found["num_images"], found["num_units"]) == (60, 30)
    views = run.views()["embeddings"]
    distances = gap_to_bound(views[:, 0], views[:, 1], num_segments=6, temperature=3.0)
    assert found["gap_to_bound"] == pytest.approx(distances | {"num_images": 60})


_ROWS = 40  # to learn from


def _recorded(monkeypatch, heads):
    """Has the probe record what it trains on, and gives it classifiers in place of its own."""
    seen = []

    def fit(batches, recipe, **_):
        seen.append([(np.asarray(x), np.asarray(y)) for x, y in batches])
        rates = len(recipe.base_learning_rates)
        return Heads(jnp.asarray(heads[-rates:]), jnp.zeros((rates, heads.shape[2])))

    monkeypatch.setattr(linear_probe, "fit", fit)
    return seen


def test_random_crop_probe_scales_features_by_the_training_images(tmp_path, monkeypatch):
    config = pixel_config()
    config.linear_eval.feature_scaling = "standardize"
    train, test = digits_source("train", range(_ROWS)), digits_source("test", range(100, 160))
    run = pixel_run(tmp_path, train, test, config)
    seen = _recorded(monkeypatch, np.eye(64, 10, dtype=np.float32)[None])
    found = random_crop_probe(run, "trained", ProbeRecipe(1, _ROWS, (0.1,)), "probe")
    ((features, labels),) = seen[0]
    raw, tested = (
        (IMAGES[i].reshape(len(i), -1) / 255 - 0.13) / 0.31
        for i in (np.arange(_ROWS), np.arange(100, 160))
    )
    scale = lambda x: (x - raw.mean(0)) / (raw.std(0) + 1e-6)  # noqa: E731
    order = np.lexsort(np.round(features, 2).T)
    expected = np.lexsort(np.round(scale(raw), 2).T)
    np.testing.assert_allclose(features[order], scale(raw)[expected], atol=1e-3)
    np.testing.assert_array_equal(labels[order], LABELS[:_ROWS][expected])
    np.testing.assert_array_equal(found.predictions, scale(tested)[:, :10].argmax(1))


def _lookup(classes):
    """Images with one bright pixel each, and a kernel that gives each image a class of its own."""
    kernel = np.zeros((64, 2), np.float32)
    kernel[np.arange(len(classes)), classes] = 1
    return kernel


def test_learning_rate_is_selected_on_held_out_training_images(tmp_path, monkeypatch):
    """One rate is right for the images held out alone, one for the rest, and one for the test.

    Each image is one bright pixel, so that a kernel can give each image any class.
    """
    count, tests = 30, 20
    images = np.zeros((count + tests, 8, 8), np.uint8)
    images.reshape(count + tests, -1)[np.arange(count + tests), np.arange(count + tests)] = 255
    labels = np.arange(count + tests) % 2
    records = [{"image": png(x), "label": int(y)} for x, y in zip(images, labels, strict=True)]
    train = list_source("train", records[:count], 2, ("a", "b"))
    test = list_source("test", records[count:], 2, ("a", "b"))
    config = pixel_config()
    config.dataset.update({"mean": (0.0,), "std": (1.0,)})
    config.linear_eval.validation_fraction = 0.3
    rest, held_out = split_for_validation(count, 0.3, config.seed)
    heads = []
    for right in (rest, held_out, np.arange(count, count + tests)):
        classes = 1 - labels
        classes[right] = labels[right]
        heads.append(_lookup(classes))
    seen = _recorded(monkeypatch, np.stack(heads))
    run = pixel_run(tmp_path, train, test, config)
    found = random_crop_probe(run, "trained", ProbeRecipe(1, 4, (0.1, 0.2, 0.3)), "probe")
    assert found.base_learning_rate == 0.2
    assert found.top1 == 1.0  # by the last kernel, that of the test
    chosen, final = (np.concatenate([x for x, _ in part]).argmax(1) for part in seen)
    assert set(chosen) <= set(rest)
    assert len(final) == 28  # seven batches of four of all thirty


def test_mean_average_precision_is_null_without_relevant_images():
    def features(label):
        rows = np.eye(4, dtype=np.float32)
        return SplitFeatures({"features": rows}, np.full(4, label, np.int32), np.arange(4))

    config = small_config()
    run = types.SimpleNamespace(
        config=config,
        train=lambda: features(0),
        test=lambda: features(1),
    )
    found = feature_protocols.retrieval(run)
    assert found == {"map": None, "num_gallery": 4, "num_queries": 0}
