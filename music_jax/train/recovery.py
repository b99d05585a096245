"""Failure policy: stop the run, or rewind it and skip the bad steps."""

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
from music_jax.train.guards import TrainingFailure
from music_jax.train.input import TrainingInput
from music_jax.workdir.files import new_file, read_json, write_json
from music_jax.workdir.logs import EventsLog

_logger = logging.getLogger(__name__)


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
        self._events.write(
            "corrupted" if failure.corrupted else "tripped", **dataclasses.asdict(failure)
        )
        study = "" if failure.corrupted else self._save_batch(failure)
        checkpoints.wait()  # after the above, since it raises if a save failed
        good = [step for step in checkpoints.all_steps() if step < failure.first_step]
        kept = f"step {max(good)} is saved" if good else "there is no checkpoint before it"
        scalars = ", ".join(f"{name} {value:.4g}" for name, value in failure.seen.items())
        parts = (f"{failure.what} at step {failure.step}", scalars, kept, study)
        message = "; ".join(part for part in parts if part)
        if self._guards.policy != "rewind" or len(self._rewinds) >= self._guards.max_rewinds:
            self._events.write("stopped", step=failure.step)
            raise self._stopped(failure, message)

        steps = [] if failure.corrupted else [*range(failure.first_step, failure.step + 1)]
        checkpoints.discard_from(failure.first_step)
        self._rewinds.append({"step": failure.step, "what": failure.what, "skipped": steps})
        self.skipped.update(steps)
        if is_main_process():
            write_json(self._workdir / "rewinds.json", {"rewinds": self._rewinds})
        to_step = max(checkpoints.all_steps(), default=0)
        self._events.write("rewound", step=failure.step, to_step=to_step, skipped=steps)
        skipping = f", skipping step {steps[0]}" if steps else ""
        if len(steps) > 1:
            skipping = f", skipping steps {steps[0]} to {steps[-1]}"
        _logger.warning(
            f"{message}; rewinding to step {to_step} (rewind {len(self._rewinds)} of at most "
            f"{self._guards.max_rewinds}){skipping}"
        )

    def _stopped(self, failure: TrainingFailure, message: str) -> DivergedError | CorruptedError:
        rewinding = self._guards.policy == "rewind"
        if rewinding:
            message += f"; guards.max_rewinds = {self._guards.max_rewinds} is reached"
        else:
            message += "; --config.guards.policy=rewind resumes from there"
        if failure.corrupted:
            return CorruptedError(f"{message}. Check these devices before you resume")
        return DivergedError(
            f"{message}{'' if rewinding else ' and skips the bad steps'}. Or train in another "
            "workdir with a lower optimizer.base_learning_rate or a longer optimizer.warmup_epochs"
        )

    def _save_batch(self, failure: TrainingFailure) -> str:
        """Saves this process's share of the batch and returns a message with its location."""
        training, order = self._training, self._training.order
        process = f"-process-{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._workdir / "divergence" / f"step-{failure.step}{process}.npz"
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
        except OSError as error:  # the batch is useful, but must not cause another failure
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
