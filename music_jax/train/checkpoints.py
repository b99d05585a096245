"""Saving and restoring the training state with Orbax."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from music_jax.data.loader import TrainingOrder
from music_jax.errors import UserError
from music_jax.train.state import TrainState, state_shardings


class Checkpoints:
    """The checkpoints of one workdir.

    A checkpoint of step `s` holds the parameters, the batch statistics, the optimiser's state, the
    step, and the position in the input: the global index of the next sample, with the size of the
    dataset and of the batch that give it its meaning.
    """

    def __init__(self, workdir: epath.Path, *, max_to_keep: int = 2, read_only: bool = False):
        """Opens `workdir/checkpoints`, which unless `read_only` is made if needed."""
        self._manager = ocp.CheckpointManager(
            workdir / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(max_to_keep),
                save_decision_policy=ocp.checkpoint_managers.AnySavePolicy([]),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            ),
            item_names=("state", "input"),
        )

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, if there is any."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Steps of all checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, order: TrainingOrder) -> None:
        """Starts to save; returns once the state is copied off the devices."""
        if step == self.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_tree(state)),
                input=ocp.args.JsonSave(_input_position(step, order)),
            ),
            force=True,
        )

    def restore(
        self, step: int, like: TrainState, mesh: Mesh, order: TrainingOrder | None = None
    ) -> TrainState:
        """Restores a checkpoint onto the mesh, whatever it was saved from.

        Args:
          step: of the checkpoint.
          like: a state, or its shapes.
          mesh: the devices to restore onto.
          order: the input that goes on from there; checked against the checkpoint's.

        Returns:
          The state.

        Raises:
          UserError: there is no such checkpoint, it does not fit the state, or its input was
            another one.
        """
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            _as_tree(like),
            _as_tree(state_shardings(like, mesh)),
        )
        args: dict[str, Any] = {"state": ocp.args.StandardRestore(target)}
        if order is not None:
            args["input"] = ocp.args.JsonRestore()
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except (ValueError, KeyError, FileNotFoundError, OSError) as error:
            raise UserError(
                f"cannot restore step {step} of {self._manager.directory}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        if order is not None and restored["input"] != _input_position(step, order):
            raise UserError(
                f"the checkpoint of step {step} was reading {restored['input']}, but this run "
                f"would read {_input_position(step, order)}; has the dataset changed?"
            )
        return TrainState(**restored["state"])

    def wait(self) -> None:
        """Waits until what is being saved is on disk."""
        self._manager.wait_until_finished()

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster has announced that it stops this run, agreed by all processes."""
        return bool(self._manager.reached_preemption(step))

    def close(self) -> None:
        """Waits for saves to finish and frees the manager's threads."""
        self._manager.close()


def _as_tree(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "batch_stats": state.batch_stats,
        "opt_state": state.opt_state,
        "diverged_step": state.diverged_step,
    }


def _input_position(step: int, order: TrainingOrder) -> dict[str, int]:
    return {
        "next_sample_index": order.sample_index(step, 0),
        "num_records": order.num_records,
        "batch_size": order.batch_size,
        "seed": order.seed,
    }
