"""State that is split over the devices: the same training, in less memory."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from music_jax import models
from music_jax.config import default_config, set_views
from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.errors import UserError
from music_jax.models.vision_transformer import VisionTransformer
from music_jax.train import state as state_lib
from music_jax.train.recipe import make_recipe
from music_jax.train.state import abstract_state, init_state
from music_jax.train.step import compile_step, crop_shapes, lower_step

_TINY = functools.partial(VisionTransformer, width=16, depth=1, num_heads=2, patch_size=4)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "tiny", models.BackboneSpec(_TINY, image_multiple=4))
    monkeypatch.setattr(state_lib, "MIN_ELEMENTS", 256)


def _config(optimizer="lars", **fields):
    config = default_config()
    config.batch_size = 16
    config.num_epochs = 4
    config.objective.num_segments, config.objective.units_per_segment = 4, 8
    config.dataset.num_channels = 1
    config.dataset.mean, config.dataset.std = (0.5,), (0.25,)
    config.crop.size = 8
    config.backbone.name = "tiny"
    config.projector.hidden_sizes = (64,)
    config.optimizer.name = optimizer
    config.optimizer.base_learning_rate = {"sgd": 0.05, "adamw": 0.001, "lars": 3.0}[optimizer]
    config.optimizer.warmup_epochs = 0
    set_views(config, flip_probability=0.5, noise_probability=1.0, noise_std=0.05)
    config.update(fields)
    return config


def _run(config, devices, fsdp=1, steps=5):
    mesh = make_data_mesh(devices, fsdp=fsdp)
    recipe = make_recipe(config, steps_per_epoch=4)
    state = init_state(config, recipe.optimizer, mesh)
    step = compile_step(recipe, state, mesh)
    rng = np.random.default_rng(0)
    images = jax.tree.map(
        lambda x: rng.integers(0, 256, x.shape, dtype=np.uint8), crop_shapes(config)
    )
    losses = []
    for i in range(steps):
        index = np.arange(16, dtype=np.uint32) + 16 * i
        state, metrics = step(state, *jax.device_put((images, index), batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    return state, losses


def _bytes_of_a_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def _bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("optimizer", "layouts"),
    [
        ("lars", [(4, 2)]),
        pytest.param("lars", [(4, 1), (4, 4)], marks=pytest.mark.slow),
        pytest.param("sgd", [(4, 2)], marks=pytest.mark.slow),
        pytest.param("adamw", [(4, 2)], marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_one_device(optimizer, layouts):
    config = _config(optimizer)
    # optax.adamw raises a float to the power of an integer step, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard" if optimizer == "adamw" else "strict"):
        expected_state, expected = _run(config, devices=1)
        assert expected[-1] != expected[0]
        for devices, fsdp in layouts:
            state, losses = _run(config, devices, fsdp)
            np.testing.assert_allclose(losses, expected, rtol=1e-5)
            assert _bytes_of_a_device(state.opt_state) < 0.35 * _bytes(state.opt_state)
            share = _bytes_of_a_device(state.params) / _bytes(state.params)
            assert share == 1 if fsdp == 1 else share < 1 / fsdp + 0.1
            assert _bytes(state.opt_state) == _bytes(expected_state.opt_state)


@pytest.mark.slow
def test_losses_with_local_views_are_those_of_one_device_in_microbatches_too():
    config = _config("sgd", local_views={"count": 2, "size": 4})
    config.projector.hidden_sizes = ()  # no batch normalization
    expected = _run(config, devices=1)[1]
    np.testing.assert_allclose(_run(config, 4, fsdp=2)[1], expected, rtol=1e-5)
    config.accumulation_steps = 2
    np.testing.assert_allclose(_run(config, 2, fsdp=2)[1], expected, rtol=1e-5)


@pytest.mark.slow
def test_losses_in_microbatches_are_those_of_one_device():
    config = _config(accumulation_steps=2)
    expected = _run(config, devices=1)[1]
    for fsdp in (1, 2):
        np.testing.assert_allclose(_run(config, 4, fsdp)[1], expected, rtol=1e-5)
    assert expected[0] != _run(_config(), devices=1, steps=1)[1][0]  # BatchNorm sees fewer


def test_the_step_can_be_lowered_without_arrays_and_shares_the_objective_over_both_axes():
    config = _config()
    mesh = make_data_mesh(4, fsdp=2)
    recipe = make_recipe(config, steps_per_epoch=4)
    state = abstract_state(config, recipe.optimizer)
    compiled = lower_step(recipe, state, mesh, crop_shapes(config)).compile()
    assert "all-to-all" in compiled.as_text()  # of the sharded objective
    params = jax.tree.leaves(compiled.input_shardings[0][0].params)
    assert any(s.spec == P("fsdp") for s in params)


@pytest.mark.parametrize(
    ("shape", "update", "parameter"),
    [
        ((64, 96), P(("fsdp", "data")), P("fsdp")),
        ((3, 3, 16, 32), P(None, None, ("fsdp", "data")), P(None, None, "fsdp")),
        ((33, 64), P(None, ("fsdp", "data")), P(None, "fsdp")),  # the last, if no other
        ((34, 17), P(("fsdp",)), P("fsdp")),  # four do not divide it, two do
        ((33, 17), P(), P()),
        ((8,), P(), P()),  # small
    ],
)
def test_which_axis_is_sharded(shape, update, parameter):
    mesh = make_data_mesh(4, fsdp=2)
    assert state_lib.update_spec(shape, mesh) == update
    assert state_lib.parameter_spec(shape, mesh) == parameter


def test_small_arrays_are_not_sharded(monkeypatch):
    monkeypatch.undo()
    assert state_lib.update_spec((128, 128), make_data_mesh(4)) == P()
    assert state_lib.update_spec((512, 128), make_data_mesh(4)) == P(("fsdp", "data"))


def test_fsdp_must_divide_the_number_of_devices():
    with pytest.raises(UserError, match="fsdp = 3 does not divide the 4 devices"):
        make_data_mesh(4, fsdp=3)
