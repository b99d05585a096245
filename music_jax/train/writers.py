"""Where a training can be watched besides metrics.jsonl: TensorBoard, and Weights & Biases."""

import importlib.util
import logging
import os
import re
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import config_dict

from music_jax.data.host_tensorflow import import_tensorflow
from music_jax.distributed.mesh import is_main_process
from music_jax.errors import UserError
from music_jax.workdir.files import new_path, read_json, write_json
from music_jax.workdir.run_config import as_json

_logger = logging.getLogger(__name__)

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Writer(Protocol):
    """A place that figures and pictures go to."""

    def start(self, step: int) -> None:
        """Goes on after a step; what was written of later ones is taken again."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds figures of a step."""

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Adds pictures of a step, uint8 [height, width, channels]."""

    def flush(self) -> None:
        """Makes all that was added safe from a kill."""

    def close(self, *, failed: bool) -> None:
        """Ends."""


class Writers:
    """All the writers that a config asks for; the main process alone has any.

    They show a copy of what metrics.jsonl has: one that fails is told of once and left out, and the
    training goes on.
    """

    def __init__(self, config: config_dict.ConfigDict, directory: epath.Path):
        """Looks which there are. Nothing is loaded or written before `start`.

        Args:
          config: its fields `tensorboard` and `wandb_project` say which.
          directory: the workdir.

        Raises:
          UserError: Weights & Biases is asked for but not installed.
        """
        self._missing = ""
        self._writers: dict[str, Writer] = {}
        if is_main_process():
            if config.tensorboard:
                if all(importlib.util.find_spec(n) for n in ("tensorflow", "tensorboard")):
                    self._writers["TensorBoard"] = TensorBoard(directory)
                else:
                    self._missing = (
                        "no files for TensorBoard: pip install 'music_jax[tensorboard]', or "
                        "--config.tensorboard=false to be told no more"
                    )
            if config.wandb_project:
                if importlib.util.find_spec("wandb") is None:
                    raise UserError(
                        f"config.wandb_project = {config.wandb_project!r} needs Weights & Biases: "
                        "pip install wandb"
                    )
                self._writers["Weights & Biases"] = WeightsAndBiases(config, directory)
        # All processes draw the pictures, or none.
        wanted = np.asarray(bool(self._writers))
        if jax.process_count() > 1:
            wanted = multihost_utils.broadcast_one_to_all(wanted)
        self.any = bool(wanted)

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._each(lambda writer: writer.close(failed=kind is not None))

    def start(self, step: int) -> None:
        """Loads the writers, which go on after a step of the training.

        Raises:
          UserError: Weights & Biases cannot be reached.
        """
        if self._missing:
            _logger.info(self._missing)
            self._missing = ""
        self._each(lambda writer: writer.start(step))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds figures of a step."""
        self._each(lambda writer: writer.scalars(step, values))

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Adds pictures of a step, uint8 [height, width, channels] by name."""
        self._each(lambda writer: writer.images(step, images))

    def flush(self) -> None:
        """Makes all that was added safe from a kill."""
        self._each(lambda writer: writer.flush())

    def _each(self, action: Callable[[Writer], None]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                action(writer)
            except UserError:
                raise
            except Exception as error:  # whatever a writer raises, the training is worth more
                del self._writers[name]
                _logger.info(f"{name} is left out from here on: {_one_line(error)}")


class TensorBoard:
    """Event files in the workdir, written by clu in a thread of its own."""

    def __init__(self, directory: epath.Path):
        """Names the workdir; TensorFlow is loaded by `start`."""
        self._directory = directory
        self._writer: Any = None

    def start(self, step: int) -> None:
        """Opens a new file, and takes out of those before it what comes after a step."""
        import_tensorflow()
        from clu import metric_writers

        if self._writer is not None:
            self._writer.close()
        for path in sorted(self._directory.glob("events.out.tfevents.*")):
            cut_back(path, step)
        self._writer = metric_writers.AsyncWriter(
            metric_writers.SummaryWriter(os.fspath(self._directory))
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds figures of a step."""
        self._writer.write_scalars(step, values)

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Adds pictures of a step."""
        self._writer.write_images(step, images)

    def flush(self) -> None:
        """Waits for the thread and writes the file."""
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()


def cut_back(path: epath.Path, step: int) -> None:
    """Takes the events after a step out of an event file, and removes it if none are left.

    A last event that was cut off, as by a kill, goes with them. A file that is none stays.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        all_events = list(RawEventFileLoader(os.fspath(path)).Load())
        parsed = [Event.FromString(event) for event in all_events]
    except Exception as error:  # whatever the reader and the parser raise on damage
        _logger.info(f"{path} is damaged: {_one_line(error)}")
        return
    pairs = list(zip(all_events, parsed, strict=True))
    kept = [event for event, read in pairs if read.step <= step]
    if len(kept) == len(all_events) and all_events:
        return
    if not any(read.HasField("summary") for _, read in pairs if read.step <= step):
        path.unlink()
        return
    with (
        new_path(path) as temporary,
        import_tensorflow().io.TFRecordWriter(os.fspath(temporary)) as writer,
    ):
        for event in kept:
            writer.write(event)


class WeightsAndBiases:
    """A run at Weights & Biases, of which wandb.json keeps the id so that a resume goes on with it.

    What was logged there stays: of steps that are taken again, the first figures.
    """

    def __init__(self, config: config_dict.ConfigDict, directory: epath.Path):
        """Names the run; wandb is loaded by `start`."""
        self._config, self._directory = config, directory
        self._wandb: Any = None
        self._run: Any = None

    def start(self, step: int) -> None:
        """Opens the run, or goes on with it.

        Raises:
          UserError: that is not possible.
        """
        if self._run is not None:
            return
        here = "://" not in str(self._directory)
        try:
            import wandb

            self._wandb = wandb
            self._run = wandb.init(
                project=self._config.wandb_project,
                id=self._run_id(),
                resume="allow",
                name=self._directory.name,
                dir=os.fspath(self._directory) if here else None,
                config=as_json(self._config),
            )
        except Exception as error:  # whatever wandb raises
            raise UserError(
                f"Weights & Biases: {_one_line(error)}; WANDB_MODE=offline logs to the workdir "
                "alone, --config.wandb_project= not at all"
            ) from error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds figures of a step, unless a later one is there."""
        if step >= self._run.step:
            self._run.log(values, step=step)

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Adds pictures of a step, unless a later one is there."""
        if step >= self._run.step:
            self._run.log({k: self._wandb.Image(v) for k, v in images.items()}, step=step)

    def flush(self) -> None:
        """Does nothing: another process of wandb's has it already."""

    def close(self, *, failed: bool) -> None:
        """Ends the run, as finished or as failed."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def _run_id(self) -> str:
        path = self._directory / "wandb.json"
        if path.exists():
            try:
                found = read_json(path)["id"]
                if isinstance(found, str) and _RUN_ID.fullmatch(found):
                    return found
                raise ValueError(f"{found!r} is no id")
            except (OSError, ValueError, KeyError, TypeError) as error:
                _logger.info(f"a new run at Weights & Biases, as {path} is damaged: {error}")
        new = uuid.uuid4().hex[:8]
        write_json(path, {"id": new})
        return new


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
