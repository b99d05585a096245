"""The training state: all that a step changes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.models.network import INIT_COMPILER_OPTIONS, init_network
from music_jax.train import sharding
from music_jax.train.guards import GuardState, init_guard_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a training step takes and gives back.

    Attributes:
      step: int32, steps taken.
      params: the network's parameters.
      batch_stats: running statistics of its normalization layers.
      opt_state: the optimizer's state.
      guard: what the guards remember. From the step on that tripped one nothing else changes.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    guard: GuardState


def init_state(
    config: config_dict.ConfigDict,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The state before the first step, made on the mesh's devices from `config.seed`."""
    init = functools.partial(initial_state, config, optimizer)
    shardings = state_shardings(abstract_state(config, optimizer), mesh)
    compiled = jax.jit(init, out_shardings=shardings, compiler_options=INIT_COMPILER_OPTIONS)
    return compiled(jax.random.key(config.seed))


def abstract_state(
    config: config_dict.ConfigDict, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state's shapes and types, without any array."""
    return jax.eval_shape(
        functools.partial(initial_state, config, optimizer), jax.random.key(config.seed)
    )


def initial_state(
    config: config_dict.ConfigDict, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """The state before the first step, with weights drawn by a key; to be called under `jit`."""
    params, batch_stats = init_network(config, key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        guard=init_guard_state(),
    )


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Where each array of the state lives; see `music_jax.train.sharding`."""
    whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)
    return dataclasses.replace(
        whole,
        params=sharding.of_parameters(state.params, mesh),
        opt_state=sharding.of_updates(state.opt_state, mesh),
    )
