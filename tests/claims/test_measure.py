"""The measures of a cell, on embeddings whose segments are known."""

import runpy

import numpy as np
from sklearn.metrics import normalized_mutual_info_score

from music_jax.claims.measure import (
    Outputs,
    _measure_segments,
    linear_top1,
    measure,
    measure_factors,
)
from music_jax.metrics.segments import cluster_scores


def problem(samples, seed):
    """Two labels; one segment is the first of them, the next the second, and two are noise."""
    rng = np.random.default_rng(seed)
    labels = {"label": rng.integers(4, size=samples), "hue": rng.integers(4, size=samples)}
    codes = [labels["label"], labels["hue"], *rng.integers(4, size=(2, samples))]
    embeddings = np.concatenate([20 * np.eye(4, dtype=np.float32)[code] for code in codes], axis=1)
    features = np.concatenate(
        [
            np.eye(4)[labels["label"]] + rng.normal(scale=0.1, size=(samples, 4)),
            rng.normal(scale=0.2, size=(samples, 4)),
        ],
        axis=1,
    )
    return Outputs(features.astype(np.float32), embeddings, labels), codes


def settings():
    config = runpy.run_path("configs/mnist5k.py")["get_config"]()
    config.objective.num_segments = config.objective.units_per_segment = 4
    config.linear_eval.num_epochs = 20
    return config


def test_a_label_that_the_features_hold_is_found_and_another_is_not():
    train, test = problem(800, 0)[0], problem(400, 1)[0]
    config = settings()
    found = measure(train, test, config)
    assert linear_top1(train, test, config) > 0.99
    assert found["knn_top1"] > 0.9
    assert found["ten_shot_top1"] > 0.9
    assert linear_top1(train, test, config, "hue") < 0.4
    assert found["usage_entropy"] > 0.99
    assert found["dead_units"] == 0
    assert found["embedding_rankme"] > 12
    assert found["segment_information"] < 0.02


def test_segments_and_factors_are_scikit_learns():
    train, (test, codes) = problem(800, 0)[0], problem(400, 1)
    config = settings()
    found = measure_factors(train, test, config)
    assert found["factors"] == ["label", "hue"]
    expected = [
        [normalized_mutual_info_score(labels, code) for labels in test.labels.values()]
        for code in codes
    ]
    np.testing.assert_allclose(found["factor_nmi"], expected, atol=1e-9)
    np.testing.assert_allclose(np.diag(expected[:2]), 1)
    segments = measure(train, test, config)["segments_label_nmi"]
    np.testing.assert_allclose(segments, [row[0] for row in expected], atol=1e-9)


def test_collapsed_embeddings_are_told_from_the_features_before_them():
    train, test = problem(200, 0)[0], problem(200, 1)[0]
    one = np.tile(np.float32([9, 0, 0, 0]), 4)
    train, test = (x._replace(embeddings=np.tile(one, (200, 1))) for x in (train, test))
    found = measure(train, test, settings())
    assert found["rankme"] > 4
    assert found["embedding_rankme"] < 1.01
    assert found["usage_entropy"] < 0.01
    assert found["dead_units"] == 0.75
    assert found["segments_label_nmi_mean"] == 0
    assert found["joint_code_accuracy"] < 0.4


def test_no_label_chooses_the_segment_that_is_reported():
    rng = np.random.default_rng(2)

    def split(codes):
        embeddings = [20 * np.eye(4, dtype=np.float32)[code] for code in codes]
        labels = {"label": codes[0], "hue": codes[1]}
        return Outputs(np.zeros((300, 2)), np.concatenate(embeddings, axis=1), labels)

    label, hue = rng.integers(4, size=(2, 300))
    # In training three segments agree, on the second label; in testing three do on the first.
    train, test = split([label, hue, hue, hue]), split([label, hue, label, label])
    found = _measure_segments(train, test, settings())
    reported, others = cluster_scores(hue, label), cluster_scores(label, label)
    assert found["segment_accuracy"] == reported.accuracy
    assert found["segment_purity"] == reported.purity
    assert reported.accuracy < 0.5 < others.accuracy == 1


def test_of_a_method_without_segments_none_are_measured():
    train, test = problem(80, 0)[0], problem(40, 1)[0]
    config = settings()
    config.linear_eval.num_epochs = 1
    general = ["embedding_rankme", "knn_top1", "rankme", "ten_shot_top1"]
    for name in ("barlow_twins", "vicreg"):  # before and after music in the alphabet
        config.objective.name = name
        assert sorted(measure(train, test, config)) == general
    config.objective.name = "barlow_twins"
    assert sorted(measure_factors(train, test, config)) == ["factor_linear_top1", "factors"]
