"""A short campaign of faults; `python tests/faults.py --kills=50` is the full one."""

import faults
import pytest


@pytest.mark.slow
def test_a_few_faults_of_most_kinds_are_survived(tmp_path):
    counts = dict.fromkeys(faults.COUNTS, 0) | {"kills": 2, "stops": 1, "damages": 1, "files": 1}
    results = faults.run_campaign(tmp_path, seed=0, counts=counts)
    assert len(results) == 5
    assert [result["why"] for result in results if not result["survived"]] == []
    # What is done is not done again.
    assert faults.run_campaign(tmp_path, seed=0, counts=counts) == results
