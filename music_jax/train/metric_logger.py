"""Logs a training: a summary, metrics.jsonl, a progress bar, TensorBoard and wandb."""

import contextlib
import importlib.util
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax.data.loader import TrainingOrder
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.distributed.mesh import from_main_process, is_main_process
from music_jax.errors import UserError
from music_jax.objectives import music_lower_bound
from music_jax.train.guards import STATISTICS
from music_jax.train.input import TrainingInput
from music_jax.train.state import TrainState
from music_jax.workdir.files import read_json, write_json
from music_jax.workdir.logs import MetricsLog
from music_jax.workdir.run_config import as_json

_logger = logging.getLogger(__name__)

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOT_IN_BAR = ("learning_rate", "grad_norm", *STATISTICS)
_FEW_STEPS = 10  # per epoch
_UNUSED_SHARE = 0.01  # of the images, that an epoch may omit without a warning


def describe(
    config: config_dict.ConfigDict,
    mesh: Mesh,
    source: Source,
    order: TrainingOrder,
    state: TrainState,
    start_step: int,
) -> None:
    """Logs the parameters, the devices, the batch arithmetic, the objective and warnings."""
    from clu import parameter_overview

    table = parameter_overview.get_parameter_overview(
        _with_text_keys(state.params), include_stats=False, max_lines=80
    )
    progress.log_lines(_logger, table)
    processes, objective = jax.process_count(), config.objective
    lines = {
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind} in {processes} process(es)",
        "batch": f"{config.batch_size} = {processes} process(es) x {mesh.size // processes} "
        f"device(s) x {config.batch_size // mesh.size}",
        "training": f"{config.num_epochs} epochs x {order.steps_per_epoch} steps of {source.name} "
        f"({order.num_records} images), {config.compute_dtype}",
        "objective": f"{objective.name}, {objective.num_segments} segments x "
        f"{objective.units_per_segment} units",
    }
    if objective.name == "music":
        units = objective.units_per_segment
        lines["lower bound"] = f"-3 log {units} = {music_lower_bound(units):.4f}"
    if start_step:
        lines["resuming"] = f"after step {start_step}"
    for name, value in lines.items():
        _logger.info(f"{name:12s} {value}")
    for warning in small_data_warnings(config, order):
        _logger.warning(f"warning: {warning}")


def small_data_warnings(config: config_dict.ConfigDict, order: TrainingOrder) -> list[str]:
    """Returns warnings about defaults that do not suit a small dataset, with fields to change."""
    steps, images, log_every = order.steps_per_epoch, order.num_records, config.log_every_steps
    unused = images - steps * config.batch_size
    warnings = []
    if steps < _FEW_STEPS:
        warnings.append(
            f"an epoch of {images} images has only {steps} step{'s' * (steps > 1)} with "
            f"config.batch_size = {config.batch_size}; a smaller batch gives more steps"
        )
    if unused > _UNUSED_SHARE * images:
        warnings.append(
            f"each epoch omits {unused} of {images} images ({unused / images:.0%}), different ones "
            "each time, since every batch is full; another config.batch_size omits fewer"
        )
    if log_every > config.num_epochs * steps:
        warnings.append(
            f"the run has fewer steps than config.log_every_steps = {log_every}: only the first "
            "step, the last step and those of checkpoints are logged"
        )
    elif log_every > steps:
        warnings.append(
            f"metrics are logged once in {log_every / steps:.1f} epochs; a smaller "
            "config.log_every_steps logs more often"
        )
    return warnings


def _with_text_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _with_text_keys(value) for key, value in tree.items()}
    return tree


class MetricLogger:
    """Logs the steps of a training; only the main process writes.

    A writer that fails is reported and disabled, and the training continues.
    """

    def __init__(self, config: config_dict.ConfigDict, workdir: epath.Path):
        """Chooses the writers. Nothing is loaded or written before `steps`.

        Args:
          config: The run's config; `tensorboard` and `wandb_project` choose writers.
          workdir: Workdir of the run.

        Raises:
          UserError: Weights & Biases is enabled but not installed.
        """
        self._config, self._workdir = config, workdir
        self._writers: dict[str, TensorBoard | WeightsAndBiases] = {}
        if is_main_process():
            if config.tensorboard and importlib.util.find_spec("tensorboardX"):
                self._writers["TensorBoard"] = TensorBoard(workdir)
            elif config.tensorboard:
                _logger.info("no TensorBoard files: they need pip install 'music_jax[tensorboard]'")
            if config.wandb_project:
                if importlib.util.find_spec("wandb") is None:
                    raise UserError(
                        f"config.wandb_project = {config.wandb_project!r} needs Weights & Biases: "
                        "pip install wandb"
                    )
                self._writers["Weights & Biases"] = WeightsAndBiases(config, workdir)
        # All processes draw pictures, or none does.
        self.shows_images = from_main_process(lambda: bool(self._writers))

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._each(lambda writer: writer.close(failed=kind is not None))

    @contextlib.contextmanager
    def steps(self, start_step: int, training: TrainingInput) -> Iterator[None]:
        """Removes earlier records of the steps after `start_step`, and logs these steps.

        Raises:
          UserError: Weights & Biases cannot be reached.
        """
        self._each(lambda writer: writer.start(start_step))
        self._steps_per_epoch = training.order.steps_per_epoch
        self._last_step, self._last_time = start_step, 0.0
        self._file = MetricsLog(
            self._workdir,
            start_step,
            ignore_failures=self._config.checkpoint.ignore_failed_saves,
        )
        batch_size = self._config.batch_size
        self._bar = progress.bar(
            training.num_steps * batch_size,
            unit="img",
            description="pre-training",
            done=start_step * batch_size,
        )
        try:
            yield
        finally:
            self._bar.close()
            self._file.close()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Logs a step."""
        record: dict[str, Any] = {"step": step, "epoch": step / self._steps_per_epoch, **scalars}
        # The first interval contains the compilation.
        now, num_images = time.monotonic(), (step - self._last_step) * self._config.batch_size
        rate = num_images / (now - self._last_time) if self._last_time else None
        self._last_step, self._last_time = step, now
        self._file.write(record | {"images_per_second": rate})
        self.summary(step, record | ({} if rate is None else {"images_per_second": rate}))
        shown = {"loss": scalars["loss"]} | scalars
        self._bar.set_postfix(
            {name: f"{value:.3f}" for name, value in shown.items() if name not in _NOT_IN_BAR},
            refresh=False,
        )
        self._bar.update(step * self._config.batch_size - self._bar.n)

    def summary(self, step: int, values: dict[str, float]) -> None:
        """Adds scalars to TensorBoard and Weights & Biases, but not to metrics.jsonl."""
        values = {name: value for name, value in values.items() if name != "step"}
        self._each(lambda writer: writer.scalars(step, values))

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Adds pictures of a step, uint8 [height, width, channels] by name."""
        self._each(lambda writer: writer.images(step, images))

    def flush(self) -> None:
        """Writes out everything that was logged."""
        self._file.close()
        self._each(lambda writer: writer.flush())

    def _each(self, action: Callable[[Any], None]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                action(writer)
            except UserError:
                raise
            except Exception as error:  # no error of a writer may end the training
                del self._writers[name]
                _logger.warning(f"{name} failed and is no longer written: {_one_line(error)}")


class TensorBoard:
    """A writer of TensorBoard event files into the workdir."""

    def __init__(self, workdir: epath.Path):
        """Stores the workdir; `start` loads tensorboardX."""
        self._prefix, self._num_files = os.fspath(workdir / "events"), 0
        self._writer: Any = None

    def start(self, step: int) -> None:
        """Opens a new file that hides the later steps of earlier files."""
        # Not `SummaryWriter`, which cannot flush its queue and hangs once its thread has failed.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self.close(failed=False)
        self._writer = EventsWriter(self._prefix, f".{os.getpid()}.{self._num_files}")
        self._num_files += 1
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds scalars of a step."""
        from tensorboardX import summary

        for name, value in values.items():
            self._add(step, summary=summary.scalar(name, value))

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Adds pictures of a step."""
        from tensorboardX import summary

        for name, image in images.items():
            self._add(step, summary=summary.image(name, image, dataformats="HWC"))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        """Writes the file."""
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A writer of a run at Weights & Biases.

    A resumed training continues the run, whose id is in wandb.json. If steps are repeated, the
    values that were logged first remain.
    """

    def __init__(self, config: config_dict.ConfigDict, workdir: epath.Path):
        """Stores the config and the workdir; `start` loads wandb."""
        self._config, self._workdir = config, workdir
        self._wandb: Any = None
        self._run: Any = None

    def start(self, step: int) -> None:
        """Opens a new run, or continues an existing one.

        Raises:
          UserError: Weights & Biases cannot be reached.
        """
        if self._run is not None:
            return
        try:
            import wandb

            self._wandb = wandb
            self._run = wandb.init(
                project=self._config.wandb_project,
                id=self._run_id(),
                resume="allow",
                name=self._workdir.name,
                dir=None if "://" in str(self._workdir) else os.fspath(self._workdir),
                config=as_json(self._config),
            )
        except Exception as error:  # whatever wandb raises
            raise UserError(
                f"Weights & Biases: {_one_line(error)}; WANDB_MODE=offline logs only to the "
                "workdir, --config.wandb_project= not at all"
            ) from error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds scalars of a step, unless a later step was logged."""
        if step >= self._run.step:
            self._run.log(values, step=step)

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Adds pictures of a step, unless a later step was logged."""
        self.scalars(step, {name: self._wandb.Image(image) for name, image in images.items()})

    def flush(self) -> None:
        """Does nothing: wandb writes in another process."""

    def close(self, *, failed: bool) -> None:
        """Marks the run as finished or failed."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def _run_id(self) -> str:
        path = self._workdir / "wandb.json"
        if path.exists():
            try:
                found = read_json(path)["id"]
                if isinstance(found, str) and _RUN_ID.fullmatch(found):
                    return found
                raise ValueError(f"{found!r} is not an id")
            except (OSError, ValueError, KeyError, TypeError) as error:
                _logger.warning(f"{path} is damaged ({error}): a new run at Weights & Biases")
        new = uuid.uuid4().hex[:8]
        write_json(path, {"id": new})
        return new


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
