"""One step of pre-training, as a pure function."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.config import view_augmentations
from music_jax.data.augment import ViewAugmentation, augment_views
from music_jax.mesh import batch_sharding
from music_jax.models.network import Network, make_network
from music_jax.train.objective import OBJECTIVES, Metrics, Objective
from music_jax.train.optimizer import OPTIMIZERS, make_schedule
from music_jax.train.state import TrainState, state_shardings

_AUGMENTATION_STREAM = 1  # separates the augmentations' randomness from the initial weights'


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step needs besides its arrays.

    Attributes:
      network: the backbone and its projection head.
      objective: what the embeddings of the two views are trained for.
      optimizer: what turns gradients into updates.
      schedule: the learning rate of each step, for the log.
      views: the augmentation of each view.
      mean: of each channel, in [0, 1].
      std: of each channel, in [0, 1].
      dtype: what the backbone computes in.
      seed: of the augmentations.
    """

    network: Network
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    views: tuple[ViewAugmentation, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: jnp.dtype
    seed: int


def make_recipe(config: config_dict.ConfigDict, steps_per_epoch: int) -> Recipe:
    """The recipe that a config describes."""
    schedule = make_schedule(config, steps_per_epoch)
    return Recipe(
        network=make_network(config),
        objective=OBJECTIVES[config.objective.name](config.objective),
        optimizer=OPTIMIZERS[config.optimizer.name](schedule, config.optimizer),
        schedule=schedule,
        views=view_augmentations(config),
        mean=tuple(config.dataset.mean),
        std=tuple(config.dataset.std),
        dtype=jnp.dtype(config.compute_dtype),
        seed=config.seed,
    )


def training_step(
    state: TrainState, images: jax.Array, sample_index: jax.Array, *, recipe: Recipe
) -> tuple[TrainState, Metrics]:
    """Takes one step.

    Args:
      state: the state before it.
      images: the host's crops, uint8 [batch, views, height, width, channels].
      sample_index: global index of each sample, uint32 [batch].
      recipe: what to do with them.

    Returns:
      The state after the step and scalars to log. If the loss or the gradient is not finite, now or
      in an earlier step, the parameters stay and `diverged_step` tells the first such step.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), _AUGMENTATION_STREAM)
    views = augment_views(
        images,
        sample_index,
        key,
        views=recipe.views,
        mean=recipe.mean,
        std=recipe.std,
        dtype=recipe.dtype,
    )

    def loss_of(params: dict) -> tuple[jax.Array, tuple[dict, Metrics]]:
        _, embeddings, batch_stats = recipe.network.embed(params, state.batch_stats, views)
        loss, metrics = recipe.objective(embeddings[:, 0], embeddings[:, 1])
        return loss, (batch_stats, metrics)

    (loss, (batch_stats, metrics)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    good = finite & (state.diverged_step < 0)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
    step = state.step + 1
    new_state = TrainState(
        step=step,
        params=keep(params, state.params),
        batch_stats=keep(batch_stats, state.batch_stats),
        opt_state=keep(opt_state, state.opt_state),
        diverged_step=jnp.where(finite | (state.diverged_step >= 0), state.diverged_step, step),
    )
    metrics = metrics | {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(recipe.schedule(state.step), jnp.float32),
    }
    return new_state, metrics


StepFunction = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]


def compile_step(recipe: Recipe, state: TrainState, mesh: Mesh) -> StepFunction:
    """The step, jitted over the mesh; the state's buffers are donated.

    Args:
      recipe: what the step does.
      state: the state, or its shapes.
      mesh: the devices; the batch is split over the axis `data`.

    Returns:
      A function as `training_step`, without the recipe.
    """
    jitted = jit_step(recipe, state, mesh)

    def step(
        state: TrainState, images: jax.Array, sample_index: jax.Array
    ) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(mesh):  # by which the objective finds the devices to divide its work over
            return jitted(state, images, sample_index)

    return step


def jit_step(recipe: Recipe, state: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """What `compile_step` calls, to be lowered under `jax.set_mesh(mesh)` by whoever plans it."""
    states = state_shardings(state, mesh)
    batch = batch_sharding(mesh)
    return jax.jit(
        functools.partial(training_step, recipe=recipe),
        in_shardings=(states, batch, batch),
        out_shardings=(states, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
