"""Saves and restores checkpoints with Orbax, and tolerates damaged ones and failed saves."""

import concurrent.futures
import contextlib
import ctypes
import itertools
import logging
import os
import shutil
import sys
import time
import traceback
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.checkpoint.integrity import check_entries, find_damage, write_checksums
from music_jax.distributed.mesh import from_main_process, is_main_process
from music_jax.errors import UserError, one_line
from music_jax.models.network import Network, Tree, init_network, make_network
from music_jax.workdir.directory import absolute_path, check_checkpoint_path
from music_jax.workdir.files import in_bucket
from music_jax.workdir.logs import EventsLog

_logger = logging.getLogger(__name__)

_ITEMS = ("state", "input", "online_probe")
_POLL_SECONDS = 0.2
_REMOVALS = 10  # of a failed save, whose other writes may add files meanwhile
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of unfinished checkpoints
_ORBAX = f"{os.sep}orbax{os.sep}"  # in the names of its files


class _Manager(ocp.CheckpointManager):
    failure: Exception | None = None  # set before Orbax waits for the other processes

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise

    def reached_preemption(self, step: int) -> bool:
        """Returns False: only the training loop may ask, since each call needs a later step."""
        return False

    def wait_for_metadata(self) -> None:
        """Waits for what a thread of Orbax writes into the metadata of a checkpoint."""
        self._non_blocking_metadata_store.wait_until_finished()


class Checkpoints:
    """The checkpoints of one workdir.

    A checkpoint holds trees of arrays by name (`state`, and `online_probe` if there is one),
    `input`, a dictionary of integers, and the checksums of all its files.
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
          workdir: Workdir of the run.
          max_to_keep: Number of checkpoints to keep, the newest.
          read_only: Whether to change nothing; otherwise the directory is created if needed.
          ignore_failed_saves: Whether to log a failed save and continue, instead of raising.
          events: Log for failed saves and damaged checkpoints.

        Raises:
          UserError: Orbax's files in the directory cannot be read, or it cannot hold checkpoints.
        """
        check_checkpoint_path(workdir)
        _ignore_late_errors()
        self._workdir, self._directory = workdir, workdir / "checkpoints"
        self._max_to_keep, self._read_only = max_to_keep, read_only
        self._ignore_failed_saves, self._events = ignore_failed_saves, events
        # Orbax takes a large part of a step to start a save, so a thread of its own does this.
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None
        self._saving: int | None = None  # the step that was saved last
        self._stuck = False  # whether Orbax waits for processes that have failed
        if not read_only and is_main_process():
            self._directory.mkdir(parents=True, exist_ok=True)
            for path in _unfinished(self._directory):
                _logger.info(f"removing {path}, which an interrupted run left unfinished")
        if not read_only and jax.process_count() > 1:
            multihost_utils.sync_global_devices("the directory of the checkpoints is made")
        check_entries(self._directory)
        verbosity = absl_logging.get_verbosity()
        if read_only:  # Orbax logs warnings about `read_only`
            absl_logging.set_verbosity(absl_logging.ERROR)
        try:
            self._manager = self._new_manager()
        except ValueError as error:
            raise UserError(f"cannot open {self._directory}: {_shorten(error)}") from error
        finally:
            absl_logging.set_verbosity(verbosity)

    def _new_manager(self) -> _Manager:
        return _Manager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
                # If all processes are named, Orbax's barriers use no collectives.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=set(range(jax.process_count()))
                ),
                preservation_policy=ocp.checkpoint_managers.LatestN(self._max_to_keep),
                save_decision_policy=ocp.checkpoint_managers.AnySavePolicy([]),
                cleanup_tmp_directories=not self._read_only,
                create=False,
                read_only=self._read_only,
            ),
            item_names=_ITEMS,
        )

    def all_steps(self) -> list[int]:
        """Returns the steps of all checkpoints in ascending order."""
        return sorted(self._manager.all_steps())

    def latest_valid_step(self) -> int | None:
        """Returns the newest undamaged checkpoint's step, or None if nothing was ever saved.

        Newer checkpoints that are damaged are logged and, unless `read_only`, moved to
        `workdir/damaged`. All processes return the result of the main one.

        Raises:
          UserError: There are checkpoints, and all are damaged; they stay where they are.
        """
        found, damage = from_main_process(self._find_valid)
        if found is None and damage:
            details = "; ".join(f"step {step}: {wrong}" for step, wrong in damage)
            raise UserError(
                f"no checkpoint in {self._directory} is valid ({details}); restore a copy of one, "
                "or remove them all to start from scratch"
            )
        if not self._read_only:
            self._manager.reload()
        return found

    def _find_valid(self) -> tuple[int | None, list[tuple[int, str]]]:
        """Returns the newest undamaged step, and the damage to newer ones."""
        damage: list[tuple[int, str]] = []
        for step in reversed(self.all_steps()):
            if (wrong := find_damage(self._directory / str(step))) is None:
                for newer, found in damage:
                    self._quarantine(newer, found)
                return step, damage
            damage.append((step, wrong))
        return None, damage

    def _quarantine(self, step: int, wrong: str) -> None:
        message = f"the checkpoint of step {step} is damaged ({wrong}); using an older one"
        if not self._read_only:
            parent = self._workdir / "damaged"
            parent.mkdir(parents=True, exist_ok=True)
            names = (f"{step}-{n}" if n else str(step) for n in itertools.count())
            kept = next(parent / name for name in names if not (parent / name).exists())
            if in_bucket(kept):
                (self._directory / str(step)).rename(kept)
            else:  # copies if `checkpoints` is a link to another file system
                shutil.move(self._directory / str(step), kept)
            message += f"; it was moved to {kept}"
        _logger.warning(message)
        if self._events is not None:
            self._events.write("damaged", step=step, reason=wrong)

    def save(self, step: int, input_position: dict[str, int], **trees: Any) -> None:
        """Copies trees of arrays off the devices and writes them in the background.

        First waits until an earlier checkpoint is written.

        Args:
          step: Number of steps taken.
          input_position: Position in the input after that step.
          **trees: Trees by name, including `state`.

        Raises:
          UserError: The previous save failed, for example because the disk is full, and failed
            saves are not ignored.
        """
        self.wait()
        host = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), trees)
        # A copy, since the next step reuses the devices' buffers.
        trees = jax.block_until_ready(jax.device_put(trees, host, may_alias=False))
        args: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args["input"] = ocp.args.JsonSave(input_position)
        self._saving = step
        self._writing = self._writer.submit(self._write, step, ocp.args.Composite(**args))

    def _write(self, step: int, args: ocp.args.Composite) -> None:
        self._manager.save(step, args=args, force=True)
        self._manager.wait_until_finished()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed in a pool per thread

    def wait(self, *, required: bool = False) -> None:
        """Waits until the checkpoint that is being saved is on disk.

        Args:
          required: Whether to raise if the save failed, even if failed saves are ignored.

        Raises:
          UserError: The save failed, for example because the disk is full, and failed saves are
            not ignored.
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
        except Exception as error:  # anything a file system raises, possibly wrapped by Orbax
            self._report_failed_save(self._saving, error, required)

    def _report_failed_save(self, step: int | None, error: Exception, required: bool) -> None:
        _logger.debug("could not save", exc_info=error)
        self._stuck = jax.process_count() > 1
        if not self._stuck:
            with contextlib.suppress(Exception):  # its error again, once on each thread
                self._writer.submit(self._manager.close).result()
            for _ in range(_REMOVALS):
                for path in _unfinished(self._directory):
                    with contextlib.suppress(OSError):
                        path.rmtree()
                if not _unfinished(self._directory):
                    break
                time.sleep(_POLL_SECONDS)
            self._manager = self._new_manager()
        kept = [saved for saved in self.all_steps() if saved != step]
        intact = f"step {max(kept)} is intact" if kept else "there is no earlier checkpoint"
        reason = _shorten(error)
        message = f"could not save step {step} in {self._directory}: {reason}; {intact}"
        if self._events is not None:
            self._events.write("save_failed", step=step, reason=reason)
        if self._ignore_failed_saves and not (self._stuck or required):
            _logger.warning(f"{message}; continuing, since checkpoint.ignore_failed_saves is set")
            return
        message += ". Free some space or give write permission, and rerun the command"
        if not required and not self._ignore_failed_saves:
            message += " (--config.checkpoint.ignore_failed_saves continues without)"
        raise UserError(message) from error

    def _write_checksums(self) -> None:
        """Writes checksums while a checkpoint still has its temporary name."""
        if is_main_process():
            self._manager.wait_for_metadata()
            for path in self._directory.iterdir():
                if path.name.split(".")[0] == str(self._saving):
                    write_checksums(path)

    def discard_from(self, step: int) -> None:
        """Removes the checkpoints of a step and of later ones, the newest first.

        All processes call this together. If it is interrupted, older checkpoints remain.
        """
        self.wait()
        for newer in reversed(self.all_steps()):
            if newer >= step:
                self._manager.delete(newer)

    def has(self, step: int, name: str) -> bool:
        """Returns whether a checkpoint holds a tree of this name."""
        return from_main_process(lambda: (self._directory / str(step) / name).exists())

    def restore(
        self, step: int, target: Any, shardings: Any, *, name: str = "state", partial: bool = False
    ) -> Any:
        """Restores a tree of arrays, from any number of devices onto any other.

        Args:
          step: The checkpoint's step.
          target: Tree of the same shapes and types, such as `jax.ShapeDtypeStruct`s.
          shardings: Sharding of each array, or one for all.
          name: Name of the tree.
          partial: Whether the checkpoint may hold more than the target; only if `read_only`.

        Raises:
          UserError: There is no such checkpoint, or it does not fit the target.
        """
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            target,
            jax.tree.broadcast(shardings, target),
        )
        args: Any = ocp.args.StandardRestore(target)
        if partial:
            restore_args = ocp.checkpoint_utils.construct_restore_args(target)
            args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        return self._restore(step, name, args)

    def input_position(self, step: int) -> Any:
        """Returns the position in the input that a checkpoint holds.

        Raises:
          UserError: There is no such checkpoint, or it cannot be read.
        """
        return self._restore(step, "input", ocp.args.JsonRestore())

    def _restore(self, step: int, name: str, args: Any) -> Any:
        self.wait()
        try:
            tree = self._manager.restore(step, args=ocp.args.Composite(**{name: args}))[name]
            if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):
                raise ValueError("arrays are missing")
            return tree
        except Exception as error:  # anything, if the files were tampered with
            raise UserError(
                f"cannot restore step {step} of {self._directory}: {_shorten(error)}"
            ) from error

    def reached_preemption(self, step: int) -> bool:
        """Returns whether the cluster preempts the run at this step, the same for all processes."""
        return bool(ocp.utils.reached_preemption(step))

    def close(self) -> None:
        """Waits for the checkpoint that is being saved and ends Orbax's threads.

        Raises:
          UserError: See `wait`.
        """
        try:
            self.wait()
        finally:
            self._writer.shutdown(wait=not self._stuck)
            if not self._stuck:
                self._manager.close()


def _ignore_late_errors() -> None:
    """Hides errors of reads and writes that fail after a restore or a save has already failed.

    Nobody waits for them by then, so that Python and asyncio would print a traceback for each.
    """
    previous = sys.unraisablehook
    if getattr(previous, "__module__", None) == __name__:  # installed before
        return

    def hook(unraisable: Any) -> None:
        if not _is_late(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(_is_not_late)


def _is_not_late(record: logging.LogRecord) -> bool:
    # The text of a task that was never awaited names the file of its coroutine.
    named = _ORBAX in record.getMessage()
    return not (named or (record.exc_info and _is_late(record.exc_info[1])))


def _is_late(error: BaseException | None) -> bool:
    closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    frames = traceback.walk_tb(getattr(error, "__traceback__", None))
    return closed or any(_ORBAX in frame.f_code.co_filename for frame, _ in frames)


def _unfinished(directory: epath.Path) -> list[epath.Path]:
    with contextlib.suppress(FileNotFoundError):  # an empty directory of a bucket
        return sorted(path for path in directory.iterdir() if _TEMPORARY in path.name)
    return []


def _shorten(error: Exception) -> str:
    """Returns a message in one line, a long one without its middle: its end gives the reason."""
    text = one_line(error)
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"


class RestoredNetwork(NamedTuple):
    """A network with the variables of a checkpoint, replicated on every device."""

    step: int
    network: Network
    params: Tree
    batch_stats: Tree


def restore_network(
    workdir: epath.Path, config: config_dict.ConfigDict, checkpoint: str | int | None, mesh: Mesh
) -> RestoredNetwork:
    """Restores the network of a run without changing the run.

    Args:
      workdir: Workdir of the run, as an absolute path.
      config: The run's config.
      checkpoint: The checkpoint's step or directory; None for the latest valid one.
      mesh: The devices to restore onto.

    Raises:
      UserError: There is no such checkpoint, or it is damaged.
    """
    shapes = jax.eval_shape(lambda: init_network(config, jax.random.key(0)))
    target = dict(zip(("params", "batch_stats"), shapes, strict=True))
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        if checkpoint is None:
            step = checkpoints.latest_valid_step()
            if step is None:
                raise UserError(f"{workdir} has no checkpoint yet")
        else:
            step = _named_step(checkpoint, workdir, checkpoints.all_steps())
            if (wrong := find_damage(workdir / "checkpoints" / str(step))) is not None:
                raise UserError(f"the checkpoint of step {step} is damaged: {wrong}")
        replicated = NamedSharding(mesh, PartitionSpec())
        restored = checkpoints.restore(step, target, replicated, partial=True)
    return RestoredNetwork(step, make_network(config), **restored)


def _named_step(checkpoint: str | int, workdir: epath.Path, steps: list[int]) -> int:
    checkpoint = str(checkpoint)
    name = checkpoint.rstrip("/").rpartition("/")[2]
    if "/" in checkpoint:
        parent = os.fspath(absolute_path(checkpoint.rstrip("/")).parent)
        own = os.fspath(workdir / "checkpoints")
        if not in_bucket(own):
            parent, own = os.path.realpath(parent), os.path.realpath(own)
        if parent != own:
            raise UserError(f"--checkpoint={checkpoint} is not below {workdir}/checkpoints")
    if name not in map(str, steps):
        known = ", ".join(str(step) for step in sorted(steps)) or "none"
        raise UserError(f"there is no checkpoint {checkpoint!r}; the run has the steps {known}")
    return int(name)
