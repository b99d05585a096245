"""Saving and restoring the training state with Orbax."""

import concurrent.futures
import contextlib
import logging
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from music_jax.checkpoint.host_memory import give_back
from music_jax.checkpoint.integrity import find_damage, write_checksums
from music_jax.checkpoint.late_answers import ignore_late_answers
from music_jax.checkpoint.orbax_manager import Manager
from music_jax.data.loader import ORDER_VERSION, TrainingOrder
from music_jax.distributed.mesh import from_main_process, is_main_process
from music_jax.errors import UserError
from music_jax.train.state import TrainState, state_shardings
from music_jax.workdir.directory import check_checkpoint_path
from music_jax.workdir.logs import EventsLog

_logger = logging.getLogger(__name__)

_NONE_WHOLE = -1  # what the main process tells the others where every checkpoint is damaged
_POLL_SECONDS = 0.2
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of what Orbax has not finished


class Checkpoints:
    """The checkpoints of one workdir.

    A checkpoint of step `s` holds the parameters, the batch statistics, the optimizer's state, the
    step, and the position in the input: the global index of the next sample, with the size of the
    dataset and of the batch that give it its meaning; and checksums of all this.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        max_to_keep: int = 2,
        read_only: bool = False,
        ignore_failed_saves: bool = False,
        events: EventsLog | None = None,
    ):
        """Opens `workdir/checkpoints`.

        Args:
          workdir: of the run.
          max_to_keep: the newest so many are kept.
          read_only: change nothing; else the directory is made if needed.
          ignore_failed_saves: say that a save failed and go on, in place of raising an error.
          events: where failed saves and damaged checkpoints are noted.

        Raises:
          UserError: what Orbax notes beside the checkpoints is not as it wrote it, or checkpoints
            cannot be kept there.
        """
        check_checkpoint_path(workdir)
        ignore_late_answers()
        self._workdir = workdir
        self._read_only = read_only
        self._ignore_failed_saves = ignore_failed_saves
        self._events = events
        self._saving: int | None = None
        self._writing: concurrent.futures.Future[None] | None = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._stuck = False  # whether Orbax waits for processes that will not come
        self._max_to_keep = max_to_keep
        if not read_only:
            _make(workdir / "checkpoints")
        verbosity = absl_logging.get_verbosity()
        if read_only:  # of which Orbax warns, as if it were not meant
            absl_logging.set_verbosity(absl_logging.ERROR)
        try:
            self._manager = self._new_manager()
        except ValueError as error:
            raise UserError(
                f"cannot open {workdir / 'checkpoints'}: {_shortened(error)}"
            ) from error
        finally:
            absl_logging.set_verbosity(verbosity)

    def _new_manager(self) -> Manager:
        # With all processes named, barriers are no collectives, which only the loop may start.
        together = ocp.options.MultiprocessingOptions(
            active_processes=set(range(jax.process_count()))
        )
        return Manager(
            self._workdir / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
                multiprocessing_options=together,
                preservation_policy=ocp.checkpoint_managers.LatestN(self._max_to_keep),
                save_decision_policy=ocp.checkpoint_managers.AnySavePolicy([]),
                cleanup_tmp_directories=not self._read_only,
                create=False,
                read_only=self._read_only,
            ),
            item_names=("state", "input"),
        )

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, if there is any."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Steps of all checkpoints."""
        return sorted(self._manager.all_steps())

    def latest_valid_step(self) -> int | None:
        """Step of the newest checkpoint that is as it was saved; None if none was ever saved.

        Newer ones that are damaged are reported and, unless the workdir is opened to read only,
        moved to `workdir/damaged`. All processes get the answer of the main one.

        Raises:
          UserError: there are checkpoints, and all are damaged; they stay where they are.
        """
        found, damage = None, {}
        if is_main_process():
            for step in sorted(self._manager.all_steps(), reverse=True):
                wrong = find_damage(self._directory_of(step))
                if wrong is None:
                    found = step
                    break
                damage[step] = wrong
            if found is not None:
                for step, wrong in damage.items():
                    self._set_aside(step, wrong)
            elif damage:
                found = _NONE_WHOLE
        found = from_main_process(lambda: found)
        if found == _NONE_WHOLE:
            # The main process alone knows what is wrong.
            details = "; ".join(f"step {step}: {wrong}" for step, wrong in damage.items())
            raise UserError(
                f"no checkpoint in {self._manager.directory} is whole"
                f"{f' ({details})' if details else ''}; put back a copy of one, or remove them all "
                "to start anew"
            )
        if not self._read_only:
            self._manager.reload()
        return found

    def check_whole(self, step: int) -> None:
        """Checks that a checkpoint is as it was saved.

        Raises:
          UserError: it is damaged.
        """
        wrong = find_damage(self._directory_of(step))
        if wrong is not None:
            raise UserError(f"the checkpoint of step {step} is damaged: {wrong}")

    def _directory_of(self, step: int) -> epath.Path:
        return epath.Path(self._manager.directory) / str(step)

    def _set_aside(self, step: int, wrong: str) -> None:
        message = f"the checkpoint of step {step} is damaged ({wrong}); going on from an older one"
        if not self._read_only:
            parent = self._workdir / "damaged"
            parent.mkdir(parents=True, exist_ok=True)
            if "://" in str(parent):  # a directory of a bucket is there once it holds something
                (parent / "README").write_text("Checkpoints that were found to be damaged.\n")
            taken = {path.name for path in parent.iterdir()}
            names = [str(step), *(f"{step}-{n}" for n in range(1, len(taken) + 1))]
            kept = parent / next(name for name in names if name not in taken)
            if "://" in str(parent):
                self._directory_of(step).rename(kept)
            else:  # which copies where `checkpoints` is a link to another file system
                shutil.move(self._directory_of(step), kept)
            message += f"; it is kept as {kept}"
        _logger.info(message)
        self._note("damaged", step, wrong)

    def _note(self, event: str, step: int | None, reason: str) -> None:
        if self._events is not None:
            self._events.write(event, step=step, reason=reason)

    def save(self, step: int, state: TrainState, order: TrainingOrder) -> None:
        """Copies the state off the devices, and leaves the rest to another thread.

        A checkpoint that is still being written is waited for first.

        Raises:
          UserError: the save before this one failed, such as on a full disk, unless failed saves
            are ignored.
        """
        self.wait()
        copied = jax.block_until_ready(_on_host(_as_tree(state)))
        self._saving = step
        self._writing = self._writer.submit(self._write, step, copied, _input_position(step, order))

    def _write(self, step: int, tree: dict[str, Any], position: dict[str, int]) -> None:
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree), input=ocp.args.JsonSave(position)
            ),
            force=True,
        )
        self._manager.wait_until_finished()
        give_back()

    def wait(self, *, required: bool = False) -> None:
        """Waits until what is being saved is on disk.

        Args:
          required: whether the run cannot go on without it, even if failed saves are ignored.

        Raises:
          UserError: that failed, such as on a full disk, unless failed saves are ignored.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            while jax.process_count() > 1 and not writing.done():
                if self._manager.failure is not None:
                    raise self._manager.failure
                concurrent.futures.wait([writing], timeout=_POLL_SECONDS)
            writing.result()
        except Exception as error:  # whatever a file system raises, and what Orbax makes of it
            self._save_failed(error, required)

    def discard_from(self, step: int) -> None:
        """Removes the checkpoints of a step and of later ones, the newest first.

        To be called by all processes. A kill in between leaves older ones, to go on from.
        """
        self.wait()
        for newer in reversed(self.all_steps()):
            if newer >= step:
                self._manager.delete(newer)

    def _save_failed(self, error: Exception, required: bool) -> None:
        _logger.debug("could not save", exc_info=error)
        alone = jax.process_count() == 1  # else the others wait for this one's part of it
        if alone:
            self._start_over()
        else:
            self._stuck = True
        kept = [step for step in self.all_steps() if step != self._saving]
        intact = f"step {max(kept)} is intact" if kept else "there is no earlier checkpoint"
        message = f"could not save step {self._saving} in {self._manager.directory}: "
        message += (reason := _shortened(error))
        self._note("save_failed", self._saving, reason)
        if alone and self._ignore_failed_saves and not required:
            _logger.info(f"{message}; {intact}; going on, as checkpoint.ignore_failed_saves says")
            return
        advice = "Free some space or give write permission, and run the same command again"
        if not required and not self._ignore_failed_saves:
            advice += " (--config.checkpoint.ignore_failed_saves goes on without)"
        raise UserError(f"{message}; {intact}. {advice}") from error

    def _start_over(self) -> None:
        """Gives back the space of what could not be finished, and forgets the error.

        Orbax's manager raises it again, once on each thread that asks; the writer's has had it.
        """
        with contextlib.suppress(Exception):
            self._writer.submit(self._manager.close).result()
        for path in _unfinished(epath.Path(self._manager.directory)):
            with contextlib.suppress(OSError):
                path.rmtree()
        self._manager = self._new_manager()

    def _seal(self) -> None:
        """Writes the checksums, while the checkpoint still has its temporary name."""
        if not is_main_process():
            return
        directory = epath.Path(self._manager.directory)
        step = str(self._saving)
        candidates = [path for path in directory.iterdir() if path.name.split(".")[0] == step]
        for path in candidates:
            write_checksums(path)

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
        self.wait()
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
        except Exception as error:  # whatever Orbax raises on metadata that were tampered with
            raise UserError(
                f"cannot restore step {step} of {self._manager.directory}: {_shortened(error)}"
            ) from error
        if order is not None:
            saved, now = restored["input"], _input_position(step, order)
            if isinstance(saved, dict) and "order" not in saved:
                saved = saved | {"order": ORDER_VERSION}
                _logger.info(
                    f"step {step} was saved by an earlier version of music_jax: from here on the "
                    "images come in another order than the one that this run began with, and with "
                    "optimizer.name=sgd biases and normalization parameters are no longer decayed"
                )
            if saved != now:
                raise UserError(
                    f"the checkpoint of step {step} was reading {saved}, but this run would read "
                    f"{now}; has the dataset changed?"
                )
        return TrainState(**restored["state"])

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster has announced that it stops this run, agreed by all processes."""
        return self._manager.reached_preemption_at(step)

    def close(self) -> None:
        """Waits for what is being saved and frees the threads.

        Raises:
          UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._writer.shutdown(wait=not self._stuck)
            if not self._stuck:
                self._manager.close()


def _make(directory: epath.Path) -> None:
    """Makes the directory of the checkpoints, and says what a run left there that was cut off."""
    if is_main_process():
        directory.mkdir(parents=True, exist_ok=True)
        for path in _unfinished(directory):
            _logger.info(f"removing {path}: it was still being written when the run was cut off")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the directory of the checkpoints is made")


def _shortened(error: Exception) -> str:
    """The error in one line, without the middle if it is long: the reason is often at its end."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"


def _unfinished(directory: epath.Path) -> list[epath.Path]:
    with contextlib.suppress(FileNotFoundError):  # a bucket's is there once it holds something
        return sorted(path for path in directory.iterdir() if _TEMPORARY in path.name)
    return []


def _on_host(tree: dict[str, Any]) -> dict[str, Any]:
    """Starts to copy a tree of arrays into the hosts' memory, each part to its device's host."""
    host = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), tree)
    return jax.device_put(tree, host, may_alias=False)


def _as_tree(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "batch_stats": state.batch_stats,
        "opt_state": state.opt_state,
        "guard": state.guard,
    }


def _input_position(step: int, order: TrainingOrder) -> dict[str, int]:
    return {
        "next_sample_index": order.sample_index(step, 0),
        "num_records": order.num_records,
        "batch_size": order.batch_size,
        "seed": order.seed,
        "order": ORDER_VERSION,
    }
