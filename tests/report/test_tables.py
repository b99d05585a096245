"""Tables of the report: each value is in its row."""

import json
import types

import pytest

from music_jax.report import tables
from music_jax.report.reading import read_workdirs
from tests.report.reports import write_workdir


def test_a_step_that_is_no_number_does_not_count_as_stale():
    run = types.SimpleNamespace(
        results={"knn": {"step": [3]}, "linear": {"step": 5}, "few": {}}, last_step=7
    )
    assert tables.stale_results(run) == "measured at step 5; the last logged step is 7"


def test_the_cost_adds_up_the_timed_steps(tmp_path):
    """Of 30 steps of 32 images, the first is not timed; one has online measures of 2 s."""
    path = write_workdir(tmp_path / "run")
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[9] = json.dumps(json.loads(lines[9]) | {"online_seconds": 2.0})
    lines[19] = json.dumps(json.loads(lines[19]) | {"images_per_second": None})  # resumed
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run,) = read_workdirs([str(path)])
    cost = tables.cost(run)
    assert (cost.steps, cost.images, cost.devices) == (28, 28 * 32, 2)
    assert cost.seconds == pytest.approx(28 * 32 / 640 + 2)
    facts = tables.facts(run, None)
    assert facts["wall time"] == "3.4 s for 28 of 30 steps"
    assert facts["cost"] == "6.8 s of device time, 896 images"
    assert "263.5 images / s, 131.8 on each of 2" in facts["throughput"]
    run.metrics.clear()
    assert tables.cost(run) is None
    assert "cost" not in tables.facts(run, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1234, "0.123 s"), (59, "59 s"), (192, "3 min 12 s"), (7260, "2 h 1 min")],
)
def test_durations_are_readable(seconds, text):
    assert tables.duration(seconds) == text
