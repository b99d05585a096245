"""Saving and restoring: other devices, damage, failed saves."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import resource
import subprocess
import sys
import threading
import time
import types

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from orbax.checkpoint._src.metadata.checkpoint import _MetadataStoreImpl
from processes import ROOT

from music_jax.checkpoint import manager
from music_jax.checkpoint.manager import Checkpoints, _named_step
from music_jax.data.order import TrainingOrder
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UserError
from music_jax.train.guards import init_guard_state
from music_jax.train.state import TrainState, restore_state, save_state, state_shardings


def _state():
    params = {"kernel": jnp.arange(2.0**17).reshape(512, 256), "bias": jnp.arange(5.0)}
    return TrainState(
        step=jnp.asarray(7, jnp.int32),
        params=params,
        batch_stats={"mean": jnp.arange(3.0)},
        opt_state=optax.trace(0.9).init(jax.tree.map(jnp.ones_like, params)),
        guard=init_guard_state(),
    )


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (4, 1), (2, 2)])
def test_a_state_is_restored_onto_other_devices(tmp_path, devices, fsdp):
    order = TrainingOrder(32, 16, 0)
    mesh = make_data_mesh(4, fsdp=2)
    saved = jax.device_put(_state(), state_shardings(_state(), mesh))
    writer = Checkpoints(epath.Path(tmp_path))
    save_state(writer, 7, saved, order)
    writer.close()

    mesh = make_data_mesh(devices, fsdp=fsdp)
    reader = Checkpoints(epath.Path(tmp_path), read_only=True)
    found = restore_state(reader, 7, jax.eval_shape(_state), mesh, order)
    reader.close()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(_state()), strict=True):
        np.testing.assert_array_equal(a, b)
    expected = state_shardings(_state(), mesh)
    for a, s in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.sharding == s


def test_a_part_of_a_state_is_restored_alone(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path))
    save_state(checkpoints, 7, _on_one_device(_state()), TrainingOrder(32, 16, 0))
    checkpoints.close()
    checkpoints = Checkpoints(epath.Path(tmp_path), read_only=True)
    sharding = jnp.zeros(5).sharding
    array = jax.ShapeDtypeStruct((5,), np.float32)
    found = checkpoints.restore(7, {"params": {"bias": array}}, sharding, partial=True)
    np.testing.assert_array_equal(found["params"].pop("bias"), np.arange(5.0))
    assert found == {"params": {}}
    with pytest.raises(UserError, match=r"cannot restore step 7 of .*arrays are missing"):
        checkpoints.restore(7, {"params": {"other": array}}, sharding, partial=True)
    wrong = jax.ShapeDtypeStruct((4,), np.float32)
    with pytest.raises(UserError, match=r"cannot restore step 7 of .*not compatible"):
        checkpoints.restore(7, {"params": {"bias": wrong}}, sharding, partial=True)
    checkpoints.close()


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("num_records", 33, "'next_sample_index': 115, 'num_records': 33"),
        ("batch_size", 8, "'next_sample_index': 56, 'num_records': 32, 'batch_size': 8"),
        ("seed", 1, "'seed': 1, 'order': 2}"),
    ],
)
def test_another_position_in_the_input_is_refused(tmp_path, field, value, found):
    order, mesh = TrainingOrder(32, 16, 0), make_data_mesh(1)
    checkpoints = Checkpoints(epath.Path(tmp_path))
    save_state(checkpoints, 7, jax.device_put(_state(), state_shardings(_state(), mesh)), order)
    shapes = jax.eval_shape(_state)
    assert restore_state(checkpoints, 7, shapes, mesh, order).step == 7
    other = dataclasses.replace(order, **{field: value})
    saved = "{'next_sample_index': 112, 'num_records': 32, 'batch_size': 16, 'seed': 0, 'order': 2}"
    with pytest.raises(UserError, match=re.escape(f"was reading {saved}, but")) as error:
        restore_state(checkpoints, 7, shapes, mesh, other)
    checkpoints.close()
    assert found in str(error.value)


def test_a_checkpoint_saved_with_an_earlier_order_resumes_with_a_warning(tmp_path, capsys):
    order, mesh = TrainingOrder(32, 16, 0), make_data_mesh(1)
    checkpoints = Checkpoints(epath.Path(tmp_path))
    save_state(checkpoints, 7, _on_one_device(_state()), order)
    checkpoints.wait()
    position = tmp_path / "checkpoints" / "7" / "input" / "metadata"
    saved = json.loads(position.read_text())
    assert saved.pop("order") == 2
    restore_state(checkpoints, 7, jax.eval_shape(_state), mesh, order)
    assert "another order" not in capsys.readouterr().out

    position.write_text(json.dumps(saved))
    found = restore_state(checkpoints, 7, jax.eval_shape(_state), mesh, order)
    np.testing.assert_array_equal(found.params["bias"], np.arange(5.0))
    assert "in another order than the one that this run began with" in capsys.readouterr().out
    position.write_text(json.dumps(saved | {"seed": 1}))
    with pytest.raises(UserError, match="has the dataset changed"):
        restore_state(checkpoints, 7, jax.eval_shape(_state), mesh, order)
    checkpoints.close()


def test_a_checkpoint_that_names_other_files_is_one_error_without_other_output(tmp_path, capfd):
    mesh = make_data_mesh(1)
    writer = Checkpoints(epath.Path(tmp_path))
    save_state(
        writer,
        7,
        jax.device_put(_state(), state_shardings(_state(), mesh)),
        TrainingOrder(32, 16, 0),
    )
    writer.close()
    state = tmp_path / "checkpoints" / "7" / "state"
    manifest = bytearray((state / "manifest.ocdbt").read_bytes())
    name = b"d/" + next((state / "d").iterdir()).name.encode()
    at = bytes(manifest).index(name)
    manifest[at : at + len(name)] = b"http://127.0.0.1:9/".ljust(len(name), b"x")
    checksum = google_crc32c.Checksum(bytes(manifest[:-4])).digest()
    manifest[-4:] = checksum[::-1]
    (state / "manifest.ocdbt").write_bytes(manifest)
    capfd.readouterr()
    for _ in range(5):
        reader = Checkpoints(epath.Path(tmp_path), read_only=True)
        with pytest.raises(UserError, match="cannot restore step 7 of"):
            restore_state(reader, 7, jax.eval_shape(_state), mesh)
        reader.close()
    time.sleep(0.2)  # for what would be printed later
    assert capfd.readouterr() == ("", "")


def test_damaged_checkpoints_are_quarantined_unless_all_are_damaged(tmp_path):
    order, mesh = TrainingOrder(32, 16, 0), make_data_mesh(1)
    state = jax.device_put(_state(), state_shardings(_state(), mesh))
    checkpoints = Checkpoints(epath.Path(tmp_path))
    for step in (3, 7):
        save_state(checkpoints, step, state, order)
    checkpoints.wait()
    assert checkpoints.latest_valid_step() == 7

    (tmp_path / "checkpoints" / "7" / "state" / "_METADATA").unlink()
    assert checkpoints.latest_valid_step() == 3
    assert checkpoints.all_steps() == [3]
    assert (tmp_path / "damaged" / "7").is_dir()

    (tmp_path / "checkpoints" / "3" / "state" / "_METADATA").write_text("{}")
    with pytest.raises(UserError, match=r"valid \(step 3: state/_METADATA has changed\)"):
        checkpoints.latest_valid_step()
    assert checkpoints.all_steps() == [3]
    checkpoints.close()


def _on_one_device(state):
    return jax.device_put(state, state_shardings(state, make_data_mesh(1)))


def test_checksums_are_taken_after_orbax_has_written_its_metadata(tmp_path, monkeypatch):
    update = _MetadataStoreImpl.update

    def late(*args, **changes):
        time.sleep(0.5)  # as on a machine with much else to do
        update(*args, **changes)

    monkeypatch.setattr(_MetadataStoreImpl, "update", late)
    checkpoints = Checkpoints(epath.Path(tmp_path))
    save_state(checkpoints, 7, _on_one_device(_state()), TrainingOrder(32, 16, 0))
    checkpoints.wait()
    assert checkpoints.latest_valid_step() == 7
    checkpoints.close()


def test_a_save_is_not_changed_by_later_use_of_its_buffers(tmp_path):
    order, mesh = TrainingOrder(32, 16, 0), make_data_mesh(1)
    state = _on_one_device(jax.tree.map(jnp.copy, _state()))  # each with a buffer of its own
    checkpoints = Checkpoints(epath.Path(tmp_path))
    save_state(checkpoints, 7, state, order)
    state = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    jax.block_until_ready(state)
    found = restore_state(checkpoints, 7, state, mesh, order)
    checkpoints.close()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(_state()), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def no_large_files():
    """A context in which no file can grow beyond 100 kB: writes fail as on a full disk."""

    @contextlib.contextmanager
    def limit():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.mark.parametrize("ignoring", [False, True])
def test_a_failed_save_leaves_only_the_previous_checkpoint(
    tmp_path, no_large_files, ignoring, capsys
):
    order, mesh = TrainingOrder(32, 16, 0), make_data_mesh(1)
    checkpoints = Checkpoints(epath.Path(tmp_path), ignore_failed_saves=ignoring)
    save_state(checkpoints, 3, _on_one_device(_state()), order)
    checkpoints.wait()
    noise = jax.random.normal(jax.random.key(0), (512, 256))  # cannot be compressed
    state = _on_one_device(dataclasses.replace(_state(), params={"kernel": noise}))
    with no_large_files():
        save_state(checkpoints, 7, state, order)
        if ignoring:
            checkpoints.wait()
            message = capsys.readouterr().out
        else:
            with pytest.raises(UserError) as error:
                checkpoints.wait()
            message = str(error.value)
    assert "could not save step 7" in message
    assert "File too large" in message
    assert "step 3 is intact" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert checkpoints.latest_valid_step() == 3
    restore_state(checkpoints, 3, _on_one_device(_state()), mesh, order)
    save_state(checkpoints, 8, state, order)  # there is room again
    checkpoints.close()
    assert checkpoints.all_steps() == [3, 8]


def test_a_required_save_may_not_fail(tmp_path, no_large_files):
    order = TrainingOrder(32, 16, 0)
    noise = jax.random.normal(jax.random.key(0), (512, 256))
    state = _on_one_device(dataclasses.replace(_state(), params={"kernel": noise}))
    checkpoints = Checkpoints(epath.Path(tmp_path), ignore_failed_saves=True)
    with no_large_files():
        save_state(checkpoints, 7, state, order)
        with pytest.raises(UserError, match="could not save step 7"):
            checkpoints.wait(required=True)
        save_state(checkpoints, 8, state, order)
        checkpoints.wait()
        for step in (9, 10):
            save_state(checkpoints, step, state, order)
            checkpoints.wait()
    left = [thread.name for thread in threading.enumerate()]
    assert (
        sum(name.startswith("metadata_store") for name in left) <= 1
    )  # Orbax's managers are closed
    checkpoints.close()


def test_an_unfinished_checkpoint_is_removed_with_a_message(tmp_path, capsys):
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoints = Checkpoints(epath.Path(tmp_path))
    assert checkpoints.latest_valid_step() is None
    save_state(checkpoints, 6, _on_one_device(_state()), TrainingOrder(32, 16, 0))
    checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]
    assert "which an interrupted run left unfinished" in capsys.readouterr().out


def test_a_checkpoint_may_be_named_by_a_path_through_links(tmp_path):
    (tmp_path / "scratch" / "run" / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "runs").symlink_to("scratch")
    run = epath.Path(tmp_path / "runs" / "run")
    for name in ("scratch/run/checkpoints/5", "runs/run/checkpoints/5/"):
        assert _named_step(f"{tmp_path}/{name}", run, [5]) == 5
    with pytest.raises(UserError, match="is not below"):
        _named_step(f"{tmp_path}/other/checkpoints/5", run, [5])


def test_only_late_errors_of_a_closed_event_loop_are_hidden(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    for _ in range(3):
        manager._ignore_late_errors()
    errors = (
        RuntimeError("Event loop is closed"),
        RuntimeError("another"),
        ValueError("Event loop is closed"),
    )
    for error in errors:
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert [unraisable.exc_value for unraisable in shown] == list(errors[1:])


@pytest.mark.parametrize(("file", "hidden"), [("/x/orbax/read.py", True), ("/x/mine.py", False)])
def test_asyncio_does_not_report_late_errors_of_orbax(file, hidden, caplog):
    manager._ignore_late_errors()
    try:
        exec(compile("raise ValueError", file, "exec"))
    except ValueError:
        logging.getLogger("asyncio").exception("Task exception was never retrieved")
    assert (caplog.text == "") == hidden


_DAMAGED = """
import random, sys
from etils import epath
from orbax.checkpoint._src.metadata.checkpoint import _MetadataStoreImpl
from processes import ROOT
from small_runs import save_run, small_config
import music_jax
from music_jax.checkpoint.integrity import write_checksums
from music_jax.errors import UserError

run = epath.Path(sys.argv[1])
save_run(run, small_config())
(step,) = (run / "checkpoints").iterdir()
for path in sorted((step / "state").rglob("*")):
    if path.is_file() and "METADATA" not in path.name:
        content = bytearray(path.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        path.write_bytes(content)
write_checksums(step)
try:
    music_jax.load(run)
except UserError as error:
    print(f"error: {error}")
"""


def test_arrays_that_cannot_be_read_are_one_error_without_tracebacks(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", _DAMAGED, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("error: cannot restore step 3 of "), done.stdout
    assert "Traceback" not in done.stderr
