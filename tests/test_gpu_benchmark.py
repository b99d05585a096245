"""The benchmarks for a GPU, at small shapes on the CPU."""

import importlib.util
import json
import os
import subprocess

import pytest
from processes import ROOT


@pytest.mark.slow
def test_the_script_writes_every_part(tmp_path):
    found = tmp_path / "gpu.json"
    done = subprocess.run(
        [ROOT / "tests/benchmarks/gpu.sh", "--small", f"--json={found}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(found.read_text())
    parts = result["parts"]
    assert {part: len(parts[part]["rows"]) for part in parts} == {
        "loss": 4,
        "step": 1,
        "torch_step": 1,
        "operations": 11,
        "deterministic": 11,
    }
    assert [part["reason"] for part in parts.values()] == [None] * 5
    assert all(row["fused_over_products"] > 0 for row in parts["loss"]["rows"])
    assert all(row["images_per_second_a_device"] > 0 for row in parts["step"]["rows"])
    # A CPU is deterministic with and without the flag.
    rows = parts["operations"]["rows"] + parts["deterministic"]["rows"]
    assert all(row.get("equal", True) for row in rows)
    assert len(result["deterministic_over_default"]) == 11
    if importlib.util.find_spec("torch") is None:
        rows = parts["torch_step"]["rows"]
        assert [row["step_ms"] for row in rows] == [None]
        assert all("No module named 'torch'" in row["reason"] for row in rows)
