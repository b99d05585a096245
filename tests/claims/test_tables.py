"""Tables, tests and pages of results."""

import json

import faked_claims as faked
import numpy as np
import pytest
import scipy.stats

from music_jax.claims import report
from music_jax.claims.planning import make_plan
from music_jax.claims.statistics import holm
from music_jax.claims.tables import MARGIN, make_tables
from music_jax.errors import UserError

_METHODS = ("music", "music_centered", "barlow_twins", "vicreg", "simclr")
_FEW = ("music", "barlow_twins", "vicreg")


def _tables(
    tmp_path, *, methods=_METHODS, accuracy=faked.validation_accuracy, more=None, **options
):
    sweep = faked.make_sweep(tmp_path, methods=methods, **options)
    faked.finish_all(sweep, accuracy=accuracy, **(more or {}))
    return sweep, make_tables(sweep)


def _centered_is_better(cell):
    return faked.validation_accuracy(cell) + 0.02 * (cell.fields.get("objective.center") is True)


def test_the_better_music_on_validation_is_compared_with_the_others(tmp_path):
    _, (table,) = _tables(tmp_path, accuracy=_centered_is_better, seeds=10)
    tests = [test for test in table["tests"] if test["family"] == "primary"]
    assert {(t["a"]["series"], t["b"]["series"]) for t in tests} == {
        ("music_centered", "barlow_twins"),
        ("music_centered", "vicreg"),
    }
    rows = {row["series"]: row["measures"] for row in table["rows"]}
    raw = []
    for test in tests:
        a, b = (rows[test[side]["series"]]["linear_top1"]["values"] for side in "ab")
        expected = scipy.stats.ttest_rel(a, b)
        assert test["p"] == pytest.approx(expected.pvalue)
        assert test["mean"] == pytest.approx(np.mean(a) - np.mean(b))
        assert test["low"] == pytest.approx(expected.confidence_interval().low)
        assert test["bootstrap"][0] < test["mean"] < test["bootstrap"][1]
        raw.append(test["p"])
    assert [test["p_holm"] for test in tests] == pytest.approx(holm(raw))
    for test in tests:
        shown = test["p_holm"] < 0.05
        assert test["verdict"] == (("more" if test["mean"] > 0 else "less") if shown else
                                   "no difference shown")  # fmt: skip
    families = {test["family"] for test in table["tests"]}
    assert families == {
        "primary", "centering", "secondary, linear", "secondary, kNN", "secondary, 10-shot",
    }  # fmt: skip


def test_the_tables_are_the_same_in_a_fresh_process_from_the_files_alone(tmp_path):
    _, tables = _tables(tmp_path, seeds=8)
    again = make_tables(faked.make_sweep(tmp_path, methods=_METHODS, seeds=8))
    assert json.dumps(again) == json.dumps(tables)
    (tmp_path / "final" / "vicreg" / "02.npz").unlink()
    with pytest.raises(UserError, match=r"vicreg/02.npz cannot be read"):
        make_tables(faked.make_sweep(tmp_path, methods=_METHODS, seeds=8))


def test_predictions_are_kept_in_little_space(tmp_path):
    sweep, _ = _tables(tmp_path, methods=("vicreg",))
    cell = next(c for c in make_plan(sweep).cells if c.name == "final/vicreg/01")
    found = sweep.results.predictions(cell)
    assert set(found) == {"linear", "knn"}
    top1 = sweep.results.read(cell)["linear_top1"]
    assert np.mean(found["linear"] == sweep.results.labels()) == pytest.approx(top1)
    np.testing.assert_array_equal(sweep.results.labels(), faked.LABELS)
    assert (tmp_path / "final/vicreg/01.npz").stat().st_size < 1500  # 800 predictions


def test_an_objective_that_joins_is_compared_with_all_others(tmp_path, monkeypatch):
    from music_jax import registry

    mine = registry.RegisteredObjective(lambda **_: None, {"weight": (0.5, 1.0)})
    monkeypatch.setitem(registry.OBJECTIVES, "mine", mine)
    _, (table,) = _tables(tmp_path, methods=("music", "vicreg", "mine"))
    assert [row["series"] for row in table["rows"]][:3] == ["music", "vicreg", "mine"]
    pairs = [(t["a"]["series"], t["b"]["series"]) for t in table["tests"] if t["family"] == "mine"]
    assert pairs == [("mine", "music"), ("mine", "vicreg")]
    assert "mine minus vicreg, linear: " in "\n".join(report.findings(table))


@pytest.mark.parametrize(
    ("difference", "verdict"), [(0.0, "equivalent"), (0.05, "equivalence not shown")]
)
def test_depths_are_tested_for_equivalence_with_the_chosen_one(tmp_path, difference, verdict):
    def accuracy(cell):
        return 0.9 - difference * len(cell.fields["projector.hidden_sizes"])

    options = {"methods": _FEW, "claims": (2,), "seeds": 5, "budget": "full"}
    sweep, _ = _tables(tmp_path, accuracy=accuracy, **options)
    for point in make_plan(sweep).points:
        for cell in point.cells:
            noise = 1e-4 * cell.index * (1 + len(cell.group))
            faked.finish(sweep, cell, accuracy, linear_top1=accuracy(cell) + noise)
    (table,) = make_tables(faked.make_sweep(tmp_path, **options))
    tests = table["tests"]
    assert len(tests) == 3 * 2
    assert all(test["kind"] == "equivalence" for test in tests)
    assert {test["verdict"] for test in tests} == {verdict}
    assert all((abs(test["mean"]) < MARGIN) == (difference == 0) for test in tests)


def test_batches_and_starts_are_compared_with_the_ordinary_ones(tmp_path):
    _, (batches, starts) = _tables(tmp_path, methods=_FEW, claims=(4, 5), budget="full")
    for test in batches["tests"]:
        assert test["b"]["x"] == 256
        assert test["a"]["group"] == test["b"]["group"]
    assert len(batches["tests"]) == 3 * 2 * 3
    assert {test["family"] for test in batches["tests"]} == set(_FEW)  # at equal epochs and steps
    assert {test["b"]["x"] for test in starts["tests"]} == {"random"}
    assert len(starts["tests"]) == 3 * 2
    assert len({row["x"] for row in starts["rows"]}) == 3
    # All methods start from states of one head, which may not be the one that was searched.
    heads = {(row["choice"]["depth"], row["choice"]["dimension"]) for row in starts["rows"]}
    assert heads == {(1, 512)}
    assert {row["validation_top1"] for row in starts["rows"]} == {None}


def test_a_page_is_written_with_plots(tmp_path, monkeypatch):
    local = ["--worker=0/2", "--runs", "/r", "--output=/o", "--tables_only"]
    monkeypatch.setattr("sys.argv", ["claims", "--config=configs/fashion_mnist.py", *local])
    more = {"segment_information": 0.4, "null_information": 0.1, "null_p": 0.01}
    more |= {"factors": ["shape", "hue"], "factor_nmi": [[0.1, 0.9], [0.1, 0.8], [0.3, 0.2]]}
    sweep, tables = _tables(tmp_path, methods=_FEW, claims=(1, 2, 4, 6), more=more)
    report.write_report(sweep, tables, sweep.results.directory)
    text = (tmp_path / "claims.md").read_text()
    assert "`python -m music_jax.claims --config=configs/fashion_mnist.py`: " in text
    assert "Not complete" not in text
    assert "music minus barlow twins, linear: " in text
    assert "hue 67 %, shape 33 % of the segments; 2.0 of 2 factors in a run" in text
    assert "music at batch size 1024, equal steps minus music at batch size 256" in text
    for number in (1, 2, 4, 6):
        assert (tmp_path / f"claim-{number}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "claims.json").read_text())["claims"] == json.loads(
        json.dumps(tables)
    )
    lines = (tmp_path / "claims.csv").read_text().splitlines()
    assert lines[0] == "claim,series,group,x,seeds,diverged,measure,mean,half_width_95"
    assert any(line.startswith("1,music,,,4,0,linear_top1,0.") for line in lines)
    assert "music minus barlow twins" in report.as_text(tables)


def test_what_is_missing_or_diverged_is_shown(tmp_path):
    sweep = faked.make_sweep(tmp_path, methods=("vicreg",))
    (table,) = make_tables(sweep)
    assert "Not complete: 5 of 5 rows lack seeds." in report.findings(table)
    faked.finish_all(sweep)
    cell = next(c for c in make_plan(sweep).cells if c.name == "final/vicreg/00")
    sweep.results.write(cell, {"core_seconds": 1.0, "diverged": "at step 7"}, {})
    (table,) = make_tables(faked.make_sweep(tmp_path, methods=("vicreg",)))
    row = table["rows"][0]
    assert (row["seeds"], row["diverged"], len(row["measures"]["linear_top1"]["values"])) == (
        4,
        1,
        3,
    )
    assert "4/4, 1 diverged" in report.as_text([table])
