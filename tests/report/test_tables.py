"""Tables of the report: each value is in its row."""

import types

from music_jax.report import tables


def test_scores_are_in_the_rows_of_their_features():
    linear = {"top1": 0.91, "top5": 0.98, "random_init_top1": 0.32, "raw_pixels_top1": 0.53}
    knn = {"top1": 0.84, "random_init_top1": 0.25, "raw_pixels_top1": 0.46}
    results = [{"linear": linear, "knn": knn}, {"knn": {"raw_pixels_top1": 0.17}}]
    runs = [types.SimpleNamespace(results=found) for found in results]
    assert tables.scores(runs) == [
        (0, "trained backbone", [0.91, 0.98, 0.84]),
        (0, "random initialization", [0.32, None, 0.25]),
        (0, "raw pixels", [0.53, None, 0.46]),
        (1, "raw pixels", [None, None, 0.17]),
    ]


def test_scores_of_several_classes_have_columns_of_their_own():
    metric = "mean_average_precision"
    several = {"linear": {metric: 0.6, f"raw_pixels_{metric}": 0.4}, "knn": {metric: 0.5}}
    one = {"linear": {"top1": 0.9, "top5": 1.0}}
    run, other, empty = (types.SimpleNamespace(results=x, metrics=[]) for x in (several, one, {}))
    titles = ["linear mAP, %", "kNN mAP, %"]
    assert [title for title, _, _ in tables.score_columns([run])] == titles
    assert tables.scores([run]) == [
        (0, "trained backbone", [0.6, 0.5]),
        (0, "raw pixels", [0.4, None]),
    ]
    assert tables.headline(run) == [
        ("linear probe, mAP", "60.0 %", "raw pixels 40.0 %"),
        ("kNN, mAP", "50.0 %", ""),
    ]
    assert [title for title, _, _ in tables.score_columns([run, other])][3:] == titles
    assert tables.scores([run, other])[2] == (1, "trained backbone", [0.9, 1.0, None, None, None])
    assert tables.score_columns([empty])[0][0] == "linear top-1, %"


def test_the_headline_compares_results_with_their_baselines():
    linear = {"top1": 0.91, "random_init_top1": 0.32, "raw_pixels_top1": 0.53}
    knn = {"top1": 0.84, "random_init_top1": 0.25, "raw_pixels_top1": 0.46}
    run = types.SimpleNamespace(results={"linear": linear, "knn": knn}, metrics=[])
    assert tables.headline(run) == [
        ("linear probe, top-1", "91.0 %", "random initialization 32.0 %, raw pixels 53.0 %"),
        ("kNN, top-1", "84.0 %", "random initialization 25.0 %, raw pixels 46.0 %"),
    ]


def test_a_step_that_is_no_number_does_not_count_as_stale():
    run = types.SimpleNamespace(
        results={"knn": {"step": [3]}, "linear": {"step": 5}, "few": {}}, last_step=7
    )
    assert tables.stale_results(run) == "measured at step 5; the last logged step is 7"
