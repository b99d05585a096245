"""Estimates from the costs of a step, compared with sums by hand."""

import dataclasses
import json

import pytest

from music_jax.plan import report
from music_jax.plan.costs import StepCost

# A v5e chip does 197 TFLOP/s, 819 GB/s of HBM and 200 GB/s of network over four links, of which one
# in a corner of 4 x 8 chips has two.
_COST = StepCost(
    chips=32,
    batch_size=2048,
    fits=True,
    hbm_available_bytes=16.9e9,
    hbm_needed_bytes=5.5e9,
    argument_bytes=0.9e9,
    temporary_bytes=4.6e9,
    flops=1.97e12,
    hbm_traffic_bytes=81.9e9,
    hbm_only_bytes=40.95e9,
    received_bytes=2e9,
    collective_bytes={"all-reduce": 1e9},
    objective_flops=0.0197e12,
    compile_seconds=130.0,
)
_TWO_SLICES = {"slices": 2, "chips": 64, "dcn_bytes": 0.5e9, "dcn_transfers": 110}
_TOO_LARGE = StepCost(
    chips=4, batch_size=4096, fits=False, hbm_available_bytes=16.9e9, hbm_needed_bytes=50e9
)


def _plan(cost, topology="v5e:4x8"):
    return report.make_plan(
        topology, cost, num_images=20_481, num_epochs=100, decode_rate=320.0, host_bytes=10**9
    )


def test_times_at_the_published_peaks():
    written = _plan(_COST)
    peak_seconds = {"compute": 0.01, "hbm": 0.1, "network": 0.02}
    assert written["seconds_at_peak"] == pytest.approx(peak_seconds)
    assert written["bound"] == "hbm"
    assert written["seconds_per_step"] == pytest.approx(0.1)
    assert written["least_seconds_per_step"] == pytest.approx(0.05)
    assert written["images_per_second"] == pytest.approx(640)  # a chip: 64 images in 0.1 s
    assert written["decode_cores"] == pytest.approx(2)
    assert written["decode_rate"] == 320
    assert written["peaks_per_second"] == {"compute": 197e12, "hbm": 819e9, "network": 100e9}
    assert written["hbm_free_bytes"] == pytest.approx(11.4e9)
    assert written["seconds_per_epoch"] == pytest.approx(1)  # 10 whole batches of 2,048
    assert written["seconds_per_run"] == pytest.approx(100)


def test_unknown_values_are_blank():
    unread = {"received_bytes": None, "hbm_only_bytes": None, "objective_flops": None}
    unread = dataclasses.replace(_COST, **unread, collective_bytes={})
    plans = [_plan(_COST), _plan(unread)]
    lines = {line[:27].strip(): line[27:].split() for line in report.table(plans).splitlines()}
    for name in ("received from other chips", "by all-reduce", "network", "a step, lower bound"):
        assert len([cell for cell in lines[name] if cell[0] in "~0123456789"]) == 1, lines[name]
    assert plans[1]["least_seconds_per_step"] is None


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [("flops", 197e12, "compute"), ("received_bytes", 100e9, "network")],
)
def test_the_slowest_resource_is_the_bottleneck(field, value, bound):
    plan = _plan(dataclasses.replace(_COST, **{field: value}))
    assert plan["bound"] == bound
    assert plan["seconds_per_step"] == pytest.approx(1.0)


def test_several_slices_have_a_network_of_their_own():
    # 25 Gb/s a chip between slices.
    one, two = (_plan(dataclasses.replace(_COST, **fields)) for fields in ({}, _TWO_SLICES))
    assert two["seconds_at_peak"]["dcn"] == pytest.approx(0.16)
    assert two["bound"] == "dcn"
    assert two["least_seconds_per_step"] == two["seconds_per_step"] == pytest.approx(0.16)
    assert "dcn" not in one["seconds_at_peak"]
    lines = report.table([one, two]).splitlines()
    assert lines[0].endswith("v5e:4x8  2 x v5e:4x8")
    rows = {line[:34].strip(): line[34:].split() for line in lines}
    assert rows["of all bytes received"] == ["~20.00%"]
    assert rows["of the bytes accessed"] == ["~0.61%"]
    assert rows["transfers"] == ["~110"]
    assert report.notes([one]).count("dcn") == 0 < report.notes([two]).count("dcn")


def test_json_has_the_documented_fields_whether_it_fits_or_not():
    documented = {
        "topology", "chips", "batch_size", "argument_bytes", "temporary_bytes",
        "hbm_available_bytes", "flops", "hbm_traffic_bytes", "collective_bytes", "objective_flops",
        "bound", "seconds_per_step", "images_per_second", "compile_seconds",
    }  # fmt: skip
    fitting, not_fitting = (_plan(cost) for cost in (_COST, _TOO_LARGE))
    assert documented <= fitting.keys() == not_fitting.keys()
    assert not any(fitting[name] is None for name in documented)
    assert not_fitting["fits"] is False
    assert not_fitting["bound"] is not_fitting["seconds_per_step"] is None
    json.dumps([fitting, not_fitting], allow_nan=False)


def test_the_table_has_a_column_per_topology_and_marks_those_that_do_not_fit():
    plans = [_plan(_COST), _plan(_TOO_LARGE, "v5e:2x2")]
    rows = {line.split("  ")[0]: line.split() for line in report.table(plans).splitlines()}
    assert rows["per chip and step"][-2:] == ["v5e:4x8", "v5e:2x2"]
    assert rows["needed at the peak"][4:] == ["5.50", "GB", "50.00", "GB"]
    assert rows["free"][1:] == ["11.40", "GB"]
    assert rows["peak compute"][2:] == ["197", "TFLOP"] * 2
    assert rows["bottleneck"][-1] == "hbm"
    assert rows["a step, estimate"][-2:] == ["100", "ms"]
    assert rows["a step, lower bound"][-2:] == ["50", "ms"]
    assert rows["it fits"][2:] == ["yes", "NO"]
    notes = report.notes(plans)
    assert "v5e:2x2: batch 4096 does not fit: needs 50.00 GB of 16.90 GB" in notes
    assert "cloud.google.com/tpu/docs/v5e" in notes


def test_estimates_are_marked_and_explained():
    estimated = dataclasses.replace(_COST, estimates={"flops": "counted in the program"})
    rows = {
        line.split("  ")[0]: line.split()
        for line in report.table([_plan(_COST), _plan(estimated, "h100:8")]).splitlines()
    }
    assert rows["FLOPs"][1:] == ["1.970", "T", "~1.970", "T"]
    notes = report.notes([_plan(estimated, "h100:8")])
    assert "flops: counted in the program" in notes
    assert "nvidia.com" in notes
