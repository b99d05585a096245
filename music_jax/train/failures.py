"""Failures of a training: how the host finds them, and the policy to stop or to rewind."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.checkpoint.manager import Checkpoints
from music_jax.distributed.mesh import BATCH_AXES, from_main_process, is_main_process
from music_jax.errors import CorruptedError, DivergedError, MusicError, UserError, first_of
from music_jax.train.guards import FIRST_COLLAPSE, REASONS, GuardState, Metrics
from music_jax.train.input import TrainingInput
from music_jax.train.recipe import Crops
from music_jax.train.state import TrainState, state_shardings
from music_jax.train.step import StepFunction
from music_jax.workdir.files import new_file, read_json, write_json
from music_jax.workdir.logs import EventsLog

_logger = logging.getLogger(__name__)

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@dataclasses.dataclass(eq=False)
class TrainingFailure(Exception):  # noqa: N818
    """A step failed; `Recovery` decides whether the run stops or rewinds.

    Attributes:
      step: Step at which the failure was found.
      first_step: First bad step: the step itself or, for a collapse, the first of the consecutive
        steps that looked collapsed.
      what: Description of the failure.
      seen: Scalars of the step.
      corrupted: Whether the hardware failed, so that the batch is not the cause.
    """

    step: int
    first_step: int
    what: str
    seen: dict[str, float] = dataclasses.field(default_factory=dict)
    corrupted: bool = False


def read_trip(state: GuardState) -> TrainingFailure | None:
    """Returns the failure for which a guard has tripped, or None; waits for the device."""
    step = int(state.tripped_step)
    if step < 0:
        return None
    bits = [bit for bit in range(len(REASONS)) if int(state.reasons) >> bit & 1]
    return TrainingFailure(
        step=step,
        first_step=step if min(bits) < FIRST_COLLAPSE else int(state.suspect_since),
        what=" and ".join(REASONS[bit] for bit in bits),
        seen={name: float(value) for name, value in state.seen.items()},
    )


class CheckedStep:
    """The training step with checks for silent corruption, devices that hold or compute wrong bits.

    Each device computes checksums of the buffers that it holds itself, and only these are compared.
    """

    def __init__(
        self,
        config: config_dict.ConfigDict,
        step_function: StepFunction,
        state: TrainState,
        mesh: Mesh,
    ):
        """Prepares the checks of a state, or of its shapes, at the intervals of `config.guards`."""
        self._step_function, self._guards = step_function, config.guards
        self._devices = list(mesh.devices.flat)
        shardings = state_shardings(state, mesh)
        paths = jax.tree.leaves_with_path(state)
        self._names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]
        maps = [
            sharding.devices_indices_map(x.shape)
            for sharding, x in zip(*map(jax.tree.leaves, (shardings, state)), strict=True)
        ]
        self._parts = np.array([[str(indices[d]) for indices in maps] for d in self._devices])
        mapped = jax.shard_map(
            lambda state: jnp.stack([_checksum(x) for x in jax.tree.leaves(state)])[None],
            mesh=mesh,
            in_specs=(jax.tree.map(lambda s: s.spec, shardings),),
            out_specs=PartitionSpec(BATCH_AXES),
            check_vma=False,  # replicas may differ: this is checked
        )
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._jitted = jax.jit(mapped, in_shardings=(shardings,), out_shardings=everywhere)

    def __call__(
        self, number: int, state: TrainState, batch: tuple[Crops, jax.Array]
    ) -> tuple[TrainState, Metrics, str | None]:
        """Takes a step; if it is to be checked, takes it twice, which needs memory for two states.

        Args:
          number: Number of the step, from 1.
          state: State before the step.
          batch: Further arguments of the step.

        Returns:
          The state after the step, its metrics and, if the results differ, a message.
        """
        every = self._guards.check_determinism_every_steps
        if not every or number % every:
            return *self._step_function(state, *batch), None
        copy = jax.tree.map(jnp.copy, state)
        once = self._checksums(self._step_function(copy, *batch)[0])
        state, metrics = self._step_function(state, *batch)
        wrong = np.not_equal(once, self._checksums(state))
        return state, metrics, self._message("repeating the step gave other bits", wrong)

    def replicas(self, number: int, state: TrainState, *, saving: bool) -> str | None:
        """Compares devices that should hold the same bits, if a check is due.

        Args:
          number: Number of the step.
          state: State after the step.
          saving: Whether the state is about to be saved, and checked if any checks are enabled.

        Returns:
          A message if they differ, otherwise None.
        """
        every = self._guards.check_replicas_every_steps
        if not every or (number % every and not saving):
            return None
        return self._message("devices differ", _differing(self._checksums(state), self._parts))

    def _checksums(self, state: TrainState) -> np.ndarray:
        """Returns the checksums of each device's part of each array, [devices, arrays]."""
        return np.asarray(self._jitted(state))

    def _message(self, what: str, wrong: np.ndarray) -> str | None:
        """Returns a message that names the places of [devices, arrays] that are wrong."""
        if not wrong.any():
            return None
        names = [self._names[i] for i in np.flatnonzero(wrong.any(axis=0))]
        devices = [self._devices[i] for i in np.flatnonzero(wrong.any(axis=1))]
        places = [f"{device} of process {device.process_index}" for device in devices]
        return f"{what} in {first_of(names)} on {first_of(places)}"


def _differing(checksums: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Returns whether each device holds other bits than most of those with the same part.

    All arguments and results are [devices, arrays]. Without a majority, all devices are marked.
    """
    wrong = []
    for checksum, part in zip(checksums.T, parts.T, strict=True):
        group = part[:, None] == part
        same = group & (checksum[:, None] == checksum)
        wrong.append(2 * same.sum(axis=1) <= group.sum(axis=1))
    return np.stack(wrong, axis=1)


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


class Recovery:
    """The policy of `config.guards`, and the rewinds of a workdir.

    `rewinds.json` lists the rewinds with the steps that each skips. A rewind first removes the
    checkpoints that are too new, then is added to the list, then the training resumes as after any
    interruption. A process that is killed in between repeats it with the same result, which depends
    on the skipped steps but not on the checkpoint that the run resumes from.
    """

    def __init__(
        self,
        config: config_dict.ConfigDict,
        workdir: epath.Path,
        training: TrainingInput,
        events: EventsLog,
    ):
        """Reads the list of rewinds.

        Raises:
          UserError: The list cannot be read.
        """
        self._guards = config.guards
        self._workdir, self._training, self._events = workdir, training, events
        self._rewinds = from_main_process(lambda: _read(workdir / "rewinds.json"))
        self.skipped = {step for rewind in self._rewinds for step in rewind["skipped"]}

    def recover(self, failure: TrainingFailure, checkpoints: Checkpoints) -> None:
        """Removes the checkpoints since the first bad step and skips the bad steps from now on.

        All processes call this together.

        Raises:
          DivergedError: A guard tripped, and the policy is to stop or the rewinds are used up.
          CorruptedError: Devices differ, and the policy or the rewinds do not allow another rewind.
        """
        kind = "corrupted" if failure.corrupted else "tripped"
        self._events.write(kind, **dataclasses.asdict(failure))
        study = "" if failure.corrupted else self._save_batch(failure)
        checkpoints.wait()  # after the above, since it raises if a save failed
        good = [step for step in checkpoints.all_steps() if step < failure.first_step]
        kept = f"step {max(good)} is saved" if good else "there is no checkpoint before it"
        scalars = ", ".join(f"{name} {value:.4g}" for name, value in failure.seen.items())
        parts = (f"{failure.what} at step {failure.step}", scalars, kept, study)
        message = "; ".join(part for part in parts if part)
        rewinding, most = self._guards.policy == "rewind", self._guards.max_rewinds
        if not rewinding or len(self._rewinds) >= most:
            self._events.write("stopped", step=failure.step)
            used_up = f"guards.max_rewinds = {most} is reached"
            way = used_up if rewinding else "--config.guards.policy=rewind resumes from there"
            message += f"; {way}"
            if failure.corrupted:
                raise CorruptedError(f"{message}. Check these devices before you resume")
            raise DivergedError(
                f"{message}{'' if rewinding else ' and skips the bad steps'}. Or train in another "
                "workdir with a lower optimizer.base_learning_rate or a longer "
                "optimizer.warmup_epochs"
            )

        steps = [] if failure.corrupted else [*range(failure.first_step, failure.step + 1)]
        checkpoints.discard_from(failure.first_step)
        self._rewinds.append({"step": failure.step, "what": failure.what, "skipped": steps})
        self.skipped.update(steps)
        if is_main_process():
            write_json(self._workdir / "rewinds.json", {"rewinds": self._rewinds})
        to_step = max(good, default=0)
        self._events.write("rewound", step=failure.step, to_step=to_step, skipped=steps)
        skipping = f", skipping step {steps[0]}" if steps else ""
        if len(steps) > 1:
            skipping = f", skipping steps {steps[0]} to {steps[-1]}"
        _logger.warning(
            f"{message}; rewinding to step {to_step} (rewind {len(self._rewinds)} of at most "
            f"{most}){skipping}"
        )

    def _save_batch(self, failure: TrainingFailure) -> str:
        """Saves this process's share of the batch and returns a message with its location."""
        training, order = self._training, self._training.order
        process = f"-process-{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._workdir / "divergence" / f"step-{failure.step}{process}.npz"
        try:
            batch = next(training.on_host(failure.step - 1, failure.step, local_views=True))
            samples = [
                order.sample_index(failure.step - 1, int(p)) for p in training.placing.positions
            ]
            integers = {
                "sample_index": samples,
                "record": [order.record_key(i) for i in samples],
                "seed": order.seed,
                "step": failure.step,
            }
            images = ("images", "local_images")
            arrays: dict[str, Any] = {name: batch[name] for name in images if name in batch}
            arrays |= {name: np.asarray(value, np.int64) for name, value in integers.items()}
            arrays |= {name: np.float32(value) for name, value in failure.seen.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as file:
                np.savez(file, **arrays)
        except (OSError, MusicError) as error:
            # The batch is useful, but must not cause another failure.
            return f"its batch could not be saved ({error})"
        return f"its batch is saved in {path}"


def _read(path: epath.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        rewinds = read_json(path)["rewinds"]
        for rewind in rewinds:
            if not all(type(step) is int and step > 0 for step in rewind["skipped"]):
                raise ValueError("'skipped' must be a list of steps")
        return rewinds
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {path}, which lists the steps that the training skips: {error}; put back "
            "a copy of it, or start from scratch in another workdir"
        ) from error
