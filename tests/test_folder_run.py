"""`python -m music_jax.main` on a folder of mixed and partly broken files, as a user runs it."""

import json

import pytest
from mixed_images import write_mixed, write_odd
from processes import ROOT, metrics, run

_FOLDER = (
    f"--config={ROOT / 'configs' / 'folder.py'}",
    "--config.batch_size=32",
    "--config.num_epochs=2",
    "--config.optimizer.warmup_epochs=1",
    "--config.compute_dtype=float32",
    "--config.tensorboard=false",
    "--config.objective.num_segments=8",
    "--config.objective.units_per_segment=8",
    "--config.projector.hidden_sizes=()",
    "--config.backbone.name=small_resnet",
    "--config.crop.size=32",
    "--config.crop.eval_resize=36",
    "--config.linear_eval.num_epochs=2",
    "--config.linear_eval.batch_size=32",
    "--config.linear_eval.base_learning_rates=(0.1, 0.3)",
    "--config.linear_eval.feature_scaling=whiten",
)


def _skipped(workdir):
    return [json.loads(line) for line in (workdir / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_folder_with_broken_files_is_trained_on_and_probed_and_every_one_is_listed(tmp_path):
    broken = write_mixed(tmp_path / "train", 896, broken_every=23)
    broken |= write_odd(tmp_path / "train", 104)
    assert len([p for p in (tmp_path / "train").rglob("*") if not p.is_dir()]) == 1006
    broken_test = write_mixed(tmp_path / "test", 60, broken_every=29, seed=1)
    workdir = tmp_path / "run"
    arguments = (
        "music_jax.main",
        *_FOLDER,
        f"--config.dataset.path={tmp_path / 'train'}",
        f"--config.evaluation.test={tmp_path / 'test'}",
        f"--workdir={workdir}",
    )
    code, out, err = run(*arguments)
    assert code == 0, err
    assert metrics(workdir)[-1]["step"] == 62
    lines = _skipped(workdir)
    found = {(line["source"].rpartition("/")[2], line["image"]) for line in lines}
    assert found == {("train", n) for n in broken} | {("test", n) for n in broken_test}
    assert len(lines) == len(found)
    assert f"{len(broken)} of {tmp_path / 'train'}" in out
    linear = json.loads((workdir / "linear_eval.json").read_text())
    assert linear["num_test"] == 60 - len(broken_test)
    assert linear["top1"] > 0.9  # dark or bright

    code, out, err = run(*arguments)
    assert (code, _skipped(workdir)) == (0, lines), err
    assert "is done: 62 steps" in out


@pytest.mark.slow
def test_an_unlabeled_folder_is_trained_on_and_not_probed(tmp_path):
    write_mixed(tmp_path / "photos", 40, broken_every=100)
    for i, path in enumerate(sorted((tmp_path / "photos").rglob("*.*"))):
        path.rename(tmp_path / "photos" / f"{i}{path.suffix}")
    arguments = (
        "music_jax.main",
        *_FOLDER,
        f"--config.dataset.path={tmp_path / 'photos'}",
        f"--workdir={tmp_path / 'run'}",
    )
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "no labels" in out
    assert "not probed" in out
    assert not (tmp_path / "run" / "linear_eval.json").exists()
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "is done: 2 steps trained" in out

    evaluate = ("music_jax.evaluate", f"--workdir={tmp_path / 'run'}")
    code, out, err = run(*evaluate, "--protocols=knn,label_free,segments")
    assert code == 0, err
    assert "not measured: knn: there are no images to test with; name labeled images" in out
    found = json.loads((tmp_path / "run" / "label_free.json").read_text())
    assert (found["num_images"], found["features"]["size"] > 0) == (40, True)
    assert found["data"] == {"images": str(tmp_path / "photos")}
    assert (tmp_path / "run" / "segments.json").exists()
    code, _, err = run(*evaluate, "--protocols=linear,knn")
    assert code == 2
    assert "nothing can be measured: linear, knn: there are no images to test with" in err


@pytest.mark.slow
def test_more_broken_files_than_allowed_end_the_run_with_exit_code_3(tmp_path):
    write_mixed(tmp_path / "photos", 80, broken_every=4)
    arguments = (
        "music_jax.main",
        *_FOLDER,
        f"--config.dataset.path={tmp_path / 'photos'}",
        f"--workdir={tmp_path / 'run'}",
    )

    def run_for_the_share(share, *more):
        code, out, err = run(*arguments, *more)
        assert code == 3, err
        line = err.splitlines()[-1]
        assert "of the 80 images of" in line
        assert f"max_skipped_share = {share}" in line
        assert "skipped.jsonl" in line
        assert "Traceback" not in err + out

    run_for_the_share("0.1")
    code, _, err = run(*arguments, "--config.dataset.max_skipped_share=0.3")
    assert code == 0, err
    run_for_the_share("0.2", "--config.dataset.max_skipped_share=0.2")  # though all is trained


@pytest.mark.slow
def test_a_probe_on_random_crops_ends_on_devices_that_share_the_cores(tmp_path):
    """Steps that had begun took each other's threads, and waited forever."""
    images = tmp_path / "train"
    write_mixed(images, 512, broken_every=1000)
    code, out, err = run(
        "music_jax.main",
        *_FOLDER,
        "--config.num_epochs=1",
        "--config.optimizer.warmup_epochs=0",
        "--config.crop.size=64",
        "--config.crop.eval_resize=73",
        "--config.linear_eval.base_learning_rates=(0.1,)",
        "--config.linear_eval.batch_size=256",
        "--config.linear_eval.num_epochs=50",
        f"--config.dataset.path={images}",
        f"--config.evaluation.train={images}",
        f"--config.evaluation.test={images}",
        f"--workdir={tmp_path / 'run'}",
        devices=2,
    )
    assert code == 0, err[-2000:]
    assert "devices      2 x cpu" in out
