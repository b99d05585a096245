"""The training step as a function, on any number of devices, and its gradients in microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from music_jax.config import default_config, set_views
from music_jax.data.augment import ViewAugmentation, augment_views
from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.models.network import Projector
from music_jax.objectives import sigreg_loss, vicreg_loss
from music_jax.registry import OBJECTIVES
from music_jax.train import step as step_module
from music_jax.train.guards import STATISTICS, init_guard_state
from music_jax.train.recipe import make_recipe
from music_jax.train.state import TrainState, init_state
from music_jax.train.step import (
    augmented_views,
    batch_gradients,
    compile_skip,
    compile_step,
    crop_shapes,
    mean_over_pairs,
)


def _config(objective="music", optimizer="sgd"):
    config = default_config()
    config.batch_size = 16
    config.num_epochs = 4
    config.objective.name = objective
    config.objective.num_segments, config.objective.units_per_segment = 4, 8
    config.dataset.num_channels = 1
    config.dataset.mean, config.dataset.std = (0.5,), (0.25,)
    config.crop.size = config.crop.eval_resize = 12
    config.backbone.name, config.backbone.stem = "small_resnet", "cifar"
    config.projector.hidden_sizes = (32,)
    config.optimizer.name = optimizer
    config.optimizer.base_learning_rate = {"sgd": 0.5, "adamw": 0.03, "lars": 30.0}[optimizer]
    config.optimizer.warmup_epochs = 0
    set_views(config, flip_probability=0.5, noise_probability=1.0, noise_std=0.05)
    return config


def _batches(config, steps):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, config.batch_size, 2, 12, 12, 1), dtype=np.uint8)
    local = config.local_views
    shape = (4, config.batch_size, local.count, local.size, local.size, 1)
    others = rng.integers(0, 256, shape, dtype=np.uint8)
    for step in range(steps):
        index = np.arange(config.batch_size, dtype=np.uint32) + step * config.batch_size
        crops = images[step % 4]
        yield ((crops, others[step % 4]) if local.count else crops), index


def _run(config, devices=1, steps=6):
    mesh = make_data_mesh(devices)
    recipe = make_recipe(config, steps_per_epoch=4)
    state = init_state(config, recipe.optimizer, mesh)
    step_function = compile_step(recipe, state, mesh)
    logged = []
    for images, index in _batches(config, steps):
        batch = jax.device_put((images, index), batch_sharding(mesh))
        state, metrics = step_function(state, *batch)
        logged.append({name: float(value) for name, value in metrics.items()})
    return state, logged


@pytest.mark.parametrize(
    ("objective", "optimizer"),
    [
        ("music", "sgd"),
        pytest.param("music", "adamw", marks=pytest.mark.slow),
        pytest.param("music", "lars", marks=pytest.mark.slow),
        pytest.param("barlow_twins", "sgd", marks=pytest.mark.slow),
        pytest.param("vicreg", "sgd", marks=pytest.mark.slow),
        pytest.param("sigreg", "sgd", marks=pytest.mark.slow),
        pytest.param("tcr", "sgd", marks=pytest.mark.slow),
        pytest.param("discrete", "sgd", marks=pytest.mark.slow),
    ],
)
def test_the_loss_falls(objective, optimizer):
    config = _config(objective, optimizer)
    if objective in ("vicreg", "tcr"):
        config.optimizer.base_learning_rate /= 10
    # optax.adamw raises a float to the power of an integer step, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard" if optimizer == "adamw" else "strict"):
        _, logged = _run(config, steps=14)
    assert np.mean([m["loss"] for m in logged[-4:]]) < np.mean([m["loss"] for m in logged[:4]])


@pytest.mark.parametrize(
    ("objective", "numbers"),
    [("music", (2, 4))]
    + [
        pytest.param(name, (4,), marks=pytest.mark.slow)
        for name in ("barlow_twins", "vicreg", "simclr", "sigreg", "tcr", "discrete")
    ],
)
def test_any_number_of_devices_gives_the_same_losses(objective, numbers):
    config = _config(objective)
    config.optimizer.base_learning_rate = 0.01
    expected = [m["loss"] for m in _run(config, devices=1)[1]]
    for devices in numbers:
        found = [m["loss"] for m in _run(config, devices=devices)[1]]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_local_views_give_the_same_losses_on_any_number_of_devices_and_only_train():
    config = _config()
    config.optimizer.base_learning_rate = 0.01
    without, (first, *_) = _run(config, steps=1)
    config.local_views.update({"count": 2, "size": 8})
    logged = _run(config, devices=1, steps=4)[1]
    again = _run(config, devices=2, steps=4)[1]
    np.testing.assert_allclose([m["loss"] for m in again], [m["loss"] for m in logged], rtol=1e-5)
    after_one, (one,) = _run(config, steps=1)
    assert one["loss"] != first["loss"]
    for name in STATISTICS:  # of the first global view
        np.testing.assert_allclose(one[name], first[name], rtol=1e-5)
    # Inference normalizes by the running statistics of the two views alone.
    for a, b in zip(*(jax.tree.leaves(s.batch_stats) for s in (after_one, without)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_the_pairs_of_a_global_view_with_every_other_view():
    z = np.random.default_rng(0).normal(size=(8, 5, 3))

    def objective(a, b):
        return jnp.mean(a * b**2), {"difference": jnp.mean(jnp.abs(a - b))}

    loss, metrics = mean_over_pairs(objective, jnp.asarray(z, jnp.float32))
    pairs = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)]
    losses = [np.mean(z[:, a] * z[:, b] ** 2) for a, b in pairs]
    differences = [np.mean(np.abs(z[:, a] - z[:, b])) for a, b in pairs]
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["difference"], np.mean(differences), rtol=1e-5)


def test_the_crops_of_a_batch_are_two_of_each_image_and_the_local_ones():
    config = default_config()
    config.batch_size, config.crop.size, config.dataset.num_channels = 6, 20, 4
    views = crop_shapes(config)
    assert (views.shape, views.dtype) == ((6, 2, 20, 20, 4), np.uint8)
    config.local_views.count, config.local_views.size = 5, 8
    config.dataset.pixel_type = "uint16"
    views, local = crop_shapes(config)
    assert (views.shape, views.dtype) == ((6, 2, 20, 20, 4), np.uint16)
    assert local.shape == (6, 5, 8, 8, 4)


def test_local_views_are_augmented_on_their_own():
    config = _config()
    config.local_views.update({"count": 2, "size": 12})
    config.augmentation.local.flip_probability = 0.0
    recipe = make_recipe(config, steps_per_epoch=4)
    images = np.full((6, 2, 12, 12, 1), 100, np.uint8)
    index = np.asarray([900, 17, 2**31 + 5, 3, 41, 8], np.uint32)
    augmented = jax.jit(functools.partial(augmented_views, recipe))
    views, local = augmented((images, images), index)
    np.testing.assert_array_equal(views, augmented(images, index))
    noises = np.concatenate([views, local], axis=1).reshape(24, -1)
    correlations = np.corrcoef(noises) - np.eye(24)
    assert np.abs(correlations).max() < 0.5  # 144 independent numbers each
    order = np.asarray([4, 0, 3, 5, 1, 2])
    moved = augmented((images[order], images[order]), index[order])[1]
    np.testing.assert_array_equal(moved, local[order])
    config.augmentation.local.noise_probability = 0.0
    plain = augmented_views(make_recipe(config, 4), (images, images), index)[1]
    np.testing.assert_allclose(plain, (100 / 255 - 0.5) / 0.25, rtol=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    config = _config()
    first, again = _run(config)[0], _run(config)[0]
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    config.seed = 1
    assert _run(config)[1][0]["loss"] != _run(_config())[1][0]["loss"]


def test_each_step_of_a_random_objective_has_a_key_of_the_seed_and_the_step():
    config = _config("sigreg")
    config.seed, config.objective.num_slices = 5, 3
    a, b = np.random.default_rng(0).normal(size=(2, 8, 32)).astype(np.float32)
    objective = make_recipe(config, steps_per_epoch=4).objective_of_step
    key = jax.random.fold_in(jax.random.key(5), 3)
    for step in (0, 7):
        expected = sigreg_loss(a, b, key=jax.random.fold_in(key, step), num_slices=3)
        assert objective(step)(a, b)[0] == expected
    assert objective(0)(a, b)[0] != objective(7)(a, b)[0]


def test_music_reports_its_terms_and_its_distance_to_the_bound():
    _, logged = _run(_config(), steps=1)
    metrics = logged[0]
    terms = metrics["diagonal"] + metrics["cross_segment"] + metrics["invariance"]
    np.testing.assert_allclose(metrics["loss"], terms, rtol=1e-5)
    np.testing.assert_allclose(metrics["gap_to_bound"], metrics["loss"] + 3 * np.log(8), rtol=1e-5)
    assert metrics["gap_to_bound"] > 0


def test_the_weights_of_the_terms_are_those_of_the_config():
    config = _config()
    config.objective.update(diagonal_weight=2.0, cross_segment_weight=0.5, invariance_weight=3.0)
    metrics = _run(config, steps=1)[1][0]
    expected = (
        2.0 * metrics["diagonal"] + 0.5 * metrics["cross_segment"] + 3.0 * metrics["invariance"]
    )
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert "gap_to_bound" not in metrics


def test_a_step_that_is_not_finite_changes_nothing_and_is_named():
    config = _config()
    recipe = make_recipe(config, steps_per_epoch=4)
    mesh = make_data_mesh(1)
    state = init_state(config, recipe.optimizer, mesh)
    step_function = compile_step(recipe, state, mesh)
    for images, index in _batches(config, 2):
        state, _ = step_function(state, images, index)
    assert int(state.guard.tripped_step) == -1
    good = jax.tree.map(np.asarray, (state.params, state.batch_stats, state.opt_state))

    bad = dataclasses.replace(recipe, objective=lambda a, b: (jnp.sum(a) * jnp.nan, {}))
    bad_step = compile_step(bad, state, mesh)
    for images, index in _batches(config, 3):
        state, metrics = bad_step(state, images, index)
        assert not np.isfinite(float(metrics["loss"]))
    assert int(state.guard.tripped_step) == 3
    assert int(state.step) == 5
    kept = (state.params, state.batch_stats, state.opt_state)
    for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(a, b)


class _Linear:
    """In place of a network: the pixels' sum by two weights, and a count as running statistics."""

    def embed(self, params, batch_stats, views, key):
        flat = views.reshape(*views.shape[:2], -1)  # [batch, views, pixels]
        return None, flat @ params["kernel"], {"count": batch_stats["count"] + 1}


def test_a_skipped_step_changes_only_the_counts_and_the_schedule_continues_after_it():
    config = _config()
    config.optimizer.warmup_epochs = 1
    config.optimizer.weight_decay, config.optimizer.momentum = 0.1, 0.9
    config.guards.enabled = False
    mesh, rates = make_data_mesh(1), (0.0, 0.25 * 0.5 * 16 / 256, 0.5 * 0.5 * 16 / 256)
    recipe = dataclasses.replace(
        make_recipe(config, steps_per_epoch=4),
        network=_Linear(),
        views=(ViewAugmentation(), ViewAugmentation()),
        objective=lambda a, b: (jnp.mean(a * b), {}),
    )
    kernel = np.random.default_rng(1).normal(size=(144, 2))
    params = {"kernel": jnp.asarray(kernel, jnp.float32)}
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats={"count": jnp.int32(0)},
        opt_state=recipe.optimizer.init(params),
        guard=init_guard_state(),
    )
    state = jax.tree.map(jnp.copy, state)  # a buffer can be donated once
    step_function, skip = compile_step(recipe, state, mesh), compile_skip(state, mesh)
    velocity, taken = 0.0, 0
    for number, (images, index) in enumerate(_batches(config, 5), 1):
        if number in (2, 4):
            before = jax.tree.map(jnp.copy, state)
            donated, state = state, skip(state)
            assert donated.params["kernel"].is_deleted()
            guard = before.guard._replace(skipped=before.guard.skipped + 1)
            expected = dataclasses.replace(before, step=number, guard=guard)
            jax.tree.map(np.testing.assert_array_equal, state, expected)
            continue
        state, metrics = step_function(state, images, index)
        x = ((images / 255 - 0.5) / 0.25).reshape(16, 2, -1)
        a, b = x[:, 0] @ kernel, x[:, 1] @ kernel
        gradient = (x[:, 0].T @ b + x[:, 1].T @ a) / a.size
        velocity = 0.9 * velocity + gradient + 0.1 * kernel
        kernel = kernel - rates[taken] * velocity
        np.testing.assert_allclose(metrics["learning_rate"], rates[taken], rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], np.mean(a * b), rtol=1e-4)
        np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-4)
        np.testing.assert_allclose(state.params["kernel"], kernel, rtol=1e-4, atol=1e-5)
        taken += 1
    assert (int(state.step), int(state.guard.skipped), int(state.batch_stats["count"])) == (5, 2, 3)


def test_bfloat16_starts_at_nearly_the_same_loss():
    config = _config()
    expected = _run(config, steps=1)[1][0]["loss"]
    config.compute_dtype = "bfloat16"
    state, logged = _run(config, steps=2)
    np.testing.assert_allclose(logged[0]["loss"], expected, rtol=2e-2)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}


@pytest.mark.slow
def test_bfloat16_on_a_mesh_whose_second_axis_is_one_device():
    config = _config()
    expected = _run(config, steps=1)[1][0]["loss"]
    config.compute_dtype = "bfloat16"
    logged = _run(config, steps=1, devices=2)[1]
    np.testing.assert_allclose(logged[0]["loss"], expected, rtol=5e-2)


def test_the_state_is_donated():
    config = _config()
    recipe = make_recipe(config, steps_per_epoch=4)
    mesh = make_data_mesh(2)
    state = init_state(config, recipe.optimizer, mesh)
    step_function = compile_step(recipe, state, mesh)
    images, index = next(_batches(config, 1))
    step_function(state, *jax.device_put((images, index), batch_sharding(mesh)))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


def test_the_augmentation_of_a_sample_depends_on_its_index_and_not_on_its_position():
    config = _config()
    config.dataset.std = (0.5,)
    config.augmentation.view_2.noise_std = 0.2
    config.seed = 7
    recipe = make_recipe(config, steps_per_epoch=4)
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 10, 14, 1), dtype=np.uint8)
    index = np.asarray([900, 17, 2**31 + 5, 3, 41, 900], np.uint32)
    augmented = jax.jit(functools.partial(augmented_views, recipe))
    found = augmented(images, index)
    order = np.asarray([4, 0, 3, 5, 1, 2])
    moved = augmented(images[order], index[order])
    np.testing.assert_array_equal(moved, found[order])
    same = np.tile(images[:1], (6, 1, 1, 1, 1))
    alike = augmented(same, index)
    np.testing.assert_array_equal(alike[0], alike[5])
    assert all(np.any(alike[0] != alike[i]) for i in range(1, 5))
    expected = jax.jit(augment_views, static_argnames=("views", "mean", "std"))(
        images,
        index,
        jax.random.fold_in(jax.random.key(7), 1),
        views=(
            ViewAugmentation(flip_probability=0.5, noise_probability=1.0, noise_std=0.05),
            ViewAugmentation(flip_probability=0.5, noise_probability=1.0, noise_std=0.2),
        ),
        mean=(0.5,),
        std=(0.5,),
    )
    np.testing.assert_array_equal(found, expected)


def test_seeds_and_learning_rates_share_a_program_and_registered_parts_do_not(monkeypatch):
    config = _config()
    recipe, mesh = make_recipe(config, steps_per_epoch=4), make_data_mesh(1)
    state = init_state(config, recipe.optimizer, mesh)
    config.seed += 1
    config.optimizer.base_learning_rate *= 2
    other = make_recipe(config, steps_per_epoch=4)
    jit_step = step_module._jit_step
    assert jit_step(recipe, state, mesh) is jit_step(other, state, mesh)
    (batch,) = _batches(config, 1)
    copy = jax.tree.map(jnp.copy, state)
    for _ in range(2):
        state, metrics = compile_step(recipe, state, mesh)(state, *batch)
        copy, others = compile_step(other, copy, mesh)(copy, *batch)
    np.testing.assert_allclose(others["learning_rate"], 2 * metrics["learning_rate"], rtol=1e-6)
    assert float(others["loss"]) != float(metrics["loss"])

    name = config.objective.name
    monkeypatch.setitem(OBJECTIVES, name, lambda _: lambda a, b: (jnp.sum(a), {}))
    assert make_recipe(config, steps_per_epoch=4).objective is not other.objective


_BATCH, _STEPS = 12, 3


def _problem(hidden_sizes):
    """A network with batch normalization in its hidden layers, its parameters and a batch."""
    head = Projector(5, hidden_sizes, 6, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(head, nnx.Param, nnx.BatchStat)

    def embed(params, stats, images, sample_index):
        # What is done to a sample depends on its index alone, as augmentation does.
        images = images * jnp.cos(sample_index.astype(jnp.float32))[:, None, None]
        head = nnx.merge(graph, params, stats, copy=True)
        embeddings = head(images.reshape(-1, 5), train=True, num_views=2)
        return embeddings.reshape(-1, 2, 6), nnx.state(head, nnx.BatchStat)

    images = jax.random.normal(jax.random.key(1), (_BATCH, 2, 5))
    return embed, params, stats, images, jnp.arange(_BATCH, dtype=jnp.uint32) + 7


def _objective(embeddings):
    loss = vicreg_loss(embeddings[:, 0], embeddings[:, 1])
    return loss, {"twice": 2 * loss}


def _check(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _accumulated(embed, *batch):
    function = functools.partial(batch_gradients, embed, _objective, steps=_STEPS)
    return jax.jit(function)(*batch)


def test_without_normalization_the_gradient_is_that_of_the_batch():
    embed, *batch = _problem(hidden_sizes=())
    found = _accumulated(embed, *batch)
    _check(found, batch_gradients(embed, _objective, *batch))


@pytest.mark.parametrize("hidden_sizes", [(), (8,)])
def test_the_gradient_is_that_of_the_batch_loss_with_microbatches_normalized_separately(
    hidden_sizes,
):
    embed, params, stats, images, index = _problem(hidden_sizes)

    def loss_of(params):
        new_stats, embeddings = stats, jnp.zeros((_BATCH, 2, 6))
        for m in range(_STEPS):
            rows = slice(m, None, _STEPS)
            part, new_stats = embed(params, new_stats, images[rows], index[rows])
            embeddings = embeddings.at[rows].set(part)
        return vicreg_loss(embeddings[:, 0], embeddings[:, 1]), new_stats

    (loss, new_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    found = _accumulated(embed, params, stats, images, index)
    _check(found, (loss, {"twice": 2 * loss}, grads, new_stats))


def test_activations_of_one_microbatch_are_held_at_a_time():
    width = 512

    def embed(params, stats, images, index):
        x = images @ params[0]
        for _ in range(4):
            x = jnp.sin(x @ params[1])
        return x[..., :8], stats

    params = (jnp.zeros((5, width)), jnp.zeros((width, width)))
    batch = (params, {}, jnp.zeros((1024, 2, 5)), jnp.zeros(1024, jnp.uint32))
    memory = {}
    for steps in (1, 2, 8):
        function = functools.partial(batch_gradients, embed, _objective, steps=steps)
        memory[steps] = jax.jit(function).lower(*batch).compile().memory_analysis()
    assert memory[2].temp_size_in_bytes < 0.7 * memory[1].temp_size_in_bytes
    assert memory[8].temp_size_in_bytes < 0.4 * memory[1].temp_size_in_bytes
