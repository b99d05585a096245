"""Every kind of damage is detected, and valid checkpoints are accepted."""

import json
import os
import pathlib

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from music_jax.checkpoint.integrity import CHECKSUMS, find_damage, write_checksums
from music_jax.checkpoint.manager import Checkpoints
from music_jax.errors import UserError


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "7"
    (directory / "state" / "d").mkdir(parents=True)
    (directory / "state" / "d" / "abc").write_bytes(os.urandom(5000))
    (directory / "state" / "empty").write_bytes(b"")
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": {"state": "S"}}))
    write_checksums(epath.Path(directory))
    return directory


def damage_of(directory):
    return find_damage(epath.Path(directory))


def test_an_untouched_checkpoint_is_valid(checkpoint):
    assert damage_of(checkpoint) is None


def test_the_time_that_orbax_adds_is_no_damage(checkpoint):
    record = {"item_handlers": {"state": "S"}, "commit_timestamp_nsecs": 5}
    (checkpoint / "_CHECKPOINT_METADATA").write_text(json.dumps(record))
    (checkpoint / "commit_success.txt").write_text("done")
    assert damage_of(checkpoint) is None


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda d: os.truncate(d / "state/d/abc", 4999), "state/d/abc has changed"),
        (lambda d: (d / "state/d/abc").unlink(), "state/d/abc is missing"),
        (lambda d: (d / "state/empty").unlink(), "state/empty is missing"),
        (lambda d: (d / "state/extra").write_text("x"), "state/extra was added after the save"),
        (lambda d: (d / "_CHECKPOINT_METADATA").unlink(), "cannot be read"),
        (lambda d: (d / "_CHECKPOINT_METADATA").write_text("{}"), "_CHECKPOINT_METADATA has chan"),
        (lambda d: (d / "_CHECKPOINT_METADATA").write_text("[]"), "cannot be read"),
        (lambda d: (d / CHECKSUMS).unlink(), "CHECKSUMS.json is missing"),
        (lambda d: (d / CHECKSUMS).write_text("[1]"), "CHECKSUMS.json cannot be read"),
        (lambda d: (d / CHECKSUMS).write_bytes(b"\xff\xfe"), "CHECKSUMS.json cannot be read"),
    ],
)
def test_damage_is_named(checkpoint, damage, found):
    damage(checkpoint)
    assert found in damage_of(checkpoint)


@given(position=st.integers(0, 4999), flip=st.integers(1, 255))
@settings(max_examples=30, deadline=None)
def test_any_flipped_byte_is_found(tmp_path_factory, position, flip):
    directory = tmp_path_factory.mktemp("run")
    file = pathlib.Path(directory / "data")
    content = bytearray(5000)
    (directory / "_CHECKPOINT_METADATA").write_text("{}")
    file.write_bytes(content)
    write_checksums(epath.Path(directory))
    content[position] ^= flip
    file.write_bytes(content)
    assert damage_of(directory) == "data has changed"


def test_a_file_that_has_grown_is_not_read(checkpoint):
    os.truncate(checkpoint / "state" / "d" / "abc", 2**40)  # 1 TiB that takes no room
    assert damage_of(checkpoint) == "state/d/abc has changed"


@pytest.mark.parametrize("entry", [[], 5, None, {"a": 1}])
def test_checksums_of_another_form_are_damage(checkpoint, entry):
    record = json.loads((checkpoint / CHECKSUMS).read_text())
    record["files"]["state/empty"] = entry
    (checkpoint / CHECKSUMS).write_text(json.dumps(record))
    assert damage_of(checkpoint).startswith("cannot be read: ")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_orbax_reads_at_once_is_neither_a_link_nor_a_pipe(kind, tmp_path):
    """A link may lead to any file of the user, and reading a pipe would never end."""
    metadata = tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    metadata.parent.mkdir(parents=True)
    if kind == "link":
        metadata.symlink_to("/proc/self/environ")
    else:
        os.mkfifo(metadata)
    with pytest.raises(UserError, match="is neither a file nor a directory"):
        Checkpoints(epath.Path(tmp_path), read_only=True)
