"""The tables of the report: each figure stands in the row that it is of."""

import types

from music_jax.report import overview


def test_each_row_of_the_scores_has_its_own_figures():
    linear = {"top1": 0.91, "top5": 0.98, "random_init_top1": 0.32, "raw_pixels_top1": 0.53}
    knn = {"top1": 0.84, "random_init_top1": 0.25, "raw_pixels_top1": 0.46}
    results = [{"linear": linear, "knn": knn}, {"knn": {"raw_pixels_top1": 0.17}}]
    runs = [types.SimpleNamespace(results=found) for found in results]
    assert overview.scores(runs) == [
        (0, "trained backbone", 0.91, 0.98, 0.84),
        (0, "random initialization", 0.32, None, 0.25),
        (0, "raw pixels", 0.53, None, 0.46),
        (1, "raw pixels", None, None, 0.17),
    ]


def test_the_headline_compares_each_figure_with_its_own():
    linear = {"top1": 0.91, "random_init_top1": 0.32, "raw_pixels_top1": 0.53}
    knn = {"top1": 0.84, "random_init_top1": 0.25, "raw_pixels_top1": 0.46}
    run = types.SimpleNamespace(results={"linear": linear, "knn": knn}, metrics=[])
    assert overview.headline(run) == [
        ("linear probe, top-1", "91.0 %", "random 32.0 %, raw pixels 53.0 %"),
        ("kNN, top-1", "84.0 %", "random 25.0 %, raw pixels 46.0 %"),
    ]
