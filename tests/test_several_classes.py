"""Training on, evaluating and reporting a TFDS dataset whose images have several classes."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from processes import DIGITS, run
from tfds_sets import LABELS, write_set


def _digit_tags(digits):
    return [[int(digit % 2), *([2] if digit > 4 else [])] for digit in digits]


@pytest.mark.slow
def test_a_run_on_images_of_several_classes_is_probed_evaluated_and_reported(tmp_path):
    names = tfds.features.ClassLabel(names=["even", "odd", "large"])
    splits = {"train": _digit_tags(LABELS[:160]), "test": _digit_tags(LABELS[:80])}
    write_set(tmp_path, "tags", splits, tfds.features.Sequence(names))
    workdir = tmp_path / "run"
    arguments = (
        "music_jax.main",
        DIGITS,
        "--config.dataset.name=tags",
        f"--config.dataset.data_dir={tmp_path}",
        "--config.batch_size=40",
        "--config.num_epochs=2",
        "--config.optimizer.warmup_epochs=1",
        "--config.linear_eval.num_epochs=20",
        "--config.linear_eval.batch_size=16",
        "--config.online_probe.enabled=true",
        "--config.tensorboard=false",
        f"--workdir={workdir}",
    )
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "the online probe is off" in out
    assert "linear mAP" in out
    linear = json.loads((workdir / "linear_eval.json").read_text())
    assert list(linear["average_precision_by_class"]) == ["even", "odd", "large"]
    assert linear["raw_pixels_mean_average_precision"] > 0.9
    tags = np.asarray([[0 in x, 1 in x, 2 in x] for x in splits["test"]])
    assert linear["chance_mean_average_precision"] == pytest.approx(tags.mean())
    code, out, err = run(*arguments)
    assert (code, "is done: 8 steps trained and evaluated" in out) == (0, True), err

    evaluate = ("music_jax.evaluate", f"--workdir={workdir}")
    code, out, err = run(
        *evaluate, "--protocols=knn,fewshot,transfer", "--transfer=tags:train:test"
    )
    assert code == 0, err
    assert "not measured: fewshot: the images of tags:train may have several classes each" in out
    transfer = json.loads((workdir / "transfer.json").read_text())["by_dataset"]
    assert transfer["tags:train:test"]["linear"]["num_test"] == 80
    code, _, err = run(*evaluate, "--protocols=retrieval")
    assert code == 2
    assert "nothing can be measured: retrieval: the images of tags:train may have" in err
    data = "--config.dataset.label_key=label,label", f"--config.dataset.data_dir={tmp_path}"
    code, _, err = run("music_jax.claims", DIGITS, *data, f"--output={tmp_path / 'claims'}")
    assert code == 2
    assert "the images of digits may have several classes each; the claims need one class" in err
    code, _, err = run("music_jax.report", f"--workdir={workdir}")
    assert code == 0, err
    assert "linear mAP, %" in (workdir / "report.html").read_text()
    card = ("music_jax.export", f"--workdir={workdir}", "--format=safetensors")
    code, _, err = run(*card, f"--output={tmp_path / 'out' / 'model.safetensors'}")
    assert code == 0, err
