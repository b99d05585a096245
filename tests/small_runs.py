"""Runs for tests that have to read one: saved without any training."""

import dataclasses

import jax
import numpy as np
from etils import epath

from music_jax.checkpoint.manager import Checkpoints
from music_jax.config import default_config, validate
from music_jax.data.order import TrainingOrder
from music_jax.distributed.mesh import make_data_mesh
from music_jax.train.recipe import make_recipe
from music_jax.train.state import abstract_state, save_state, state_shardings
from music_jax.workdir.run_config import write_config


def small_config(**backbone):
    """Of the small backbone on gray digits of 28 pixels, or of another given by its fields."""
    config = default_config()
    config.backbone.update({"name": "small_resnet", "stem": "strided"} | backbone)
    config.crop.size = config.crop.eval_resize = 28
    config.dataset.update({"name": "mnist", "num_channels": 1, "mean": (0.13,), "std": (0.31,)})
    config.projector.hidden_sizes = (32,)
    config.objective.update({"num_segments": 6, "units_per_segment": 5})
    return config


def save_run(directory, config, step=3):
    """Writes a workdir whose weights and statistics are all random."""
    validate(config)
    rng = np.random.Generator(np.random.Philox(key=0))
    shapes = abstract_state(config, make_recipe(config, steps_per_epoch=1).optimizer)

    def drawn(x):
        if len(x.shape) == 1:
            return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        return rng.standard_normal(x.shape, np.float32) / np.float32(np.sqrt(np.prod(x.shape[:-1])))

    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = dataclasses.replace(
        state,
        params=jax.tree.map(drawn, shapes.params),
        batch_stats=jax.tree.map(drawn, shapes.batch_stats),
    )
    state = jax.device_put(state, state_shardings(shapes, make_data_mesh()))
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(directory)
    save_state(checkpoints, step, state, TrainingOrder(100, 10, 0))
    checkpoints.close()
    write_config(directory, config)
    return state
