"""Reading the files of workdirs, also damaged ones."""

import json

import numpy as np
import pytest

from music_jax.errors import UserError
from music_jax.report import tables
from music_jax.report.reading import read_workdirs
from tests.report.reports import write_results, write_workdir


def test_damaged_lines_are_excluded_and_counted(tmp_path):
    path = write_workdir(tmp_path / "run", logged=5)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\n[1]\n{"step": 9, "loss": NaN, "epoch": "x"}\n{"st')
    (path / "events.jsonl").write_bytes(b'\xff\n{"no": 1}\n{"event": {"a": [1]}}\n')
    (path / "skipped.jsonl").write_text("[" * 10_000 + "\n")
    (path / "rewinds.json").write_text('{"rewinds": 3}')
    (run,) = read_workdirs([str(path)])
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4, 5, 9]
    assert len(run.events) == 1
    assert run.skipped == run.rewinds == []
    notes = " | ".join(run.notes)
    for part in (
        "1 damaged lines of metrics.jsonl",
        "2 damaged lines of events.jsonl",
        "1 damaged lines of skipped.jsonl",
        "rewinds.json cannot be read",
    ):
        assert part in notes
    points = tables.points(run, tables.curves([run]))
    assert points["values"][0][-1] is None
    assert run.num_steps is not None
    json.dumps([points, tables.event_details(run.events[0])], allow_nan=False)


def test_numbers_beyond_the_largest_are_left_out(tmp_path):
    path = write_workdir(tmp_path / "run", logged=1)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "online_knn": 1e307, "epoch": 1e-308}\n')
    (run,) = read_workdirs([str(path)])
    points = tables.points(run, tables.curves([run]))
    assert 1e307 in [record.get("online_knn") for record in run.metrics]
    json.dumps(points, allow_nan=False)
    assert run.num_steps is None


def test_an_event_shows_a_value_of_0():
    details = tables.event_details({"event": "rewind", "to_step": 0, "loss": 0.0, "again": False})
    assert details == "to_step 0; loss 0"


def test_predictions_of_another_probe_are_ignored(tmp_path):
    path = write_workdir(tmp_path / "run")
    write_results(path)
    (run,) = read_workdirs([str(path)])
    assert run.predictions is not None
    figures = json.loads((path / "linear_eval.json").read_text())
    for top1 in (0.01, None):
        (path / "linear_eval.json").write_text(json.dumps(figures | {"top1": top1}))
        (run,) = read_workdirs([str(path)])
        assert run.predictions is None
        assert "does not belong to the probe" in run.notes[0]
    for label in (2**31, 10**12, -1):
        values = np.asarray([label])
        arrays = {"indices": np.arange(1), "labels": values, "predictions": values}
        np.savez(path / "linear_eval.npz", **arrays, step=np.asarray(30))
        (run,) = read_workdirs([str(path)])
        assert run.predictions is None
        assert "linear_eval.npz cannot be read: a prediction" in run.notes[0] or label < 0
    np.savez(path / "linear_eval.npz", step=np.asarray([object()]))
    (run,) = read_workdirs([str(path)])
    assert "linear_eval.npz cannot be read" in run.notes[0]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"kernel": np.ones((4, 3))}, "float32"),
        ({"bias": np.asarray([0, np.nan, 0], np.float32)}, "finite"),
        ({"bias": np.ones(4, np.float32)}, "shape"),
        ({"kernel": np.ones((0, 3), np.float32)}, "shape"),
        ({"step": np.asarray(30.5)}, "integer"),
    ],
)
def test_a_damaged_classifier_is_ignored_with_a_note(changed, reason, tmp_path):
    path = write_workdir(tmp_path / "run")
    kernel, bias = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    arrays = {"kernel": kernel, "bias": bias, "step": np.asarray(30)}
    np.savez(path / "linear_classifier.npz", **arrays | changed)
    (run,) = read_workdirs([str(path)])
    if reason is None:
        assert run.classifier.step == 30
        np.testing.assert_array_equal(run.classifier.kernel, kernel)
    else:
        assert run.classifier is None
        assert "linear_classifier.npz cannot be read" in run.notes[0]
        assert reason in run.notes[0]


def test_long_curves_are_thinned_and_keep_both_ends(tmp_path):
    path = write_workdir(tmp_path / "run", steps=5000, logged=5000)
    (run,) = read_workdirs([str(path)])
    steps = tables.points(run, tables.curves([run]))["step"]
    assert len(steps) == 1000
    assert (steps[0], steps[-1]) == (1, 5000)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines.insert(0, {"step": 0, "epoch": 0.0})
    for line in lines[::77]:
        line |= {"online_knn": 0.5, "online_seconds": 1.0}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = read_workdirs([str(path)])
    curves = tables.curves([run])
    found = tables.points(run, curves)
    drawn = found["values"][[curve.name for curve in curves].index("online_knn")]
    measured = [x for x, y in zip(found["step"], drawn, strict=True) if y == 50]
    assert measured == [*range(0, 5001, 77)]
    assert "online_seconds" not in [curve.name for curve in curves]


def test_workdirs_with_the_same_name_get_longer_names(tmp_path):
    paths = [write_workdir(tmp_path / parent / "run") for parent in ("a", "b")]
    assert [run.name for run in read_workdirs([str(p) for p in paths])] == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["empty"], "holds no run"),
        (["run", "run/"], "named twice"),
        (["broken"], "cannot read"),
    ],
)
def test_wrong_workdirs_are_rejected(names, message, tmp_path):
    (tmp_path / "empty").mkdir()
    write_workdir(tmp_path / "run")
    (write_workdir(tmp_path / "broken") / "config.json").write_text("{")
    with pytest.raises(UserError, match=message):
        read_workdirs([str(tmp_path / name) for name in names])
