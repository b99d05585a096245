"""Pictures of a training: augmented views, and joint probabilities of the segments' units."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.distributed.mesh import batch_sharding
from music_jax.objectives import joint_probability
from music_jax.train.recipe import Recipe
from music_jax.train.state import TrainState, gather, state_shardings
from music_jax.train.step import augmented_views

_SAMPLES_SHOWN = 8
_MAX_EMBEDDED = 256  # samples that the joint probabilities are computed from
_MAX_UNITS = 512  # shown, of the first segments
_MIN_SIDE = 64  # pixels of a view as it is shown


class Pictures:
    """Draws a state and a batch.

    It runs a program of its own: that of the training, and so every bit of its result, is the same
    with and without it.
    """

    def __init__(
        self, config: config_dict.ConfigDict, recipe: Recipe, shapes: TrainState, mesh: Mesh
    ):
        """Prepares the program, which is compiled on first use.

        Args:
          config: The run's config.
          recipe: Static inputs of the training step.
          shapes: Shapes of the training state.
          mesh: The devices.
        """
        objective = config.objective
        self._mesh, self._recipe = mesh, recipe
        self._units = objective.units_per_segment
        segments = min(objective.num_segments, max(1, _MAX_UNITS // self._units))
        self._has_segments = objective.name == "music"
        at_once = min(config.batch_size // config.accumulation_steps, _MAX_EMBEDDED)
        rows = max(at_once // mesh.size, 1) * mesh.size

        def draw(
            params: Any, batch_stats: Any, images: jax.Array, sample_index: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            views = augmented_views(recipe, images[:rows], sample_index[:rows])
            shown = views[:_SAMPLES_SHOWN].astype(jnp.float32)
            if not self._has_segments:
                return shown, jnp.zeros((0, 0))
            gathered = gather(params, mesh, recipe.dtype)
            _, embeddings, _ = recipe.network.embed(gathered, batch_stats, views)
            of_first = embeddings[:, :, : segments * self._units]
            return shown, joint_probability(
                of_first[:, 0],
                of_first[:, 1],
                num_segments=segments,
                temperature=objective.temperature,
            )

        states, batch = state_shardings(shapes, mesh), batch_sharding(mesh)
        self._draw = jax.jit(
            draw,
            in_shardings=(states.params, states.batch_stats, batch, batch),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )

    def __call__(
        self, state: TrainState, images: jax.Array, sample_index: jax.Array
    ) -> dict[str, np.ndarray]:
        """Draws pictures; all processes call this together.

        Args:
          state: State after a step.
          images: That step's crops; see `music_jax.train.step.training_step`.
          sample_index: That step's sample indices.

        Returns:
          uint8 [height, width, channels] by name: `views`, with a column for each of the first
          samples, and for MUSIC `joint_probability`; see `heat_map`.
        """
        with jax.set_mesh(self._mesh):
            arrays = self._draw(state.params, state.batch_stats, images, sample_index)
        views, joint = (np.asarray(x.addressable_data(0)) for x in arrays)
        drawn = {"views": view_sheet(views, self._recipe.mean, self._recipe.std)}
        if self._has_segments:
            drawn["joint_probability"] = heat_map(joint, self._units)
        return drawn


def view_sheet(views: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Arranges normalized views in a grid, with those of a sample in a column.

    Args:
      views: [samples, views, height, width, channels].
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
      joint: [units, units]; see `music_jax.objectives.joint_probability`.
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
