"""`configs/imagenet.py` from the tars to the probe, smaller than `imagenet_run.py` runs it."""

import math

import pytest
from imagenet_run import NUM_STEPS, NUM_TRAIN, NUM_VALIDATION, train
from processes import checkpoint, metrics


@pytest.mark.slow
def test_the_imagenet_recipe_goes_from_the_tars_to_the_probe_and_on_after_a_stop(tmp_path):
    seen = train(
        tmp_path,
        "--config.crop.size=64",
        "--config.crop.eval_resize=72",
        "--config.projector.hidden_sizes=(64,)",
        timeout=500,
    )
    assert 6 <= seen["stopped"] < NUM_STEPS
    assert f"after step {seen['stopped']}" in seen["output"]
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert all(math.isfinite(line["loss"]) for line in lines)
    probe = seen["linear_eval"]
    assert (probe["num_train"], probe["num_test"], probe["step"]) == (
        NUM_TRAIN,
        NUM_VALIDATION,
        NUM_STEPS,
    )
    shapes = {value.shape for value in checkpoint(tmp_path / "run", NUM_STEPS).values()}
    assert (64, 102 * 80) in shapes
    assert not (tmp_path / "run" / "skipped.jsonl").exists()
