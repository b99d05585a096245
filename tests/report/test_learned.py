"""What a run has learned: scores beside their baselines, and verdicts on its embedding."""

import json
import types

import numpy as np
import pytest
import scipy.special

from music_jax.report import learned, measures
from music_jax.report.reading import read_workdirs
from tests.report.reports import make_sample, write_results, write_workdir


def test_scores_are_in_the_rows_of_their_features():
    linear = {"top1": 0.91, "top5": 0.98, "random_init_top1": 0.32, "raw_pixels_top1": 0.53}
    knn = {"top1": 0.84, "random_init_top1": 0.25, "raw_pixels_top1": 0.46}
    linear["num_classes"] = 8
    results = [{"linear": linear, "knn": knn}, {"knn": {"raw_pixels_top1": 0.17}}]
    runs = [types.SimpleNamespace(results=found) for found in results]
    assert learned.scores(runs) == [
        (0, "trained backbone", [0.91, 0.98, 0.84]),
        (0, "random backbone", [0.32, None, 0.25]),
        (0, "raw pixels", [0.53, None, 0.46]),
        (0, "chance", [0.125, 0.625, 0.125]),
        (1, "raw pixels", [None, None, 0.17]),
    ]


def test_scores_of_several_classes_have_columns_of_their_own():
    metric = "mean_average_precision"
    several = {"linear": {metric: 0.6, f"raw_pixels_{metric}": 0.4}, "knn": {metric: 0.5}}
    several["linear"] |= {f"chance_{metric}": 0.1, "num_test": 50}
    one = {"linear": {"top1": 0.9, "top5": 1.0}}
    run, other, empty = (types.SimpleNamespace(results=x) for x in (several, one, {}))
    several["retrieval"] = {"map": 0.3}
    titles = ["linear mAP, %", "kNN mAP, %"]
    assert [title for title, _, _ in learned.score_columns([run])] == titles
    assert learned.scores([run]) == [
        (0, "trained backbone", [0.6, 0.5]),
        (0, "raw pixels", [0.4, None]),
        (0, "chance", [0.1, 0.1]),
    ]
    assert [title for title, _, _ in learned.score_columns([run, other])][3:] == titles
    assert learned.scores([run, other])[3] == (1, "trained backbone", [0.9, 1.0, None, None, None])
    assert learned.score_columns([empty])[0][0] == "linear top-1, %"
    text = learned.accuracy(run)  # an average precision has no interval of an accuracy
    assert "60.0 %; +20.0 points compared with raw pixels." in text


def test_the_accuracy_has_an_interval_and_is_compared_with_the_baselines():
    """Wilson's interval of 45 of 50 is 78.6 to 95.7 %, as statsmodels gives it."""
    linear = {"top1": 0.9, "random_init_top1": 0.955, "raw_pixels_top1": 0.53, "num_test": 50}
    text = learned.accuracy(types.SimpleNamespace(results={"linear": linear}))
    assert "90.0 % of 50 test images (95 % Wilson interval 78.6 to 95.7 %)" in text
    assert "−5.5 points compared with the random backbone" in text
    assert "+37.0 points compared with raw pixels." in text
    for count in (0, -1, True, "many", None):
        strange = types.SimpleNamespace(results={"linear": linear | {"num_test": count}})
        assert "Wilson" not in learned.accuracy(strange)
    assert learned.accuracy(types.SimpleNamespace(results={})) == ""


def _judge(codes, *, units=4, sharpness=30.0, steps=1_000):
    """Judges segments with these codes, [images, segments]."""
    count, segments = codes.shape
    logits = sharpness * (codes[..., None] == np.arange(units))
    sample = make_sample(images=count, segments=segments, units=units)._replace(
        embeddings=logits.reshape(count, -1).astype(np.float32)
    )
    found = measures.measure_sample_segments(sample, num_segments=segments, temperature=1.0)
    run = types.SimpleNamespace(metrics=[], last_step=steps)
    return found, learned.verdicts(run, sample, found)


def test_segments_are_judged_between_collapse_and_optimum():
    rng = np.random.default_rng(0)
    independent = rng.integers(4, size=(400, 6))
    found, (collapse, redundancy) = _judge(independent)
    assert (collapse.level, redundancy.level) == ("good", "good")
    assert np.log(4) * 0.97 < np.mean(found["told"]) <= np.log(4) + 1e-6
    assert "0 after a collapse, 1.39 at the optimum" in collapse.reading
    assert 9 / 800 * 0.5 < found["chance"] < 9 / 800 * 1.5  # (K - 1)² / 2N, of hard codes
    assert redundancy.value == pytest.approx(0, abs=0.01)

    _, (collapse, redundancy) = _judge(np.repeat(independent[:, :1], 6, axis=1))
    assert (collapse.level, redundancy.level) == ("good", "bad")
    assert redundancy.value == pytest.approx(1, abs=0.01)
    assert "if all were copies of one" in redundancy.reading

    constant = np.zeros((400, 6), int)
    for codes, sharpness in ((constant, 30.0), (independent, 0.0)):  # one unit, or all equally
        _, (collapse, redundancy) = _judge(codes, sharpness=sharpness)
        assert (collapse.level, redundancy.level) == ("bad", "unknown")
        assert collapse.text == "Collapse"
        assert collapse.value == pytest.approx(0, abs=1e-3)

    _, (collapse, _) = _judge(constant, steps=80)
    assert collapse.text == "Collapsed, or hardly trained"
    assert "After 80 steps these look alike" in collapse.reading

    partly = np.concatenate([independent[:, :4], constant[:, :2]], axis=1)
    _, (collapse, _) = _judge(partly)
    assert collapse.level == "fair"
    assert "2 of the segments tell less than a tenth of that." in collapse.reading


def test_one_segment_or_one_image_has_a_verdict():
    _, (collapse, redundancy) = _judge(np.arange(40)[:, None] % 4)
    assert (collapse.level, redundancy.level) == ("good", "unknown")
    for verdict in _judge(np.zeros((1, 2), int))[1]:
        assert verdict.level == "unknown"


def test_embeddings_without_segments_are_judged_by_their_spread_and_rank():
    rng = np.random.default_rng(0)
    run = types.SimpleNamespace(metrics=[], last_step=1_000)

    def levels(embeddings):
        sample = make_sample()._replace(embeddings=embeddings.astype(np.float32))
        return [verdict.level for verdict in learned.verdicts(run, sample, None)]

    noise = rng.normal(size=(500, 20))
    assert levels(noise) == ["good", "good"]
    assert levels(np.ones(20) + 0.001 * noise)[0] == "bad"
    assert levels(np.repeat(noise[:, :1], 20, axis=1) + 0.01 * noise) == ["good", "bad"]
    assert levels(np.zeros((5, 20))) == ["bad", "unknown"]
    assert levels(noise[:, :1]) == ["good", "unknown"]


@pytest.mark.parametrize(("images", "dim"), [(500, 2), (500, 500), (300, 2000)])
def test_the_redundancy_of_embeddings_is_0_if_independent_and_1_for_copies(images, dim):
    """Also in two dimensions, and for fewer images than dimensions, which bound the rank."""
    rng = np.random.default_rng(0)
    independent = rng.normal(size=(images, dim))
    for embeddings, value in ((independent, 0), (np.repeat(independent[:, :1], dim, axis=1), 1)):
        sample = make_sample(images=images)._replace(embeddings=embeddings.astype(np.float32))
        redundancy = learned.verdicts(
            types.SimpleNamespace(metrics=[], last_step=1_000), sample, None
        )[1]
        assert redundancy.value == pytest.approx(value, abs=0.01)


def test_without_images_the_log_tells_of_a_collapse(tmp_path):
    (run,) = read_workdirs([str(write_workdir(tmp_path / "run"))])
    collapse, redundancy = learned.verdicts(run, None, None)
    # Uncertain segments, a collapse as well, use their units equally.
    assert (collapse.level, collapse.text) == ("unknown", "No collapse to a few units")
    assert "the usage entropy was 0.90; 0 after a collapse" in collapse.reading
    assert redundancy.level == "unknown"
    run.metrics[-1]["usage_entropy"] = 0.05
    assert learned.verdicts(run, None, None)[0].level == "bad"
    run.metrics.clear()
    assert learned.verdicts(run, None, None)[0].text == "Collapse is not measured"


def test_the_information_shared_by_chance_is_that_of_shuffled_segments():
    sample = make_sample(images=60)
    found = measures.measure_sample_segments(sample, num_segments=6, temperature=1.0)
    p = scipy.special.softmax(sample.embeddings.reshape(60, 6, 5).astype(np.float64), axis=2)
    rng, shared = np.random.default_rng(3), []
    for _ in range(100):
        joint = p[:, 0].T @ rng.permutation(p[:, 1]) / 60
        outer = joint.sum(1)[:, None] * joint.sum(0)
        shared.append(np.sum(joint * np.log(joint / outer)))
    assert found["chance"] == pytest.approx(np.mean(shared), rel=0.5)


def test_predictions_without_confidences_are_read(tmp_path):
    path = write_workdir(tmp_path / "run")
    write_results(path)
    with np.load(path / "linear_eval.npz") as arrays:
        older = {name: arrays[name] for name in arrays if name != "confidences"}
    np.savez(path / "linear_eval.npz", **older)
    (run,) = read_workdirs([str(path)])
    assert run.predictions is not None
    assert run.predictions.confidences is None
    for wrong in (np.full(40, 1.5, np.float32), np.full(40, np.nan, np.float32), np.zeros(3)):
        np.savez(path / "linear_eval.npz", **older, confidences=wrong)
        (run,) = read_workdirs([str(path)])
        assert run.predictions is None
        assert "a confidence is not in [0, 1]" in json.dumps(run.notes)
