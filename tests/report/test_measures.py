"""Measures of the report, compared with NumPy and scikit-learn."""

import numpy as np
import pytest
import scipy.special
from sklearn.metrics import confusion_matrix
from sklearn.metrics.pairwise import cosine_similarity

from music_jax.evaluation.results import Predictions
from music_jax.report import measures, page
from tests.report.reports import data_of, make_reported, make_sample, write_results, write_workdir


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Images with their probabilities, and their data in the page."""
    path = write_workdir(tmp_path_factory.mktemp("runs") / "run")
    write_results(path)
    sample = make_sample()
    html = page.render([make_reported(path, sample)]).decode()
    p = scipy.special.softmax(sample.embeddings.reshape(40, 6, 5).astype(np.float64), axis=2)
    return sample, p, data_of(html)["runs"][0]


def test_a_unit_shows_the_images_with_its_highest_probabilities(drawn):
    _, p, data = drawn
    found = data["segments"]
    np.testing.assert_allclose(found["usage"], p.mean(axis=0), rtol=1e-4)
    codes = p.argmax(axis=2)
    np.testing.assert_array_equal(found["codes"], codes)
    for s in range(6):
        for k in range(5):
            members = np.flatnonzero(codes[:, s] == k)
            best = members[np.argsort(-p[members, s, k])][: measures.TOP]
            top = found["top"][s, k]
            np.testing.assert_array_equal(top[: len(best)], best)
            assert np.all(top[len(best) :] == measures.NO_IMAGE)
            certainty = found["certainty"][s, k, : len(best)]
            np.testing.assert_allclose(certainty / 255, p[best, s, k], atol=0.003)
    assert found["counts"].sum() == 40 * 6


def test_the_joint_probability_is_the_mean_product_of_the_views(drawn):
    sample, _, data = drawn
    joint = data["segments"]["joint"]
    p = scipy.special.softmax(sample.view_pairs.reshape(40, 2, 6, 5).astype(np.float64), axis=3)
    p = p.reshape(40, 2, 30)
    expected = 25 * np.einsum("ni,nj->ij", p[:, 0], p[:, 1]) / 40
    shown = 10 ** (joint["low"] + joint["levels"] / 255 * (joint["high"] - joint["low"]))
    inside = (expected > 0.01) & (expected < 5)
    np.testing.assert_allclose(shown[inside], expected[inside], rtol=0.02)
    assert np.all(shown[expected <= 0.01] <= 0.0103)


def test_the_most_informative_segments_are_included():
    sample = make_sample()
    segments = {"count": 6, "units": 5, "order": [4, 1, 0, 2, 3, 5], "temperature": 1.0}
    found = measures.joint_ratios(sample, segments, max_side=15)
    assert found["shown"] == [0, 1, 4]
    assert found["levels"].shape == (15, 15)


def test_neighbors_are_the_nearest_others(drawn):
    sample, _, data = drawn
    similarity = cosine_similarity(sample.features.astype(np.float64))
    np.fill_diagonal(similarity, -2)
    order = np.argsort(-similarity, axis=1)[:, : measures.NEIGHBORS]
    np.testing.assert_array_equal(data["neighbors"]["rows"], order)
    expected = np.take_along_axis(similarity, order, axis=1)
    np.testing.assert_allclose(data["neighbors"]["similarity"] / 1000, expected, atol=1e-3)


def test_an_image_with_duplicates_is_not_its_own_neighbor():
    rows = measures.neighbors(np.ones((20, 4), np.float32))["rows"]
    assert rows.shape == (20, measures.NEIGHBORS)
    assert not np.any(rows == np.arange(20)[:, None])


def test_the_map_keeps_neighborhoods_and_is_none_for_a_collapse():
    sample = make_sample(images=60)
    place = measures.tsne_map(sample.embeddings)
    assert place.shape == (60, 2)
    assert np.all((place >= 0) & (place <= 1))
    distances = np.linalg.norm(place[:, None] - place[None], axis=2)
    same = sample.labels[:, None] == sample.labels[None]
    assert distances[same].mean() < 0.7 * distances[~same].mean()
    assert measures.tsne_map(np.ones((60, 30), np.float32)) is None
    assert measures.tsne_map(sample.embeddings[:4]) is None
    assert np.all(np.isfinite(measures.tsne_map(np.eye(2, dtype=np.float32)[np.arange(9) % 2])))


def test_predictions_are_matched_by_index_and_need_the_same_labels():
    sample = make_sample(images=3)._replace(
        indices=np.asarray([7, 1, 4]), labels=np.asarray([2, 0, 1])
    )
    found = Predictions(np.asarray([1, 7, 9]), np.asarray([0, 2, 1]), np.asarray([5, 6, 8]), 2)
    np.testing.assert_array_equal(measures.predictions_of(sample, found), [6, 5, -1])
    other = found._replace(labels=np.asarray([1, 2, 1]))
    np.testing.assert_array_equal(measures.predictions_of(sample, other), [-1, -1, -1])
    np.testing.assert_array_equal(measures.predictions_of(sample, None), [-1, -1, -1])


def test_huge_labels_take_no_memory():
    labels = np.asarray([0, 0, 3, 2**31 - 1], np.int64)
    predictions = np.asarray([0, 3, 3, 0], np.int64)
    found = measures.count_confusions(Predictions(np.arange(4), labels, predictions, 2), ["a"])
    assert found.names == ["a", "3", "2147483647"]
    np.testing.assert_array_equal(found.counts, [[1, 1, 0], [0, 1, 0], [1, 0, 0]])
    assert found.errors == [("a", "3", 1, 2), ("2147483647", "a", 1, 1)]
    assert found.num_others == 0


def test_few_classes_are_shown_even_if_they_do_not_occur():
    labels = np.asarray([0, 2], np.int64)
    found = measures.count_confusions(Predictions(np.arange(2), labels, labels, 2), ["a", "b", "c"])
    assert found.names == ["a", "b", "c"]
    np.testing.assert_array_equal(found.counts, np.diag([1, 0, 1]))
    assert found.errors == []


def test_confusions_are_counted(tmp_path):
    path = write_workdir(tmp_path / "run")
    labels, predictions = write_results(path, images=300, classes=60)
    run = make_reported(path)
    expected = confusion_matrix(labels, predictions, labels=np.arange(60))
    found = run.confusion
    assert found.num_others == 20
    assert found.names[-1] == "20 others"
    assert found.counts.sum() == 300
    kept = [int(name) for name in found.names[:-1]]
    np.testing.assert_array_equal(found.counts[:-1, :-1], expected[np.ix_(kept, kept)])
    name, taken, count, total = found.errors[0]
    np.fill_diagonal(expected, 0)
    assert count == expected.max() == expected[int(name), int(taken)]
    assert total == np.sum(labels == int(name))
