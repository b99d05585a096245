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
