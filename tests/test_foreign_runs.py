"""Run directories that somebody else prepared, in miniature; see `foreign_runs.py`."""

import subprocess
import sys

import pytest
from processes import ROOT


@pytest.mark.slow
def test_no_command_trusts_a_foreign_run():
    campaign = [sys.executable, str(ROOT / "tests" / "foreign_runs.py"), "--count=12", "--seed=7"]
    result = subprocess.run(campaign, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "accepted" in result.stdout
