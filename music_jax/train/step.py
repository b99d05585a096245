"""One step of pre-training, as a pure function."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from music_jax.data.augment import augment_views
from music_jax.distributed.mesh import batch_sharding
from music_jax.train import guards
from music_jax.train.gradients import Metrics, accumulated_gradients, batch_gradients
from music_jax.train.recipe import Recipe
from music_jax.train.state import TrainState, gather, shard_for_update, state_shardings

_UNUSED: Any = None
_AUGMENTATION_STREAM = 1  # separates the augmentations' randomness from the initial weights'

StepFunction = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]


def training_step(
    state: TrainState, images: jax.Array, sample_index: jax.Array, *, recipe: Recipe, mesh: Mesh
) -> tuple[TrainState, Metrics]:
    """Takes one step; to be called under `jax.jit` and `jax.set_mesh(mesh)`.

    Args:
      state: State before the step.
      images: The hosts' crops, uint8 [batch, views, height, width, channels].
      sample_index: Global index of each sample, uint32 [batch].
      recipe: Static inputs of the step.
      mesh: The devices.

    Returns:
      The state after the step and scalars to log. If a guard trips, now or in an earlier step, the
      parameters do not change and `guard` holds the first such step.
    """
    embed = functools.partial(_embed, recipe, mesh)
    objective = guards.with_statistics(recipe.objective_of_step(state.step), recipe.guards)
    batch = (state.params, state.batch_stats, images, sample_index)
    if recipe.accumulation_steps == 1:
        loss, metrics, grads, batch_stats = batch_gradients(embed, objective, *batch)
    else:
        loss, metrics, grads, batch_stats = accumulated_gradients(
            embed,
            objective,
            *batch,
            steps=recipe.accumulation_steps,
            place=functools.partial(shard_for_update, mesh=mesh),
        )

    # From here on each device updates its own shard.
    grads = shard_for_update(grads, mesh)
    old_params = shard_for_update(state.params, mesh)
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
    learning_rate = recipe.schedule(state.step - state.guard.skipped)
    metrics = metrics | {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(learning_rate, jnp.float32),
    }
    return new_state, metrics


def augmented_views(recipe: Recipe, images: jax.Array, sample_index: jax.Array) -> jax.Array:
    """Returns the views that a step trains on, [batch, views, height, width, channels], normalized.

    Args:
      recipe: Static inputs of the step.
      images: The hosts' crops, uint8 [batch, views, height, width, channels].
      sample_index: Global index of each sample, uint32 [batch].
    """
    return augment_views(
        images,
        sample_index,
        jax.random.fold_in(jax.random.key(recipe.seed), _AUGMENTATION_STREAM),
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
    """Returns embeddings [batch, views, dim] of a batch's crops and the new running statistics."""
    views = augmented_views(recipe, images, sample_index)
    gathered = gather(params, mesh, recipe.dtype)
    _, embeddings, batch_stats = recipe.network.embed(gathered, batch_stats, views)
    return embeddings, batch_stats


def compile_step(recipe: Recipe, state: TrainState, mesh: Mesh) -> StepFunction:
    """Returns `training_step` without the recipe and the mesh, jitted over the mesh.

    The state's buffers are donated.

    Args:
      recipe: Static inputs of the step.
      state: The state, or its shapes.
      mesh: The devices; see `music_jax.distributed.mesh.make_data_mesh`.
    """
    jitted = _jit_step(recipe, state, mesh)
    values = np.uint32(recipe.seed), np.float32(recipe.base_learning_rate)

    def step(
        state: TrainState, images: jax.Array, sample_index: jax.Array
    ) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(mesh):  # the objective divides its work over this mesh
            return jitted(state, images, sample_index, *values)

    return step


def compile_skip(state: TrainState, mesh: Mesh) -> Callable[[TrainState], TrainState]:
    """Returns a jitted function that only counts a step; the state's buffers are donated.

    Args:
      state: The state, or its shapes.
      mesh: The devices.
    """

    def skip(state: TrainState) -> TrainState:
        guard = state.guard._replace(skipped=state.guard.skipped + 1)
        return dataclasses.replace(state, step=state.step + 1, guard=guard)

    states = state_shardings(state, mesh)
    return jax.jit(skip, in_shardings=(states,), out_shardings=states, donate_argnums=0)


def lower_step(
    recipe: Recipe, state: TrainState, mesh: Mesh, images_shape: tuple[int, ...]
) -> jax.stages.Lowered:
    """Lowers the step that `compile_step` runs, for devices that may be absent.

    Args:
      recipe: Static inputs of the step.
      state: The state, or its shapes.
      mesh: The devices, for example those of a topology's description.
      images_shape: Shape of the global batch of crops, [batch, views, height, width, channels].
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
    try:
        hash(shared)
    except TypeError:  # such as an objective that is a mutable object: no program is shared
        return _jit_shared_step.__wrapped__(shared, structure, tuple(shapes), mesh)
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

    step.__name__ = training_step.__name__  # as profiles and the compilation cache show it
    return jax.jit(
        step,
        in_shardings=(states, batch, batch, replicated, replicated),
        out_shardings=(states, replicated),
        donate_argnums=0,
    )
