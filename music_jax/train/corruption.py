"""Checks for silent data corruption: devices that hold or compute wrong bits.

Each device computes checksums of the buffers that it holds itself, and only these are compared.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.distributed.mesh import BATCH_AXES
from music_jax.train.gradients import Metrics
from music_jax.train.state import TrainState, state_shardings
from music_jax.train.step import StepFunction

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_MAX_NAMES = 3  # arrays and devices that a message lists


class CorruptionChecks:
    """The checks that a config enables."""

    def __init__(self, config: config_dict.ConfigDict, state: TrainState, mesh: Mesh):
        """Prepares the checks.

        Args:
          config: The run's config; `guards` sets the intervals of the checks.
          state: The state, or its shapes.
          mesh: The devices.
        """
        self._replicas_every = config.guards.check_replicas_every_steps
        self._determinism_every = config.guards.check_determinism_every_steps
        self._devices = list(mesh.devices.flat)
        self._leaves = _leaves(state, mesh)
        self._checksums = _compile_checksums(state, mesh)
        states = state_shardings(state, mesh)
        self._copy = jax.jit(
            lambda state: jax.tree.map(jnp.copy, state),
            in_shardings=(states,),
            out_shardings=states,
        )

    def step(
        self,
        number: int,
        step_function: StepFunction,
        state: TrainState,
        batch: tuple[jax.Array, jax.Array],
    ) -> tuple[TrainState, Metrics, str | None]:
        """Takes a step; if it is to be checked, takes it twice, which needs memory for two states.

        Args:
          number: Number of the step, from 1.
          step_function: Function that takes it; the state's buffers are donated.
          state: State before the step.
          batch: Further arguments of the step.

        Returns:
          The state after the step, its metrics and, if the results differ, a message.
        """
        if not _due(number, self._determinism_every):
            return *step_function(state, *batch), None
        once = self._checksums(step_function(self._copy(state), *batch)[0])
        state, metrics = step_function(state, *batch)
        wrong = np.not_equal(once, self._checksums(state))  # [devices, leaves]
        if not wrong.any():
            return state, metrics, None
        return state, metrics, f"repeating the step gave other bits {self._where(wrong)}"

    def replicas(self, number: int, state: TrainState, *, saving: bool) -> str | None:
        """Compares devices that should hold the same bits, if a check is due.

        Args:
          number: Number of the step.
          state: State after the step.
          saving: Whether the state is about to be saved, and checked if any checks are enabled.

        Returns:
          A message if they differ, otherwise None.
        """
        every = self._replicas_every
        if not (_due(number, every) or (every and saving)):
            return None
        wrong = differing(self._checksums(state), [groups for _, groups in self._leaves])
        return f"devices differ {self._where(wrong)}" if wrong.any() else None

    def _where(self, wrong: np.ndarray) -> str:
        devices = [self._devices[i] for i in np.flatnonzero(wrong.any(axis=1))]
        names = [self._leaves[i][0] for i in np.flatnonzero(wrong.any(axis=0))]
        places = [f"{device} of process {device.process_index}" for device in devices]
        return f"in {_some(names)} on {_some(places)}"


def differing(checksums: np.ndarray, groups: list[list[list[int]]]) -> np.ndarray:
    """Returns whether each device holds other bits than the majority of its group.

    Args:
      checksums: Checksums [devices, leaves].
      groups: Groups of devices that hold the same part of a leaf, for each leaf.

    Returns:
      bool [devices, leaves]. Without a majority, all devices of the group are marked.
    """
    wrong = np.zeros(checksums.shape, bool)
    for leaf, parts in enumerate(groups):
        for devices in parts:
            values, counts = np.unique(checksums[devices, leaf], return_counts=True)
            if len(values) > 1:
                most = values[np.argmax(counts)]
                tied = 2 * np.max(counts) <= len(devices)
                wrong[devices, leaf] = tied | (checksums[devices, leaf] != most)
    return wrong


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _leaves(state: TrainState, mesh: Mesh) -> list[tuple[str, list[list[int]]]]:
    """Returns each array's name and the groups of devices that hold the same part of it."""
    number = {device: i for i, device in enumerate(mesh.devices.flat)}
    found = []
    shardings = jax.tree.leaves(state_shardings(state, mesh))
    arrays = jax.tree_util.tree_flatten_with_path(state)[0]
    for (path, array), sharding in zip(arrays, shardings, strict=True):
        parts: dict[Any, list[int]] = defaultdict(list)
        for device, index in sharding.devices_indices_map(array.shape).items():
            parts[str(index)].append(number[device])
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.append((name, [sorted(devices) for devices in parts.values()]))
    return found


def _compile_checksums(state: TrainState, mesh: Mesh) -> Callable[[TrainState], np.ndarray]:
    """Returns a function that maps a state to checksums [devices, leaves]."""
    states = state_shardings(state, mesh)

    def local_checksums(state: TrainState) -> jax.Array:
        return jnp.stack([_checksum(x) for x in jax.tree.leaves(state)])[None]

    mapped = jax.shard_map(
        local_checksums,
        mesh=mesh,
        in_specs=(jax.tree.map(lambda s: s.spec, states),),
        out_specs=PartitionSpec(BATCH_AXES),
        check_vma=False,  # replicas may differ: this is checked
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(mapped, in_shardings=(states,), out_shardings=replicated)
    return lambda state: np.asarray(jitted(state))


def _checksum(x: jax.Array) -> jax.Array:
    """Returns the uint32 sum of an array's words, each multiplied by a different odd number.

    A change of one word always changes it, since odd numbers have inverses modulo 2^32; a change of
    several words does not in one case of 2^32.
    """
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32).reshape(-1)
    position = jax.lax.iota(jnp.uint32, words.size)
    # The factors of neighbors are far apart, so that shifted or swapped words are noticed too.
    factor = (position * np.uint32(0x9E3779B1)) | np.uint32(1)
    return jnp.sum(words * factor, dtype=jnp.uint32)
