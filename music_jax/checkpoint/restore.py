"""A run's checkpoint, by step, by directory or the latest."""

import os

from etils import epath
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax.checkpoint.manager import Checkpoints
from music_jax.errors import UserError
from music_jax.train.state import TrainState, abstract_state
from music_jax.train.step import Recipe, make_recipe
from music_jax.workdir.directory import absolute_path


def restore_run(
    directory: epath.Path, config: config_dict.ConfigDict, checkpoint: str | None, mesh: Mesh
) -> tuple[int, Recipe, TrainState]:
    """Restores a checkpoint of a run, which is left as it is.

    Args:
      directory: the run's workdir, as an absolute path.
      config: the run's.
      checkpoint: its step, or its directory; None for the latest whole one.
      mesh: the devices to restore onto.

    Returns:
      The step, the recipe (whose schedule means nothing here) and the state.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    recipe = make_recipe(config, steps_per_epoch=1)  # the optimizer is only needed for its shapes
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        if checkpoint is None:
            step = checkpoints.latest_valid_step()
        else:
            step = _named_step(checkpoint, directory, checkpoints.all_steps())
            checkpoints.check_whole(step)
        if step is None:
            raise UserError(f"{directory} has no checkpoint yet")
        state = checkpoints.restore(step, abstract_state(config, recipe.optimizer), mesh)
    finally:
        checkpoints.close()
    return step, recipe, state


def _named_step(checkpoint: str, directory: epath.Path, steps: list[int]) -> int:
    name = checkpoint.rstrip("/").rpartition("/")[2]
    if "/" in checkpoint:
        where = os.fspath(absolute_path(checkpoint.rstrip("/")).parent)
        own = os.fspath(directory / "checkpoints")
        if "://" not in own:
            where, own = os.path.realpath(where), os.path.realpath(own)
        if where != own:
            raise UserError(f"--checkpoint={checkpoint} is not below {directory}/checkpoints")
    if not name.isdigit() or int(name) not in steps:
        known = ", ".join(str(step) for step in sorted(steps)) or "none"
        raise UserError(f"there is no checkpoint {checkpoint!r}; the run has the steps {known}")
    return int(name)
