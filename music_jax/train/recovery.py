"""What happens when a training goes wrong: it stops, or goes back and leaves out what did it."""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import config_dict

from music_jax.checkpoint.manager import Checkpoints
from music_jax.distributed.mesh import from_main_process, is_main_process
from music_jax.errors import CorruptedError, DivergedError, UserError
from music_jax.train.guards import Trip
from music_jax.train.input import TrainingInput
from music_jax.workdir.files import new_file, read_json, write_json
from music_jax.workdir.logs import EventsLog

_logger = logging.getLogger(__name__)

_FILE = "rewinds.json"
_STUDY = "divergence"


class TrainingFailedError(Exception):
    """A training cannot go on from its present state. It never leaves `train_and_evaluate`."""

    def __init__(self, failure: "TrainingFailure"):
        super().__init__(failure.what)
        self.failure = failure


@dataclasses.dataclass(frozen=True)
class TrainingFailure:
    """What went wrong.

    Attributes:
      step: at which it was seen.
      first_step: since which the training was not well.
      what: in words.
      seen: figures of the step.
      corrupted: whether it is the hardware's doing, so that the batch is not to blame.
    """

    step: int
    first_step: int
    what: str
    seen: dict[str, float] = dataclasses.field(default_factory=dict)
    corrupted: bool = False

    @classmethod
    def of_trip(cls, trip: Trip) -> "TrainingFailure":
        """A guard that tripped."""
        return cls(trip.step, trip.first_step, trip.what, trip.seen)

    @classmethod
    def of_corruption(cls, step: int, what: str) -> "TrainingFailure":
        """A check that failed after a step."""
        return cls(step, step, what, corrupted=True)


class Recovery:
    """The policy of `config.guards`, and the rewinds that a workdir's training has made.

    `rewinds.json` lists them, and with them the steps that are left out. A rewind first removes the
    checkpoints that are too new, then is added to the list, then the training resumes as after any
    other end. So a process that is killed in between does all of it again, to the same result: what
    is trained depends on which steps are left out, not on how far it was gone back.
    """

    def __init__(
        self,
        config: config_dict.ConfigDict,
        directory: epath.Path,
        training: TrainingInput,
        events: EventsLog,
    ):
        """Reads the list.

        Raises:
          UserError: it cannot be read.
        """
        self._rewinding = config.guards.policy == "rewind"
        self._max_rewinds = config.guards.max_rewinds
        self._directory, self._training, self._events = directory, training, events
        self._rewinds = from_main_process(lambda: _read(directory / _FILE))
        self.skipped = {step for rewind in self._rewinds for step in rewind["skipped"]}

    def recover(self, failure: TrainingFailure, checkpoints: Checkpoints) -> None:
        """Rewinds, so that the newest checkpoint is the one to go on from; or ends the run.

        To be called by all processes.

        Raises:
          DivergedError: a guard tripped, and the run is to stop then or has rewound too often.
          CorruptedError: likewise of bits that differ.
        """
        self._events.write("corrupted" if failure.corrupted else "tripped", **vars(failure))
        study = "" if failure.corrupted else self._save_batch(failure)
        checkpoints.wait()  # raises if a save failed, which must not hide the above
        good = [step for step in checkpoints.all_steps() if step < failure.first_step]
        kept = f"step {max(good)} is saved" if good else "there is no checkpoint before it"
        figures = ", ".join(f"{name} {value:.4g}" for name, value in failure.seen.items())
        message = "; ".join(
            part
            for part in (f"{failure.what} at step {failure.step}", figures, kept, study)
            if part
        )
        if not self._rewinding or len(self._rewinds) >= self._max_rewinds:
            self._events.write("stopped", step=failure.step)
            raise self._stop(failure, message)

        steps = [] if failure.corrupted else [*range(failure.first_step, failure.step + 1)]
        rewind = {"step": failure.step, "what": failure.what, "skipped": steps}
        checkpoints.discard_from(failure.first_step)
        self._rewinds.append(rewind)
        self.skipped.update(steps)
        if is_main_process():
            write_json(self._directory / _FILE, {"rewinds": self._rewinds})
        to_step = checkpoints.latest_step() or 0
        self._events.write("rewound", step=failure.step, to_step=to_step, skipped=steps)
        _logger.info(
            f"{message}; rewinding to step {to_step}, the {len(self._rewinds)}. time of at most "
            f"{self._max_rewinds}" + (f", leaving out {_span(steps)}" if steps else "")
        )

    def _stop(self, failure: TrainingFailure, message: str) -> DivergedError | CorruptedError:
        if self._rewinding:
            tried = f"{message}; rewound {len(self._rewinds)} times, as often as guards.max_rewinds"
        else:
            tried = f"{message}; --config.guards.policy=rewind goes on from there"
        if failure.corrupted:
            return CorruptedError(f"{tried}. Look at these devices before going on")
        return DivergedError(
            f"{tried}{'' if self._rewinding else ' without the batches concerned'}. Or try a lower "
            "optimizer.base_learning_rate or a longer optimizer.warmup_epochs, in another workdir"
        )

    def _save_batch(self, failure: TrainingFailure) -> str:
        """Saves this process's share of the batch for study, and says where."""
        training, order = self._training, self._training.order
        many = f"-process-{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._directory / _STUDY / f"step-{failure.step}{many}.npz"
        try:
            batch = next(training.on_host(failure.step - 1, failure.step))
            samples = [order.sample_index(failure.step - 1, int(p)) for p in training.positions]
            arrays: dict[str, Any] = {
                "images": batch["images"],
                "sample_index": np.asarray(samples, np.int64),
                "record": np.asarray([order.record_key(i) for i in samples], np.int64),
                "seed": np.asarray(order.seed, np.int64),
                "step": np.asarray(failure.step, np.int64),
                **{name: np.asarray(value, np.float32) for name, value in failure.seen.items()},
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as file:
                np.savez(file, **arrays)
        except OSError as error:  # Worth having, but not worth failing for.
            return f"its batch could not be saved ({error})"
        return f"its batch is kept in {path}"


def _span(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


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
            f"cannot read {path}, which says what the training has left out: {error}; put back a "
            "copy of it, or start anew in another workdir"
        ) from error
