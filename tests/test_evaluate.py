"""`python -m music_jax.evaluate` on a small run, as a process."""

import json

import numpy as np
import pytest
from processes import DIGITS, SMALL, run

_EVALUATE = "music_jax.evaluate"
_FEATURES = "knn,fewshot,retrieval,clustering,label_free,segments"
_FEW = (
    "--config.evaluation.view_images=64",
    "--config.evaluation.num_views=3",
    "--config.few_shot.draws=3",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"--config.dataset.data_dir={tmp_path_factory.mktemp('tfds')}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of 22 steps."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    code, _, err = run("music_jax.main", DIGITS, *SMALL, data, f"--workdir={workdir}")
    assert code == 0, err
    return workdir


def _evaluate(workdir, protocols, *more, devices=1):
    arguments = (f"--workdir={workdir}", f"--protocols={protocols}", *_FEW, *more)
    code, out, err = run(_EVALUATE, *arguments, devices=devices)
    assert code == 0, err
    return out


def _figures(workdir, protocols=_FEATURES):
    return {
        name: json.loads((workdir / f"{name}.json").read_text()) for name in protocols.split(",")
    }


@pytest.mark.slow
def test_each_protocol_writes_the_same_metrics_on_one_and_two_devices(finished):
    found = []
    for devices in (1, 2):
        out = _evaluate(finished, _FEATURES, "--force", devices=devices)
        assert ("features of" in out) is False  # which is the progress bar's, on standard error
        found.append(_figures(finished))
        for path in (finished / "features").iterdir():
            path.unlink()
    one, two = found
    for name, figures in one.items():
        assert figures["protocol"] == name
        assert (figures["step"], figures["seed"]) == (22, 0)
        assert figures["data"]
        assert figures["hyper_parameters"]["evaluation"]["num_views"] == 3
        _close(figures, two[name])
    knn = one["knn"]
    assert (knn["num_train"], knn["num_test"]) == (1437, 360)  # no remainder is left out
    assert knn["top1_by_k"].keys() == {"10", "20", "200"}
    assert knn["top1_by_k"]["20"] == knn["top1"]
    shots = one["fewshot"]["top1_by_shots"]
    assert shots["1"]["top1"] < shots["10"]["top1"]
    assert 0.1 < one["retrieval"]["map"] < 1
    clustering = one["clustering"]
    assert clustering["chosen_segment"]["accuracy"] <= clustering["oracle_segment"]["accuracy"]
    assert len(clustering["segments"]) == 32
    assert 1 < one["label_free"]["embeddings"]["lidar"] < 64
    segments = one["segments"]
    assert np.asarray(segments["mutual_information_matrix"]).shape == (32, 32)
    assert 0 < segments["gap_to_bound"]["total"] < 3 * segments["log_units"]


def _close(a, b, path=""):
    """Checks that all metrics are equal up to rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            _close(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        for i, pair in enumerate(zip(a, b, strict=True)):
            _close(*pair, f"{path}[{i}]")
    elif isinstance(a, float):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-3, err_msg=path)
    else:
        assert a == b, path


@pytest.mark.slow
def test_results_are_reused_unless_the_protocol_differs(finished):
    _evaluate(finished, "knn")
    before = (finished / "knn.json").stat().st_mtime_ns
    assert "using the existing result" in _evaluate(finished, "knn")
    assert (finished / "knn.json").stat().st_mtime_ns == before
    out = _evaluate(finished, "knn", "--config.knn.more_k=(3,)")
    assert "using the existing result" not in out
    assert "k = 3 " in out


@pytest.mark.slow
def test_fine_tuning_and_transfer(finished, data, tmp_path):
    """On a list of images, on shares of the labels, on all, and on another dataset."""
    out = _evaluate(
        finished,
        "semi,finetune,transfer",
        "--transfer=mnist5k:train[:400]:test[:200]",
        "--config.finetune.num_epochs=3",
        "--config.finetune.backbone_learning_rate=0.05",
        "--config.semi_supervised.num_epochs=3",
        "--config.linear_eval.num_epochs=3",
        devices=2,
    )
    found = _figures(finished, "semi,finetune,transfer")
    shares = found["semi"]["by_share"]
    assert (shares["1 %"]["num_train"], shares["10 %"]["num_train"]) == (10, 142)  # of each class
    assert shares["1 %"]["num_test"] == found["finetune"]["num_test"] == 360
    assert found["finetune"]["num_train"] == 1437
    assert found["finetune"]["top1"] > max(0.5, shares["1 %"]["top1"])
    there = found["transfer"]["by_dataset"]["mnist5k:train[:400]:test[:200]"]
    assert (there["linear"]["num_train"], there["knn"]["num_test"]) == (400, 200)
    assert there["knn"]["top1"] > 0.3
    assert "mnist5k:train[:400]:test[:200]: linear top-1" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--workdir is missing"),
        (("--workdir={tmp}", "--protocols=knm"), "unknown protocol 'knm'; did you mean 'knn'?"),
        (("--workdir={tmp}", "--protocols="), "name some of linear"),
        (("--workdir={tmp}", "--protocols=transfer"), "--transfer=NAME:TRAIN:TEST"),
        (("--workdir={tmp}", "--transfer=cifar10"), "expected NAME:TRAIN:TEST"),
        (("--workdir={tmp}/nowhere",), "does not exist"),
        (("--workdir={tmp}",), "holds no run"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_code_2(arguments, message, tmp_path):
    code, out, err = run(_EVALUATE, *(a.format(tmp=tmp_path) for a in arguments))
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err + out


def test_help_names_every_protocol():
    code, out, _ = run(_EVALUATE, "--help")
    assert code == 0
    for text in (*_FEATURES.split(","), "linear", "semi", "finetune", "--transfer", "Exit codes"):
        assert text in out
