"""Silent corruption: devices that should hold, or compute, the same bits and do not.

Checksums of what each device itself holds are taken on the device, and only these are compared.
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
from music_jax.train.objective import Metrics
from music_jax.train.state import TrainState, state_shardings
from music_jax.train.step import StepFunction

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_NAMED = 3  # arrays and devices that a message lists


class CorruptionChecks:
    """The checks that a config asks for, of one training."""

    def __init__(self, config: config_dict.ConfigDict, state: TrainState, mesh: Mesh):
        """Prepares them.

        Args:
          config: its part `guards` tells how often.
          state: the state, or its shapes.
          mesh: the devices.
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
        """Takes a step, and, where it is due, takes it twice, which needs room for two states.

        Args:
          number: of the step, from 1.
          step_function: takes it; the state's buffers are donated.
          state: before the step.
          batch: what the step takes besides.

        Returns:
          The state and the metrics after it, and, if the two differ, where, in words.
        """
        if not _due(number, self._determinism_every):
            return *step_function(state, *batch), None
        once = self._checksums(step_function(self._copy(state), *batch)[0])
        state, metrics = step_function(state, *batch)
        wrong = np.not_equal(once, self._checksums(state))  # [devices, leaves]
        if not wrong.any():
            return state, metrics, None
        return state, metrics, f"done twice, it gave other bits {self._where(wrong)}"

    def replicas(self, number: int, state: TrainState, *, saving: bool) -> str | None:
        """Where devices that should hold the same bits do not, in words, if it is to be looked.

        Args:
          number: of the step.
          state: after the step.
          saving: whether it is about to be saved; what is saved is looked at too.
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
    """Which devices hold other bits than most of those that should hold the same.

    Args:
      checksums: [devices, leaves].
      groups: of each leaf, the devices that hold the same part of it.

    Returns:
      bool [devices, leaves]. Where no value has a majority, all of the group are named.
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
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _leaves(state: TrainState, mesh: Mesh) -> list[tuple[str, list[list[int]]]]:
    """Name of each array of the state, and the devices that hold the same part of it."""
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
    """A function to the checksums [devices, leaves] of what each device holds of a state."""
    states = state_shardings(state, mesh)

    def of_device(state: TrainState) -> jax.Array:
        return jnp.stack([_checksum(x) for x in jax.tree.leaves(state)])[None]

    mapped = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(jax.tree.map(lambda s: s.spec, states),),
        out_specs=PartitionSpec(BATCH_AXES),
        check_vma=False,  # what should be the same on all devices may not be: that is the point
    )
    whole = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(mapped, in_shardings=(states,), out_shardings=whole)
    return lambda state: np.asarray(jitted(state))


def _checksum(x: jax.Array) -> jax.Array:
    """uint32 sum of an array's bits, each word times an odd number of its own.

    A change of one word is always seen, since an odd number has an inverse modulo 2^32; of several,
    but for one in 2^32.
    """
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32).reshape(-1)
    position = jax.lax.iota(jnp.uint32, words.size)
    # Neighbors get numbers that are far apart, so that a shift or an exchange is seen as well.
    factor = (position * np.uint32(0x9E3779B1)) | np.uint32(1)
    return jnp.sum(words * factor, dtype=jnp.uint32)
