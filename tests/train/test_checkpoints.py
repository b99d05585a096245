"""Checkpoints go from any mesh to any other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from music_jax.data.loader import TrainingOrder
from music_jax.errors import UserError
from music_jax.mesh import make_data_mesh
from music_jax.train.checkpoints import Checkpoints
from music_jax.train.guards import init_guard_state
from music_jax.train.state import TrainState, state_shardings


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
def test_restored_onto_other_devices(tmp_path, devices, fsdp):
    order = TrainingOrder(32, 16, 0)
    mesh = make_data_mesh(4, fsdp=2)
    saved = jax.device_put(_state(), state_shardings(_state(), mesh))
    writer = Checkpoints(epath.Path(tmp_path))
    writer.save(7, saved, order)
    writer.close()

    mesh = make_data_mesh(devices, fsdp=fsdp)
    reader = Checkpoints(epath.Path(tmp_path), read_only=True)
    found = reader.restore(7, jax.eval_shape(_state), mesh, order)
    reader.close()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(_state()), strict=True):
        np.testing.assert_array_equal(a, b)
    expected = state_shardings(_state(), mesh)
    for a, s in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.sharding == s


def test_damaged_checkpoints_are_set_aside_until_none_is_whole(tmp_path):
    order, mesh = TrainingOrder(32, 16, 0), make_data_mesh(1)
    state = jax.device_put(_state(), state_shardings(_state(), mesh))
    checkpoints = Checkpoints(epath.Path(tmp_path))
    for step in (3, 7):
        checkpoints.save(step, state, order)
    checkpoints.wait()
    assert checkpoints.latest_whole_step() == 7

    (tmp_path / "checkpoints" / "7" / "state" / "_METADATA").unlink()
    assert checkpoints.latest_whole_step() == 3
    assert checkpoints.all_steps() == [3]
    assert (tmp_path / "damaged" / "7").is_dir()

    (tmp_path / "checkpoints" / "3" / "state" / "_METADATA").write_text("{}")
    with pytest.raises(UserError, match=r"whole \(step 3: state/_METADATA has changed\)"):
        checkpoints.latest_whole_step()
    assert checkpoints.all_steps() == [3]
    checkpoints.close()
