"""One step of pre-training as a pure function, and the gradients of a batch in microbatches."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.data.augment import augment_views
from music_jax.distributed.mesh import batch_sharding
from music_jax.errors import UserError
from music_jax.train import guards
from music_jax.train.guards import Metrics, Objective
from music_jax.train.recipe import Crops, Recipe
from music_jax.train.state import TrainState, gather, shard_for_update, state_shardings

# Separate the randomness of augmentations and of layers from that of the initial weights.
_AUGMENTATION_STREAM, _LAYER_STREAM = 1, 2

_RESERVED = {"epoch", "images_per_second", "learning_rate", "loss", "grad_norm", "step"}
_RESERVED |= {*guards.STATISTICS}

StepFunction = Callable[[TrainState, Crops, jax.Array], tuple[TrainState, Metrics]]
# Maps parameters, running statistics, images [batch, ...] and sample indices [batch] to embeddings
# [batch, views, dim] and new running statistics.
Embed = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]]
# Maps embeddings [batch, views, dim] to the loss and further metrics.
ViewsObjective = Callable[[jax.Array], tuple[jax.Array, Metrics]]


def training_step(
    state: TrainState, images: Crops, sample_index: jax.Array, *, recipe: Recipe, mesh: Mesh
) -> tuple[TrainState, Metrics]:
    """Takes one step; to be called under `jax.jit` and `jax.set_mesh(mesh)`.

    Args:
      state: State before the step.
      images: The hosts' crops.
      sample_index: Global index of each sample, uint32 [batch].
      recipe: Static inputs of the step.
      mesh: The devices.

    Returns:
      The state after the step and scalars to log. If a guard trips, now or in an earlier step, the
      parameters do not change and `guard` holds the first such step.
    """
    objective_of_step = recipe.objective_of_step(state.step)

    def objective(embeddings: jax.Array) -> tuple[jax.Array, Metrics]:
        loss, metrics = mean_over_pairs(objective_of_step, embeddings)
        if taken := sorted(x for x in metrics if x in _RESERVED or x.startswith("online_")):
            raise UserError(
                f"the objective's scalars include {taken[0]!r}, which is logged by the training; "
                "give it another name"
            )
        if recipe.guards.enabled:
            metrics = metrics | recipe.statistics(jax.lax.stop_gradient(embeddings[:, 0]))
        return loss, metrics

    loss, metrics, grads, batch_stats = batch_gradients(
        functools.partial(_embed, recipe, mesh),
        objective,
        state.params,
        state.batch_stats,
        images,
        sample_index,
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
    rate = jnp.asarray(recipe.schedule(state.step - state.guard.skipped), jnp.float32)
    return new_state, metrics | {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate}


def mean_over_pairs(objective: Objective, embeddings: jax.Array) -> tuple[jax.Array, Metrics]:
    """Returns the mean loss and metrics over the pairs of a global view with every other view.

    With views 0 and 1 global and the others local, these are (0, 1), (0, 2), (1, 2), (0, 3), ...

    Args:
      objective: Loss of the embeddings of two views.
      embeddings: Embeddings [batch, views, dim].
    """
    pairs = [(a, b) for b in range(1, embeddings.shape[1]) for a in range(min(b, 2))]
    found = [objective(embeddings[:, a], embeddings[:, b]) for a, b in pairs]
    if len(found) == 1:
        return found[0]
    return jax.tree.map(lambda *values: jnp.mean(jnp.stack(values)), *found)


def batch_gradients(
    embed: Embed,
    objective: ViewsObjective,
    params: Any,
    batch_stats: Any,
    images: Any,
    sample_index: jax.Array,
    *,
    steps: int = 1,
    place: Callable[[Any], Any] = lambda grads: grads,
) -> tuple[jax.Array, Metrics, Any, Any]:
    """Computes the gradients of a batch, in microbatches if its activations do not fit.

    The loss is that of the whole batch in any case. With microbatches, a first pass embeds them and
    stores only their embeddings; the objective gives the loss and its gradient with respect to
    these; a second pass embeds each microbatch again and propagates that gradient to the
    parameters. This costs one more forward pass and needs memory for the activations of one
    microbatch. Both passes augment the views identically, since their randomness is keyed by
    sample.

    BatchNorm normalizes over a microbatch (on all devices), so that the gradient differs from that
    of one pass. The running statistics are updated once per microbatch, in the first pass.

    Sample `n` is in microbatch `n % steps`: the same on any number of devices, and each device
    keeps its samples.

    Args:
      embed: Network in training mode.
      objective: Loss of the embeddings of all views.
      params: Parameters.
      batch_stats: Running statistics.
      images: Images [batch, ...], or a tree of them.
      sample_index: Global index of each sample, [batch].
      steps: Number of microbatches, a divisor of the batch size.
      place: Function that shards gradients for their summation.

    Returns:
      The loss, the metrics, the gradients and the running statistics after the batch.

    Reference:
      Gao et al, `Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
      <https://arxiv.org/abs/2101.06983>`_, 2021
    """

    def loss_in_one_pass(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        embeddings, new_stats = embed(params, batch_stats, images, sample_index)
        loss, metrics = objective(embeddings)
        return loss, (metrics, new_stats)

    if steps == 1:
        whole = jax.value_and_grad(loss_in_one_pass, has_aux=True)
        (loss, (metrics, new_stats)), grads = whole(params)
        return loss, metrics, grads, new_stats

    def microbatch(batch: Any, i: jax.Array) -> Any:  # arrays [batch / steps, ...]
        def rows(x: jax.Array) -> jax.Array:
            parts = x.reshape(-1, steps, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(parts, i, axis=1, keepdims=False)

        return jax.tree.map(rows, batch)

    def first_pass(stats: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        embeddings, stats = embed(params, stats, *microbatch((images, sample_index), i))
        return stats, embeddings

    def second_pass(grads: Any, i: jax.Array) -> tuple[Any, None]:
        part = microbatch((images, sample_index), i)
        _, pullback = jax.vjp(lambda params: embed(params, batch_stats, *part)[0], params)
        (more,) = pullback(microbatch(cotangents, i))
        return jax.tree.map(jnp.add, grads, place(more)), None

    new_stats, parts = jax.lax.scan(first_pass, batch_stats, jnp.arange(steps))
    embeddings = parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])  # [batch, views, dim]
    (loss, metrics), cotangents = jax.value_and_grad(objective, has_aux=True)(embeddings)
    zeros = place(jax.tree.map(jnp.zeros_like, params))
    grads, _ = jax.lax.scan(second_pass, zeros, jnp.arange(steps))
    return loss, metrics, grads, new_stats


def augmented_views(recipe: Recipe, images: Crops, sample_index: jax.Array) -> Crops:
    """Returns the views that a step trains on, normalized, in the structure of the crops.

    Args:
      recipe: Static inputs of the step.
      images: The hosts' crops.
      sample_index: Global index of each sample, uint32 [batch].
    """
    groups, structure = jax.tree.flatten(images)
    key = jax.random.fold_in(jax.random.key(recipe.seed), _AUGMENTATION_STREAM)
    views, first_view = [], 0
    for crops, augmentations in zip(groups, (recipe.views, recipe.local_views), strict=False):
        views.append(
            augment_views(
                crops,
                sample_index,
                key,
                views=augmentations,
                mean=recipe.mean,
                std=recipe.std,
                dtype=recipe.dtype,
                first_view=first_view,
            )
        )
        first_view += len(augmentations)
    return jax.tree.unflatten(structure, views)


def _embed(
    recipe: Recipe,
    mesh: Mesh,
    params: Any,
    batch_stats: Any,
    images: Crops,
    sample_index: jax.Array,
) -> tuple[jax.Array, Any]:
    """Returns embeddings [batch, views, dim] of a batch's crops and the new running statistics.

    The running statistics are those after the two views: inference sees images of their kind.
    """
    views, *local = jax.tree.leaves(augmented_views(recipe, images, sample_index))
    gathered = gather(params, mesh, recipe.dtype)
    # The first sample tells apart steps and microbatches, on any number of devices.
    key = jax.random.fold_in(jax.random.key(recipe.seed), _LAYER_STREAM)
    key = jax.random.fold_in(key, sample_index[0])
    _, embeddings, new_stats = recipe.network.embed(gathered, batch_stats, views, key)
    if local:
        key = jax.random.fold_in(key, 1)
        _, others, _ = recipe.network.embed(gathered, batch_stats, local[0], key)
        embeddings = jnp.concatenate([embeddings, others], axis=1)
    return embeddings, new_stats


def compile_step(recipe: Recipe, state: TrainState, mesh: Mesh) -> StepFunction:
    """Returns `training_step` without the recipe and the mesh, jitted over the mesh.

    The state's buffers are donated.

    Args:
      recipe: Static inputs of the step.
      state: The state, or its shapes.
      mesh: The devices; see `music_jax.distributed.mesh.make_data_mesh`.
    """
    jitted, values = _jit_step(recipe, state, mesh), _values(recipe)

    def step(
        state: TrainState, images: Crops, sample_index: jax.Array
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


def crop_shapes(config: config_dict.ConfigDict) -> Any:
    """Returns the shapes of the crops of a global batch, as `jax.ShapeDtypeStruct`s."""

    def shape(num_views: int, side: int) -> jax.ShapeDtypeStruct:
        size = config.batch_size, num_views, side, side, config.dataset.num_channels
        return jax.ShapeDtypeStruct(size, config.dataset.pixel_type)

    views, local = shape(2, config.crop.size), config.local_views
    return (views, shape(local.count, local.size)) if local.count else views


def lower_step(recipe: Recipe, state: TrainState, mesh: Mesh, images: Any) -> jax.stages.Lowered:
    """Lowers the step that `compile_step` runs, for devices that may be absent.

    Args:
      recipe: Static inputs of the step.
      state: The shapes of the state.
      mesh: The devices, for example those of a topology's description.
      images: The shapes of the crops; see `crop_shapes`.
    """
    batch = jax.tree.leaves(images)[0].shape[:1]
    sample_index = jax.ShapeDtypeStruct(batch, jnp.uint32)
    with jax.set_mesh(mesh):
        jitted = _jit_step(recipe, state, mesh)
        return jitted.lower(state, images, sample_index, *_values(recipe))


def _values(recipe: Recipe) -> tuple[np.uint32, np.float32]:
    """Returns the inputs of the step that are arguments, so that all seeds share one program."""
    return np.uint32(recipe.seed), np.float32(recipe.base_learning_rate)


def _jit_step(recipe: Recipe, state: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    shared = dataclasses.replace(recipe, seed=0, base_learning_rate=0.0)
    shardings, structure = jax.tree.flatten(state_shardings(state, mesh))
    return _jit_shared_step(shared, structure, tuple(shardings), mesh)


@functools.lru_cache(maxsize=4)
def _jit_shared_step(
    recipe: Recipe, structure: Any, shardings: tuple[NamedSharding, ...], mesh: Mesh
) -> jax.stages.Wrapped:
    states = jax.tree.unflatten(structure, shardings)
    batch, replicated = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def step(
        state: TrainState,
        images: Crops,
        sample_index: jax.Array,
        seed: jax.Array,
        base_learning_rate: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        own = dataclasses.replace(recipe, seed=seed, base_learning_rate=base_learning_rate)
        return training_step(state, images, sample_index, recipe=own, mesh=mesh)

    step.__name__ = training_step.__name__  # as profiles and the compilation cache show it
    return jax.jit(
        step,
        in_shardings=(states, batch, batch, replicated, replicated),
        out_shardings=(states, replicated),
        donate_argnums=0,
    )
