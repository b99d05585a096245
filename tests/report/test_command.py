"""`python -m music_jax.report` as a process: on a real network and images, and on wrong input."""

import cv2
import numpy as np
import pytest
from processes import run
from small_runs import save_run, small_config

from tests.report.reports import data_of, write_workdir

_REPORT = "music_jax.report"


def _write_images(root, count=12):
    rng = np.random.default_rng(0)
    for name in ("<b>a</b>".replace("/", "&"), "b"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(256, size=(40, 31, 3), dtype=np.uint8)
            cv2.imwrite(str(root / name / f"{i}.png"), image)


@pytest.mark.slow
def test_runs_with_and_without_images_and_segments(tmp_path):
    images = tmp_path / "images"
    _write_images(images)
    (images / "b" / "broken.png").write_bytes(b"no image")
    config = small_config()
    config.dataset.update({"path": str(images), "max_skipped_share": 0.5})
    config.evaluation.test = str(images)
    save_run(tmp_path / "music", config)
    config.objective.name = "vicreg"
    config.projector.output_size = 24
    save_run(tmp_path / "vicreg", config)
    config.dataset.path = str(tmp_path / "gone")
    save_run(tmp_path / "gone", config)
    workdirs = ",".join(str(tmp_path / name) for name in ("music", "vicreg", "gone"))
    output = tmp_path / "out" / "report.html"
    code, out, err = run(_REPORT, f"--workdir={workdirs}", f"--output={output}", "--images=16")
    assert code == 0, err
    assert f"wrote {output}" in out
    assert "gone: no images are shown" in out
    text = output.read_text()
    music, vicreg, gone = data_of(text)["runs"]
    assert 14 <= music["images"]["count"] <= 16
    assert music["classes"] == ["<b>a<&b>", "b"]
    assert music["segments"]["joint"]["levels"].shape == (30, 30)
    assert music["maps"].keys() == {"embedding", "features"}
    assert music["maps"]["features"].shape == (music["images"]["count"], 2)
    assert music["views"]["count"] == 6
    assert vicreg["segments"] is None
    assert vicreg["neighbors"]["rows"].shape == (vicreg["images"]["count"], 8)
    assert "images" not in gone
    assert music["images"]["sprite"] == vicreg["images"]["sprite"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--workdir=DIR is missing"),
        (("--workdir=,",), "--workdir=DIR is missing"),
        (("--workdir={tmp}/run", "--images=3"), "--images must be from 16 to 4000; got 3"),
        (("--workdir={tmp}/run,{tmp}/nowhere",), "nowhere does not exist"),
        (("--workdir={tmp}",), "holds no run"),
        (("--workdir={tmp}/run", "--output={tmp}"), "is a directory; name a file in it"),
        (("--workdir={tmp}/run", "--protocols=knn"), "protocols"),
        (("--workdir={tmp}/run", "--config.seed=5"), "config.seed cannot change after training"),
    ],
)
def test_wrong_input_gives_exit_code_2_and_one_line(arguments, message, tmp_path):
    write_workdir(tmp_path / "run")
    code, out, err = run(_REPORT, *(a.format(tmp=tmp_path) for a in arguments))
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err + out
    assert len(err.strip().splitlines()) == 1
