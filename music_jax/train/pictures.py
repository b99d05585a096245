"""Draws pictures of a training: augmented views, and joint probabilities of the units."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.config import is_centered
from music_jax.distributed.mesh import batch_sharding
from music_jax.objectives import joint_probability
from music_jax.objectives.global_batch import subtract_mean
from music_jax.train.recipe import Recipe
from music_jax.train.state import TrainState, gather, state_shardings
from music_jax.train.step import augmented_views

_SAMPLES_SHOWN = 8
_MAX_EMBEDDED = 256  # samples that the joint probabilities are computed from
_MAX_UNITS = 512  # shown, of the first segments
_MIN_SIDE = 64  # pixels of a view as it is shown


# Takes a state and the arguments of its last step to uint8 [height, width, channels] by name.
Draw = Callable[[TrainState, jax.Array, jax.Array], dict[str, np.ndarray]]


def make_draw(
    config: config_dict.ConfigDict, recipe: Recipe, shapes: TrainState, mesh: Mesh
) -> Draw:
    """Returns a function that draws pictures of a step; all processes call it together.

    It draws `views`, with a column for each of the first samples, and for MUSIC
    `joint_probability`; see `heat_map`. It is a separate program: that of the training, and so
    every bit of its result, is the same with and without pictures.

    Args:
      config: The run's config.
      recipe: Static inputs of the training step.
      shapes: Shapes of the training state.
      mesh: The devices.
    """
    objective = config.objective
    units, has_segments = objective.units_per_segment, objective.name == "music"
    segments = min(objective.num_segments, max(1, _MAX_UNITS // units))
    at_once = min(config.batch_size // config.accumulation_steps, _MAX_EMBEDDED)
    rows = max(at_once // mesh.size, 1) * mesh.size

    def compute(
        params: Any, batch_stats: Any, images: jax.Array, sample_index: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        views = augmented_views(recipe, images[:rows], sample_index[:rows])
        shown = views[:_SAMPLES_SHOWN].astype(jnp.float32)
        if not has_segments:
            return shown, jnp.zeros((0, 0))
        gathered = gather(params, mesh, recipe.dtype)
        _, embeddings, _ = recipe.network.embed(gathered, batch_stats, views)
        a, b = embeddings[:, 0, : segments * units], embeddings[:, 1, : segments * units]
        if is_centered(config):
            a, b = subtract_mean(a), subtract_mean(b)
        return shown, joint_probability(
            a, b, num_segments=segments, temperature=objective.temperature
        )

    states, batch = state_shardings(shapes, mesh), batch_sharding(mesh)
    jitted = jax.jit(
        compute,
        in_shardings=(states.params, states.batch_stats, batch, batch),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )

    def draw(
        state: TrainState, images: jax.Array, sample_index: jax.Array
    ) -> dict[str, np.ndarray]:
        with jax.set_mesh(mesh):
            arrays = jitted(state.params, state.batch_stats, images, sample_index)
        views, joint = (np.asarray(x.addressable_data(0)) for x in arrays)
        drawn = {"views": view_sheet(views, recipe.mean, recipe.std)}
        if has_segments:
            drawn["joint_probability"] = heat_map(joint, units)
        return drawn

    return draw


def view_sheet(views: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Arranges normalized views in a grid, with those of a sample in a column.

    Args:
      views: Normalized views [samples, views, height, width, channels].
      mean: Mean of each channel, in [0, 1], that was subtracted.
      std: Standard deviation of each channel that was divided by.

    Returns:
      uint8 [views * side, samples * side, channels].
    """
    values = views * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    samples, num_views, height, width, channels = values.shape
    sheet = values.transpose(1, 2, 0, 3, 4).reshape(num_views * height, samples * width, channels)
    return _enlarged(np.round(255 * np.clip(sheet, 0, 1)).astype(np.uint8), _MIN_SIDE, height)


def heat_map(joint: np.ndarray, units_per_segment: int) -> np.ndarray:
    """Colors joint probabilities, from black to yellow.

    The scale is that of the square root and ends at 1/K, the value on the diagonal of a segment of
    K units if all are used equally and the views agree. Two independent segments then have an even
    color, at sqrt(1/K) of the scale.

    Args:
      joint: Joint probabilities [units, units]; see `music_jax.objectives.joint_probability`.
      units_per_segment: Number of units K of each segment.

    Returns:
      uint8 [side, side, 3], where `side` is a multiple of the number of units.
    """
    from matplotlib import colormaps

    shares = np.sqrt(np.clip(joint * units_per_segment, 0, 1))
    colors = np.round(255 * colormaps["inferno"](shares)[..., :3]).astype(np.uint8)
    return _enlarged(colors, _MAX_UNITS, len(joint))


def _enlarged(image: np.ndarray, wanted: int, side: int) -> np.ndarray:
    times = max(1, wanted // side)
    return image.repeat(times, axis=0).repeat(times, axis=1)
