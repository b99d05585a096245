"""Pictures of views and of joint probabilities, pixel by pixel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import small_config

from music_jax.data.augment import normalize_images
from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.objectives import joint_probability
from music_jax.train.pictures import heat_map, make_draw, view_sheet
from music_jax.train.recipe import make_recipe
from music_jax.train.state import abstract_state, init_state
from music_jax.train.step import augmented_views


@pytest.mark.parametrize(("side", "times"), [(8, 8), (48, 1), (224, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_shows_each_sample_above_its_other_view(side, times, channels):
    rng = np.random.Generator(np.random.Philox(key=1))
    images = rng.integers(0, 256, (3, 2, side, side, channels), np.uint8)
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels]
    sheet = view_sheet(np.asarray(normalize_images(images, mean=mean, std=std)), mean, std)
    assert sheet.shape == (2 * side * times, 3 * side * times, channels)
    for sample in range(3):
        for view in range(2):
            rows = slice(view * side * times, (view + 1) * side * times, times)
            columns = slice(sample * side * times, (sample + 1) * side * times, times)
            np.testing.assert_array_equal(sheet[rows, columns], images[sample, view])


def test_heat_map_is_brightest_on_the_diagonal_of_a_perfect_code_and_even_elsewhere():
    rng = np.random.Generator(np.random.Philox(key=2))
    codes = np.stack([np.arange(64) // 8, np.arange(64) % 8], axis=1)  # two independent segments
    embeddings = 60 * np.eye(8, dtype=np.float32)[codes].reshape(64, 16)
    joint = np.asarray(joint_probability(*2 * [embeddings], num_segments=2))
    image = heat_map(joint, units_per_segment=8)
    assert image.shape == (512, 512, 3)
    light = image[::32, ::32].astype(int).sum(axis=-1)
    within = np.kron(np.eye(2), np.ones((8, 8))) > 0
    diagonal = np.eye(16, dtype=bool)
    assert np.all(light[diagonal] == light.max())
    assert np.all(light[within & ~diagonal] == light.min())
    between = np.unique(light[~within])
    assert len(between) == 1
    assert light.min() < between[0] < light.max()
    assert np.any(heat_map(rng.random((16, 16)) / 16, 8) != image)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "center"), [(1, False), (4, False), (4, True)])
def test_pictures_show_the_views_of_the_training_step(devices, center):
    config = small_config()
    config.batch_size = 16
    config.objective.update({"num_segments": 40, "units_per_segment": 20})  # 800: not all are shown
    config.objective.center = center
    config.augmentation.view_1.update({"noise_probability": 1.0, "noise_std": 0.2})
    mesh, recipe = make_data_mesh(devices), make_recipe(config, steps_per_epoch=1)
    rng = np.random.Generator(np.random.Philox(key=3))
    images = rng.integers(0, 256, (16, 2, 28, 28, 1), np.uint8)
    indices = np.arange(16, dtype=np.uint32)
    state = init_state(config, recipe.optimizer, mesh)
    pictures = make_draw(config, recipe, abstract_state(config, recipe.optimizer), mesh)
    batch = jax.device_put((images, indices), batch_sharding(mesh))
    drawn = pictures(state, *batch)

    views = jax.jit(functools.partial(augmented_views, recipe))(images, indices)
    params, batch_stats = jax.device_get((state.params, state.batch_stats))
    _, z, _ = jax.jit(recipe.network.embed)(params, batch_stats, views)
    z = z[:, :, : 25 * 20]
    if center:
        z -= jnp.mean(z, axis=0, keepdims=True)
    joint = np.asarray(joint_probability(z[:, 0], z[:, 1], num_segments=25))
    np.testing.assert_array_equal(
        drawn["views"], view_sheet(np.asarray(views[:8]), recipe.mean, recipe.std)
    )
    assert drawn["joint_probability"].shape == (500, 500, 3)
    difference = drawn["joint_probability"].astype(int) - heat_map(joint, 20).astype(int)
    assert np.abs(difference).max() <= 2
