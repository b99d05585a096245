"""TensorBoard and Weights & Biases, enabled or not, and failing; pictures, pixel by pixel."""

import functools
import importlib.util
import json
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from small_runs import small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from music_jax.config import default_config
from music_jax.data.augment import normalize_images
from music_jax.data.order import TrainingOrder
from music_jax.data.pictures import as_pictures
from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.errors import UserError
from music_jax.objectives import joint_probability
from music_jax.train import metric_logger
from music_jax.train.metric_logger import (
    MetricLogger,
    TensorBoard,
    WeightsAndBiases,
    _heat_map,
    _view_sheet,
    make_draw,
)
from music_jax.train.recipe import make_recipe
from music_jax.train.state import abstract_state, init_state
from music_jax.train.step import augmented_views, crop_shapes


def _config(**fields):
    config = default_config()
    config.update({"tensorboard": False} | fields)
    return config


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_missing_tensorboardx_is_logged(tmp_path, nothing_installed, capsys):
    with MetricLogger(_config(tensorboard=True), epath.Path(tmp_path)) as logger:
        assert not logger.shows_images
    assert capsys.readouterr().out.count("[tensorboard]'") == 1
    with MetricLogger(_config(), epath.Path(tmp_path)):
        pass
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def _read_events(workdir):
    """Scalars and sizes of images by tag, as TensorBoard shows them."""
    read = EventAccumulator(str(workdir)).Reload()
    shown = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    for tag in read.Tags()["images"]:
        shown[tag] = [(e.step, [e.width, e.height]) for e in read.Images(tag)]
    return shown


def test_tensorboard_shows_each_step_once_after_a_resume_and_a_rewind(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 100)
    writer = TensorBoard(epath.Path(tmp_path))
    writer.start(0)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
        writer.write(step, {"views": np.zeros((6, 4, 1), np.uint8)})
    writer.close(failed=True)
    monkeypatch.setattr(os, "getpid", lambda: 101)
    resumed = TensorBoard(epath.Path(tmp_path))
    resumed.start(3)
    resumed.write(4, {"loss": 40.0})
    resumed.start(0)
    resumed.write(1, {"loss": 10.0})
    resumed.start(1)
    resumed.write(2, {"loss": 20.0})
    resumed.write(2, {"views": np.zeros((6, 4, 3), np.uint8)})
    resumed.close(failed=False)
    assert len(list(tmp_path.iterdir())) == 4
    assert _read_events(tmp_path) == {"loss": [(1, 10.0), (2, 20.0)], "views": [(2, [4, 6])]}


def test_enabling_wandb_without_its_package_is_an_error(tmp_path, nothing_installed):
    with pytest.raises(UserError, match=r"wandb_project = 'digits' needs .*pip install wandb"):
        MetricLogger(_config(wandb_project="digits"), epath.Path(tmp_path))


class _Failing:
    def __init__(self, fails):
        self.fails, self.seen = fails, []

    def start(self, step):
        self.seen.append(step)

    def write(self, step, values):
        self.seen.append(step)
        if step == self.fails:
            raise OSError("No space left on device")

    def close(self, *, failed):
        self.seen.append("failed" if failed else "closed")


def test_a_writer_that_fails_is_reported_and_dropped_and_the_others_continue(tmp_path, capsys):
    first, second = _Failing(fails=2), _Failing(fails=None)
    training = types.SimpleNamespace(order=TrainingOrder(30, 10, 0), num_steps=9)
    with MetricLogger(_config(batch_size=10), epath.Path(tmp_path)) as logger:
        logger._writers = {"TensorBoard": first, "Weights & Biases": second}
        with logger.steps(0, training):
            for step in (1, 2, 3):
                logger.write(step, {"loss": 1.0})
    out = capsys.readouterr().out
    assert out.count("TensorBoard failed and is no longer written: OSError: No space left") == 1
    assert first.seen == [0, 1, 2]
    assert second.seen == [0, 1, 2, 3, "closed"]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in logged] == [(1, 1 / 3), (2, 2 / 3), (3, 1)]
    assert logged[0]["images_per_second"] is None
    assert logged[1]["images_per_second"] > 0


def test_a_run_that_ends_in_an_error_is_closed_as_failed(tmp_path):
    writer, logger = _Failing(fails=None), MetricLogger(_config(), epath.Path(tmp_path))
    logger._writers = {"TensorBoard": writer}
    with pytest.raises(KeyboardInterrupt), logger:
        raise KeyboardInterrupt
    assert writer.seen == ["failed"]


@pytest.mark.parametrize("damaged", ["{", '{"id": "../x"}', '{"id": 3}', "[]"])
def test_a_damaged_run_id_is_replaced_and_a_valid_one_reused(tmp_path, damaged, capsys):
    (tmp_path / "wandb.json").write_text(damaged)
    writer = WeightsAndBiases(_config(wandb_project="x"), epath.Path(tmp_path))
    new = writer._run_id()
    assert "is damaged" in capsys.readouterr().out
    assert metric_logger._RUN_ID.fullmatch(new)
    assert writer._run_id() == new
    assert capsys.readouterr().out == ""


def test_wandb_rejects_repeated_steps(tmp_path):
    writer = WeightsAndBiases(_config(wandb_project="x"), epath.Path(tmp_path))
    logged = []

    class Run:
        step = 5

        @staticmethod
        def log(values, step):
            logged.append(step)

    writer._run = Run
    for step in (4, 5, 6):
        writer.write(step, {"loss": np.float32(1)})
    assert logged == [5, 6]


@pytest.mark.parametrize(("side", "times"), [(8, 8), (48, 1), (224, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_shows_each_sample_above_its_other_view(side, times, channels):
    rng = np.random.Generator(np.random.Philox(key=1))
    images = rng.integers(0, 256, (3, 2, side, side, channels), np.uint8)
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels]
    normalized = np.asarray(normalize_images(images, mean=mean, std=std))
    sheet = _view_sheet(as_pictures(normalized, mean=mean, std=std, pixel_type="uint8"))
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
    image = _heat_map(joint, units_per_segment=8)
    assert image.shape == (512, 512, 3)
    light = image[::32, ::32].astype(int).sum(axis=-1)
    within = np.kron(np.eye(2), np.ones((8, 8))) > 0
    diagonal = np.eye(16, dtype=bool)
    assert np.all(light[diagonal] == light.max())
    assert np.all(light[within & ~diagonal] == light.min())
    between = np.unique(light[~within])
    assert len(between) == 1
    assert light.min() < between[0] < light.max()
    assert np.any(_heat_map(rng.random((16, 16)) / 16, 8) != image)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "center", "local_views"), [(1, False, 3), (4, False, 0), (4, True, 0)]
)
def test_pictures_show_the_views_of_the_training_step(devices, center, local_views):
    config = small_config()
    config.batch_size = 16
    config.local_views.update({"count": local_views, "size": 12})
    config.objective.center = center
    config.objective.update({"num_segments": 40, "units_per_segment": 20})  # 800: not all are shown
    config.augmentation.view_1.update({"noise_probability": 1.0, "noise_std": 0.2})
    mesh, recipe = make_data_mesh(devices), make_recipe(config, steps_per_epoch=1)
    rng = np.random.Generator(np.random.Philox(key=3))
    images = jax.tree.map(lambda x: rng.integers(0, 256, x.shape, np.uint8), crop_shapes(config))
    indices = np.arange(16, dtype=np.uint32)
    state = init_state(config, recipe.optimizer, mesh)
    draw = make_draw(config, recipe, abstract_state(config, recipe.optimizer), mesh)
    batch = jax.device_put((images, indices), batch_sharding(mesh))
    drawn = draw(state, *batch)

    augmented = jax.jit(functools.partial(augmented_views, recipe))(images, indices)
    views, *local = jax.tree.leaves(augmented)
    params, batch_stats = jax.device_get((state.params, state.batch_stats))
    _, z, _ = jax.jit(recipe.network.embed)(params, batch_stats, views)
    z = z[:, :, : 25 * 20]
    if center:
        z -= jnp.mean(z, axis=0, keepdims=True)
    joint = np.asarray(joint_probability(z[:, 0], z[:, 1], num_segments=25))
    assert ("local_views" in drawn) == bool(local_views)
    for name, group in zip(("views", "local_views"), (views, *local), strict=False):
        pictures = as_pictures(
            np.asarray(group[:8]), mean=recipe.mean, std=recipe.std, pixel_type="uint8"
        )
        np.testing.assert_array_equal(drawn[name], _view_sheet(pictures))
    assert drawn["joint_probability"].shape == (500, 500, 3)
    difference = drawn["joint_probability"].astype(int) - _heat_map(joint, 20).astype(int)
    assert np.abs(difference).max() <= 2
