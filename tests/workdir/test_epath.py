"""Paths of epath: literal names, files whose owner has no name, errors of buckets."""

import contextlib
import grp
import json
import os
import pwd

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from memory_bucket import HttpError, broken_connection, out_of_reach

from music_jax.checkpoint.integrity import find_damage, write_checksums
from music_jax.checkpoint.manager import Checkpoints
from music_jax.config import default_config
from music_jax.data import tfds_source
from music_jax.data.order import TrainingOrder
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UserError
from music_jax.train.guards import init_guard_state
from music_jax.train.state import TrainState, restore_state, save_state, state_shardings
from music_jax.workdir.directory import open_workdir, user_directory
from music_jax.workdir.files import (
    BucketError,
    bucket_errors,
    new_file,
    read_json,
    write_json,
    write_new,
)
from music_jax.workdir.run_config import as_json, check_same_run, read_config, write_config

ORDER = TrainingOrder(32, 16, 0)


def _state():
    state = TrainState(
        step=jnp.asarray(7, jnp.int32),
        params={"kernel": jnp.arange(6.0).reshape(2, 3)},
        batch_stats={},
        opt_state=(),
        guard=init_guard_state(),
    )
    return jax.device_put(state, state_shardings(state, make_data_mesh(1)))


def _saved_and_restored(workdir):
    writer = Checkpoints(workdir)
    save_state(writer, 7, _state(), ORDER)
    writer.close()
    reader = Checkpoints(workdir, read_only=True)
    assert reader.latest_valid_step() == 7
    found = restore_state(reader, 7, jax.eval_shape(_state), make_data_mesh(1), ORDER)
    reader.close()
    return found.params["kernel"].tolist()


@pytest.mark.parametrize(
    "name",
    ["lr=[1]", "[!a]//x", "*", "?", "{a}", "a b\n#%20", "~", "a:b", "é" * 120, "[1]/../[2]"],
)
def test_checkpoints_are_restored_from_directories_of_any_name(name, tmp_path):
    workdir = open_workdir(f"/{tmp_path}/{name}")  # two slashes at the beginning
    assert _saved_and_restored(workdir) == [[0, 1, 2], [3, 4, 5]]


def test_orbax_restores_from_a_name_with_brackets(tmp_path):
    target = epath.Path(tmp_path / "x=[1]")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target, {"a": np.arange(3)})
    with ocp.StandardCheckpointer() as checkpointer:
        assert checkpointer.restore(target)["a"].tolist() == [0, 1, 2]


def test_a_pattern_applies_below_the_directory_alone(tmp_path):
    for name in ("a.npz", "b.npz", ".hidden.npz", "c.txt"):
        directory = tmp_path / "[ab]" / "in"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("")
    top = epath.Path(tmp_path / "[ab]")
    assert [p.name for p in (top / "in").glob("*.npz")] == ["a.npz", "b.npz"]
    assert [p.name for p in top.glob("in/c*")] == ["c.txt"]
    assert [p.name for p in top.glob("i?/[ab].npz")] == ["a.npz", "b.npz"]
    assert list(top.glob("none/*")) == []


def test_files_whose_owner_has_no_name_can_be_used(tmp_path, monkeypatch):
    def unknown(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    workdir = open_workdir(tmp_path)
    write_config(workdir, default_config())
    assert read_config(workdir) == as_json(default_config())
    check_same_run(workdir, default_config())
    assert _saved_and_restored(workdir) == [[0, 1, 2], [3, 4, 5]]
    file = epath.Path(tmp_path / "config.json")
    assert file.stat().length == os.path.getsize(file)
    assert file.stat().mtime == int(os.path.getmtime(file))
    assert not file.stat().is_directory
    assert workdir.stat().is_directory


def test_a_user_without_a_home_directory_must_name_a_data_directory(monkeypatch):
    def unknown(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    dataset = default_config().dataset
    dataset.name = "digits"
    with pytest.raises(UserError, match=r"has no home directory.*--config\.dataset\.data_dir=DIR"):
        tfds_source.prepare(dataset)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(OSError, match="not an absolute path; set HOME or XDG_CACHE_HOME"):
        user_directory("cache", "plan")


def test_errors_of_a_bucket_are_os_errors(bucket):
    (bucket / "a").write_text("x")
    file = bucket / "a"
    with out_of_reach():
        for action in (
            file.exists,
            file.is_dir,
            file.read_text,
            file.read_bytes,
            lambda: file.write_text("y"),
            lambda: list(bucket.iterdir()),
            lambda: list(bucket.glob("*")),
            lambda: write_new(file, b"y"),
        ):
            with pytest.raises(OSError, match=r"gs://bucket/run.*503, Service Unavailable"):
                action()
    assert file.read_text() == "x"
    with pytest.raises(FileNotFoundError):
        (bucket / "none").read_text()


def test_an_object_is_unchanged_if_writing_its_successor_fails(bucket):
    write_new(bucket / "a", b"old")
    with contextlib.suppress(ZeroDivisionError), new_file(bucket / "a") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert (bucket / "a").read_bytes() == b"old"
    assert [path.name for path in bucket.iterdir()] == ["a"]


def test_other_errors_are_not_converted(tmp_path):
    with pytest.raises(ZeroDivisionError), bucket_errors(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(ImportError), bucket_errors("gs://bucket"):
        raise ImportError


@pytest.mark.parametrize("failure", [HttpError, OSError, TimeoutError, PermissionError])
def test_an_unreachable_checkpoint_is_not_reported_as_damaged(bucket, failure):
    (bucket / "7").mkdir()
    (bucket / "7" / "_CHECKPOINT_METADATA").write_text("{}")
    (bucket / "7" / "data").write_text("data")
    write_checksums(bucket / "7")
    assert find_damage(bucket / "7") is None
    with out_of_reach(failure), pytest.raises(BucketError, match="503"):
        find_damage(bucket / "7")
    (bucket / "7" / "data").write_text("other")
    assert find_damage(bucket / "7") == "data has changed"


def test_a_connection_that_breaks_during_a_read_is_a_bucket_error(bucket):
    (bucket / "7").mkdir()
    (bucket / "7" / "_CHECKPOINT_METADATA").write_text("{}")
    write_checksums(bucket / "7")
    with broken_connection():
        with pytest.raises(BucketError, match="503"):
            read_json(bucket / "7" / "CHECKSUMS.json")
        with pytest.raises(BucketError, match="503"):
            find_damage(bucket / "7")
    assert find_damage(bucket / "7") is None


def test_write_json_replaces_an_object_in_a_bucket(bucket):
    for value in (1, 2):
        write_json(bucket / "a.json", {"value": value})
    assert json.loads((bucket / "a.json").read_text()) == {"value": 2}


def test_json_in_a_bucket_is_replaced(bucket):
    for value in (1, 2):
        write_json(bucket / "a.json", {"value": value})
    assert json.loads((bucket / "a.json").read_text()) == {"value": 2}
