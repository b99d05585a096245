"""Run directories: opening them, and names that cannot be used."""

import os
import subprocess
import sys
import time

import pytest
from etils import epath
from small_runs import save_run, small_config

from music_jax.checkpoint.manager import Checkpoints, restore_network
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UserError
from music_jax.exchange import formats
from music_jax.workdir.directory import check_utf8, open_workdir


def test_checkpoints_may_be_a_link_to_other_storage(tmp_path):
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    run.mkdir()
    scratch.mkdir()
    (run / "checkpoints").symlink_to(scratch)
    save_run(run, small_config())
    assert (scratch / "3").is_dir()
    assert open_workdir(str(run)) == epath.Path(run)
    for name in ("3", str(run / "checkpoints" / "3")):
        assert restore_network(epath.Path(run), small_config(), name, make_data_mesh())[0] == 3
    (scratch / "out").symlink_to(tmp_path)
    with pytest.raises(UserError, match="out in the workdir is a link that leads out"):
        open_workdir(str(run))
    (scratch / "out").unlink()
    os.mkfifo(scratch / "pipe")
    with pytest.raises(UserError, match="pipe in the workdir is a pipe"):
        open_workdir(str(run))


def test_a_workdir_with_deeply_nested_folders_is_opened(tmp_path):
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("deep", dir_fd=at)
        below = os.open("deep", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    assert open_workdir(str(tmp_path)) == epath.Path(tmp_path)
    subprocess.run(["rm", "-r", tmp_path / "deep"], check=True)


def test_a_workdir_whose_name_is_not_utf8_is_refused_before_anything_is_written(tmp_path):
    workdir = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(UserError, match=r"caf\\udce9': it is not UTF-8.*rename the directory"):
        open_workdir(workdir)
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_stays_within_a_workdir_below_a_link_is_no_error(tmp_path):
    (tmp_path / "scratch" / "run" / "wandb" / "run-1").mkdir(parents=True)
    (tmp_path / "scratch" / "run" / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "runs").symlink_to("scratch")
    assert open_workdir(tmp_path / "runs" / "run").is_dir()


def test_check_utf8_refuses_other_names():
    check_utf8("/home/é")
    with pytest.raises(UserError, match=r"/home/\\xe9 is not UTF-8.*rename it"):
        check_utf8(os.fsdecode(b"/home/\xe9"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a\\b", r"a backslash \(\\\), which"),
        ("a\\b/c", "a backslash"),
        ("a\udcff", r"not UTF-8"),
        (os.path.join(*["y" * 250] * 15), "longer than 3500 bytes"),
    ],
)
def test_paths_that_cannot_hold_checkpoints_are_refused_at_once(name, why, tmp_path):
    path = os.path.join(tmp_path, name)
    with pytest.raises(UserError, match=why) as error:
        open_workdir(path)
    assert str(error.value).isprintable()  # one line, which any terminal can show
    with pytest.raises(UserError, match=why):
        Checkpoints(epath.Path(path), read_only=True)
    with pytest.raises(UserError, match=why):
        formats.write(None, "orbax", path)
    assert os.listdir(tmp_path) in ([], [name.partition("/")[0]])


@pytest.mark.parametrize("name", ["lr=[1]", "a*", "a?", "a\\b"])
def test_patterns_in_the_name_of_a_bucket_s_directory_are_refused(name):
    with pytest.raises(UserError, match="checkpoints cannot be kept in 'gs://bucket/"):
        open_workdir(f"gs://bucket/{name}")


@pytest.mark.parametrize("path", ["/hf/runs", "/gs/bucket/runs", "/s3/x"])
def test_a_directory_that_is_taken_for_a_bucket_is_refused(path):
    with pytest.raises(UserError, match=r"is taken for the bucket (hf|gs|s3)://"):
        open_workdir(path)


@pytest.mark.parametrize("path", ["foo://x", "runs/a://b"])
def test_an_unknown_kind_of_bucket_is_refused(path):
    with pytest.raises(UserError, match="is in an unknown kind of bucket"):
        open_workdir(path)


def test_an_unreachable_bucket_is_an_error_that_says_what_to_do():
    # Another process: what epath finds it keeps.
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from music_jax import errors\nfrom music_jax.workdir.directory import open_workdir\n"
        "try: open_workdir('gs://bucket/run')\n"
        "except errors.UserError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"EPATH_USE_TF": "false", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "pip install gcsfs" in out.stdout, out.stderr
    with pytest.raises(UserError, match="ftp://somewhere/run is in an unknown kind of bucket"):
        open_workdir("ftp://somewhere/run")


def test_temporary_files_of_killed_processes_are_removed_after_a_day(tmp_path):
    (tmp_path / "features").mkdir()
    old, new, other = (
        tmp_path / "features" / f".new-{'0' * 16}",
        tmp_path / f".new-{'1' * 16}",
        tmp_path / ".new-notes",
    )
    for path in (old, new, other):
        path.write_text("")
    for path in (old, other):
        os.utime(path, (time.time() - 90_000,) * 2)
    open_workdir(str(tmp_path))
    assert not old.exists()
    assert new.exists()
    assert other.exists()
