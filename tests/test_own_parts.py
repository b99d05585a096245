"""A user's backbone, objective and dataset, from modules that are installed nowhere."""

import json
import re

import numpy as np
import pytest
from own_parts import CONFIG, IMPORT, examples, write_examples
from processes import metrics, start

_LOAD = """
import sys
import numpy as np
import music_jax
from music_jax.errors import UserError
images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), np.uint8)
try:
    music_jax.load(sys.argv[1])
    raise SystemExit("loaded")
except UserError as error:
    assert "--import=MODULE" in str(error) and "'patches'" in str(error), error
import my_backbone
features = music_jax.load(sys.argv[1])(images)
assert features.shape == (5, 24)
np.testing.assert_array_equal(features, music_jax.load(sys.argv[2])(images))
assert not {"my_objective", "my_dataset"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("modules"))


def _run(modules, module, *arguments):
    process = start(module, *arguments, env={"PYTHONPATH": modules})
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, modules):
    path = tmp_path_factory.mktemp("run")
    code, _, err = _run(modules, "music_jax.main", IMPORT, *CONFIG, f"--workdir={path}")
    assert code == 0, err
    return path


def test_the_examples_are_short():
    code = examples()
    assert sorted(code) == ["my_backbone", "my_dataset", "my_objective", "my_protocol"]
    assert all(len(text.splitlines()) < 20 for text in code.values())


@pytest.mark.slow
def test_all_three_train_and_are_probed(workdir):
    last = metrics(workdir)[-1]
    assert last["step"] == 6
    assert last["loss"] == pytest.approx(last["alignment"] + last["uniformity"], abs=1e-5)
    result = json.loads((workdir / "linear_eval.json").read_text())
    assert (result["num_train"], result["num_test"]) == (96, 96)
    saved = json.loads((workdir / "config.json").read_text())["config"]
    assert saved["backbone"]["options"] == {"width": 24}


@pytest.mark.slow
def test_the_protocol_measures_the_run(workdir, modules):
    code, out, err = _run(modules, "my_protocol", workdir)
    assert code == 0, err
    accuracy = re.fullmatch(r"nearest class mean: (\d\.\d{3})", out.strip().splitlines()[-1])
    assert 0 < float(accuracy[1]) <= 1


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(workdir, modules):
    code, out, err = _run(modules, "music_jax.main", IMPORT, *CONFIG, f"--workdir={workdir}")
    assert code == 0, err
    assert "is done: 6 steps trained and evaluated" in out
    wider = (*CONFIG, "--config.backbone.options={'width': 32}")
    code, _, err = _run(modules, "music_jax.main", IMPORT, *wider, f"--workdir={workdir}")
    assert code == 2
    assert "backbone.options: {'width': 24} there, {'width': 32} now" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("evaluate", ("--workdir={run}", "--protocols=knn", "--output={new}")),
        ("linear_eval", ("--workdir={run}",)),
        ("export", ("--workdir={run}", "--format=stablehlo", "--output={new}")),
        ("export", ("--workdir={run}", "--format=orbax", "--output={new}")),
        ("export", ("--workdir={run}", "--format=safetensors", "--output={new}")),
        ("encode", ("--workdir={run}", "--images={images}", "--output={new}.npy")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_commands_need_the_module_and_say_so(command, arguments, workdir, modules, tmp_path):
    import cv2

    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((16, 16), np.uint8))
    places = {"run": workdir, "new": tmp_path / "new", "images": tmp_path / "images"}
    arguments = [argument.format(**places) for argument in arguments]
    code, _, err = _run(modules, f"music_jax.{command}", *arguments)
    assert code == 2, err
    assert "--import=MODULE" in err
    assert len(err.strip().splitlines()) == 1
    code, _, err = _run(modules, f"music_jax.{command}", IMPORT, *arguments)
    assert code == 0, err


@pytest.mark.slow
def test_the_backbone_alone_suffices_to_load_and_evaluate(workdir, modules, tmp_path):
    exported = tmp_path / "backbone.safetensors"
    code, _, err = _run(
        modules,
        "music_jax.export",
        "--import=my_backbone",
        f"--workdir={workdir}",
        "--format=safetensors",
        f"--output={exported}",
    )
    assert code == 0, err
    (tmp_path / "load.py").write_text(_LOAD)
    code, _, err = _run(f"{modules}:{tmp_path}", "load", workdir, exported)
    assert code == 0, err
    sets = ("--config.evaluation.train=digits:train", "--config.evaluation.test=digits:test")
    code, _, err = _run(
        modules,
        "music_jax.evaluate",
        "--import=my_backbone",
        f"--workdir={workdir}",
        "--protocols=knn",
        f"--output={tmp_path / 'knn'}",
        *sets,
    )
    assert code == 0, err


@pytest.mark.slow
def test_report_shows_what_needs_no_module(workdir, modules):
    code, out, err = _run(modules, "music_jax.report", f"--workdir={workdir}")
    assert code == 0, err
    assert "uniformity" in (workdir / "report.html").read_text()
    code, out, err = _run(modules, "music_jax.report", IMPORT, f"--workdir={workdir}")
    assert code == 0, err
    assert "no images" not in out


def test_a_module_that_is_absent_or_fails_is_one_clear_error(modules, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for name, expected in (("absent", "no such module"), ("broken", "ZeroDivisionError")):
        code, _, err = _run(
            f"{modules}:{tmp_path}", "music_jax.evaluate", f"--import={name}", "--workdir=x"
        )
        assert code == 2, err
        assert expected in err
        assert len(err.strip().splitlines()) == 1
