"""One step of pre-training, as a pure function."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.config import from_json, view_augmentations
from music_jax.data.augment import ViewAugmentation, augment_views
from music_jax.distributed.mesh import batch_sharding
from music_jax.models import BACKBONES
from music_jax.models.network import Network, make_network
from music_jax.train import guards, sharding
from music_jax.train.gradients import accumulated_gradients, batch_gradients
from music_jax.train.objective import OBJECTIVES, Metrics, Objective
from music_jax.train.optimizer import OPTIMIZERS, make_schedule
from music_jax.train.state import TrainState, state_shardings

_UNUSED: Any = None
_AUGMENTATION_STREAM = 1  # separates the augmentations' randomness from the initial weights'


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step needs besides its arrays.

    Attributes:
      network: the backbone and its projection head.
      objective: what the embeddings of the two views are trained for.
      guards: what of them, of the loss and of the gradient is watched.
      optimizer: what turns gradients into updates.
      schedule: the learning rate of each step, for the log.
      base_learning_rate: Learning rate at a batch of 256.
      at_base_learning_rate: Makes the schedule and the optimizer for a base learning rate.
      views: the augmentation of each view.
      mean: of each channel, in [0, 1].
      std: of each channel, in [0, 1].
      dtype: what the backbone computes in.
      seed: of the augmentations.
      accumulation_steps: microbatches in which a batch is embedded.
    """

    network: Network
    objective: Objective
    guards: guards.Guards
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    base_learning_rate: float
    at_base_learning_rate: Callable[
        [float | jax.Array], tuple[optax.Schedule, optax.GradientTransformation]
    ]
    views: tuple[ViewAugmentation, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: jnp.dtype
    seed: int | jax.Array
    accumulation_steps: int


def make_recipe(config: config_dict.ConfigDict, steps_per_epoch: int) -> Recipe:
    """Returns the recipe that a config describes."""
    rate, shared = config.optimizer.base_learning_rate, config_dict.ConfigDict(config.to_dict())
    shared.update_from_flattened_dict({"seed": 0, "optimizer.base_learning_rate": 1.0})
    # Parts that are registered again under the same name make another recipe.
    parts = BACKBONES[config.backbone.name], OBJECTIVES[config.objective.name]
    recipe = _shared_recipe(json.dumps(shared.to_dict(), sort_keys=True), steps_per_epoch, parts)
    schedule, optimizer = recipe.at_base_learning_rate(rate)
    return dataclasses.replace(
        recipe,
        seed=config.seed,
        base_learning_rate=rate,
        schedule=schedule,
        optimizer=optimizer,
    )


@functools.lru_cache(maxsize=4)
def _shared_recipe(config_json: str, steps_per_epoch: int, parts: tuple[Any, ...]) -> Recipe:
    """Returns the recipe of all seeds and base learning rates, which thus share one program."""
    config = from_json(json.loads(config_json))

    def at_base_learning_rate(
        base: float | jax.Array,
    ) -> tuple[optax.Schedule, optax.GradientTransformation]:
        schedule = make_schedule(config, steps_per_epoch, base)
        return schedule, OPTIMIZERS[config.optimizer.name](schedule, config.optimizer)

    schedule, optimizer = at_base_learning_rate(1.0)
    return Recipe(
        network=make_network(config),
        objective=OBJECTIVES[config.objective.name](config.objective),
        guards=guards.make_guards(config),
        optimizer=optimizer,
        schedule=schedule,
        base_learning_rate=1.0,
        at_base_learning_rate=at_base_learning_rate,
        views=view_augmentations(config),
        mean=tuple(config.dataset.mean),
        std=tuple(config.dataset.std),
        dtype=jnp.dtype(config.compute_dtype),
        seed=0,
        accumulation_steps=config.accumulation_steps,
    )


def training_step(
    state: TrainState, images: jax.Array, sample_index: jax.Array, *, recipe: Recipe, mesh: Mesh
) -> tuple[TrainState, Metrics]:
    """Takes one step; to be called under `jax.jit` and `jax.set_mesh(mesh)`.

    Args:
      state: the state before it.
      images: the host's crops, uint8 [batch, views, height, width, channels].
      sample_index: global index of each sample, uint32 [batch].
      recipe: what to do with them.
      mesh: the devices that share the work.

    Returns:
      The state after the step and scalars to log. If a guard trips, now or in an earlier step, the
      parameters stay and `guard` tells the first such step.
    """
    embed = functools.partial(_embed, recipe, mesh)
    objective = guards.with_statistics(recipe.objective, recipe.guards)
    batch = (state.params, state.batch_stats, images, sample_index)
    if recipe.accumulation_steps == 1:
        loss, metrics, grads, batch_stats = batch_gradients(embed, objective, *batch)
    else:
        loss, metrics, grads, batch_stats = accumulated_gradients(
            embed,
            objective,
            *batch,
            steps=recipe.accumulation_steps,
            place=functools.partial(sharding.split_for_update, mesh=mesh),
        )

    # From here on each device sees to its part of the parameters.
    grads = sharding.split_for_update(grads, mesh)
    old_params = sharding.split_for_update(state.params, mesh)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, old_params)
    params = optax.apply_updates(old_params, updates)

    step = state.step + 1
    good, guard = guards.watch(recipe.guards, state.guard, step, loss, grad_norm, metrics)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
    new_state = TrainState(
        step=step,
        params=keep(params, old_params),
        batch_stats=keep(batch_stats, state.batch_stats),
        opt_state=keep(opt_state, state.opt_state),
        guard=guard,
    )
    metrics = metrics | {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(
            recipe.schedule(state.step - state.guard.skipped), jnp.float32
        ),
    }
    return new_state, metrics


def augmented_views(recipe: Recipe, images: jax.Array, sample_index: jax.Array) -> jax.Array:
    """The views that a step trains on, [batch, views, height, width, channels], normalized.

    Args:
      recipe: says how they are augmented.
      images: the host's crops, uint8 [batch, views, height, width, channels].
      sample_index: global index of each sample, uint32 [batch].
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), _AUGMENTATION_STREAM)
    return augment_views(
        images,
        sample_index,
        key,
        views=recipe.views,
        mean=recipe.mean,
        std=recipe.std,
        dtype=recipe.dtype,
    )


def _embed(
    recipe: Recipe,
    mesh: Mesh,
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    sample_index: jax.Array,
) -> tuple[jax.Array, Any]:
    """Embeddings [batch, views, dim] of a batch's crops, and the new running statistics."""
    views = augmented_views(recipe, images, sample_index)
    whole = sharding.gather(params, mesh, recipe.dtype)
    _, embeddings, batch_stats = recipe.network.embed(whole, batch_stats, views)
    return embeddings, batch_stats


StepFunction = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]


def compile_step(recipe: Recipe, state: TrainState, mesh: Mesh) -> StepFunction:
    """The step, jitted over the mesh; the state's buffers are donated.

    Args:
      recipe: what the step does.
      state: the state, or its shapes.
      mesh: the devices; see `music_jax.distributed.mesh.make_data_mesh`.

    Returns:
      A function as `training_step`, without the recipe and the mesh.
    """
    jitted = _jit_step(recipe, state, mesh)
    values = np.uint32(recipe.seed), np.float32(recipe.base_learning_rate)

    def step(
        state: TrainState, images: jax.Array, sample_index: jax.Array
    ) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(mesh):  # by which the objective finds the devices to divide its work over
            return jitted(state, images, sample_index, *values)

    return step


def compile_skip(state: TrainState, mesh: Mesh) -> Callable[[TrainState], TrainState]:
    """Goes past a step without its batch: nothing but the count of steps changes.

    Args:
      state: the state, or its shapes.
      mesh: the devices.

    Returns:
      A jitted function, to which the state's buffers are donated.
    """

    def skip(state: TrainState) -> TrainState:
        guard = state.guard._replace(skipped=state.guard.skipped + 1)
        return dataclasses.replace(state, step=state.step + 1, guard=guard)

    states = state_shardings(state, mesh)
    return jax.jit(skip, in_shardings=(states,), out_shardings=states, donate_argnums=0)


def lower_step(
    recipe: Recipe, state: TrainState, mesh: Mesh, images_shape: tuple[int, ...]
) -> jax.stages.Lowered:
    """The step as `compile_step` runs it, lowered for the mesh's devices, which need not be there.

    Args:
      recipe: what the step does.
      state: the state, or its shapes.
      mesh: the devices, for instance those of a topology's description.
      images_shape: of the global batch of crops, [batch, views, height, width, channels].

    Returns:
      What `.compile()` compiles.
    """
    batch = batch_sharding(mesh)
    arguments = (
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            state_shardings(state, mesh),
        ),
        jax.ShapeDtypeStruct(images_shape, jnp.uint8, sharding=batch),
        jax.ShapeDtypeStruct(images_shape[:1], jnp.uint32, sharding=batch),
        jax.ShapeDtypeStruct((), jnp.uint32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    with jax.set_mesh(mesh):
        return _jit_step(recipe, state, mesh).lower(*arguments)


def _jit_step(recipe: Recipe, state: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """Jits the step; seed and base learning rate are arguments, so that all share one program."""
    shared = dataclasses.replace(
        recipe, seed=0, base_learning_rate=1.0, schedule=_UNUSED, optimizer=_UNUSED
    )
    shapes, structure = jax.tree.flatten(jax.tree.map(jax.typeof, state))
    return _jit_shared_step(shared, structure, tuple(shapes), mesh)


@functools.lru_cache(maxsize=4)
def _jit_shared_step(
    recipe: Recipe, structure: Any, shapes: tuple[Any, ...], mesh: Mesh
) -> jax.stages.Wrapped:
    states = state_shardings(jax.tree.unflatten(structure, shapes), mesh)
    batch, replicated = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def step(
        state: TrainState,
        images: jax.Array,
        sample_index: jax.Array,
        seed: jax.Array,
        base_learning_rate: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        schedule, optimizer = recipe.at_base_learning_rate(base_learning_rate)
        own = dataclasses.replace(recipe, seed=seed, schedule=schedule, optimizer=optimizer)
        return training_step(state, images, sample_index, recipe=own, mesh=mesh)

    return jax.jit(
        step,
        in_shardings=(states, batch, batch, replicated, replicated),
        out_shardings=(states, replicated),
        donate_argnums=0,
    )
