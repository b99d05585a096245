"""Logs a training: metrics.jsonl, a progress bar, and TensorBoard and wandb with pictures."""

import contextlib
import importlib.util
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.config import is_centered
from music_jax.data.pictures import as_pictures
from music_jax.distributed import progress
from music_jax.distributed.mesh import batch_sharding, from_main_process, is_main_process
from music_jax.errors import UserError, install_command, one_line
from music_jax.objectives import joint_probability
from music_jax.objectives.global_batch import subtract_mean
from music_jax.train.guards import STATISTICS
from music_jax.train.input import TrainingInput
from music_jax.train.recipe import Crops, Recipe
from music_jax.train.state import TrainState, gather, state_shardings
from music_jax.train.step import augmented_views
from music_jax.workdir.files import in_bucket, read_json, write_json
from music_jax.workdir.logs import MetricsLog
from music_jax.workdir.run_config import as_json

_logger = logging.getLogger(__name__)

Value = float | np.ndarray  # a scalar, or a picture: uint8 [height, width, channels]
# Draws pictures of a state and the batch of its last step, by name.
Draw = Callable[[TrainState, Crops, jax.Array], dict[str, np.ndarray]]

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOT_IN_BAR = ("learning_rate", "grad_norm", "online_seconds", *STATISTICS)
_VIEWS = ("views", "local_views")  # pictures of each group of crops
_SAMPLES_SHOWN = 8
_MAX_EMBEDDED = 256  # samples that the joint probabilities are computed from
_MAX_UNITS = 512  # shown, of the first segments
_MIN_SIDE = 64  # pixels of a view as it is shown


class MetricLogger:
    """Logs the steps of a training; only the main process writes.

    A writer that fails is reported and disabled, and the training continues.
    """

    def __init__(self, config: config_dict.ConfigDict, workdir: epath.Path):
        """Chooses the writers; nothing is loaded or written before `steps`.

        Raises:
          UserError: Weights & Biases is enabled but not installed.
        """
        self._config, self._workdir = config, workdir
        self._writers: dict[str, TensorBoard | WeightsAndBiases] = {}
        if is_main_process():
            if config.tensorboard and importlib.util.find_spec("tensorboardX"):
                self._writers["TensorBoard"] = TensorBoard(workdir)
            elif config.tensorboard:
                _logger.info("no TensorBoard files: they need %s", install_command("tensorboard"))
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
        self._online: dict[str, float] = {}  # stay in the bar until they are measured again
        ignoring, batch_size = self._config.checkpoint.ignore_failed_saves, self._config.batch_size
        self._file = MetricsLog(self._workdir, start_step, ignore_failures=ignoring)
        total, done = training.num_steps * batch_size, start_step * batch_size
        self._bar = progress.bar(total, unit="img", description="pre-training", done=done)
        try:
            yield
        finally:
            self._bar.close()
            self._file.close()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Logs a step, or with step 0 the state before the first."""
        now, num_images = time.monotonic(), (step - self._last_step) * self._config.batch_size
        seconds = now - self._last_time - scalars.get("online_seconds", 0.0)
        # The first interval contains the compilation.
        rate = num_images / seconds if self._last_time else None
        self._last_step, self._last_time = step, now if step else 0.0
        record = {"epoch": step / self._steps_per_epoch, **scalars, "images_per_second": rate}
        self._file.write({"step": step} | record)
        self.summary(step, {name: value for name, value in record.items() if value is not None})
        self._online |= {x: value for x, value in scalars.items() if x.startswith("online_")}
        shown = sorted((scalars | self._online).items(), key=lambda item: item[0] != "loss")
        self._bar.set_postfix(
            {name: f"{value:.3f}" for name, value in shown if name not in _NOT_IN_BAR},
            refresh=False,
        )
        self._bar.update(step * self._config.batch_size - self._bar.n)

    def summary(self, step: int, values: Mapping[str, Value]) -> None:
        """Adds scalars or pictures to TensorBoard and Weights & Biases, not to metrics.jsonl."""
        self._each(lambda writer: writer.write(step, values))

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
                reason = one_line(error, 300, named=True)
                _logger.warning(f"{name} failed and is no longer written: {reason}")


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

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Adds scalars and pictures of a step."""
        from tensorboardX import summary

        for name, value in values.items():
            if isinstance(value, np.ndarray):
                self._add(step, summary=summary.image(name, value, dataformats="HWC"))
            else:
                self._add(step, summary=summary.scalar(name, value))

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
                dir=None if in_bucket(self._workdir) else os.fspath(self._workdir),
                config=as_json(self._config),
            )
        except Exception as error:  # whatever wandb raises
            raise UserError(
                f"Weights & Biases: {one_line(error, 300, named=True)}; WANDB_MODE=offline logs "
                "only to the workdir, --config.wandb_project= not at all"
            ) from error

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Adds scalars and pictures of a step, unless a later step was logged."""
        if step >= self._run.step:
            values = {
                k: self._wandb.Image(v) if isinstance(v, np.ndarray) else v
                for k, v in values.items()
            }
            self._run.log(values, step=step)

    def flush(self) -> None:
        """Does nothing: wandb writes in another process."""

    def close(self, *, failed: bool) -> None:
        """Marks the run as finished or failed."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def _run_id(self) -> str:
        path = self._workdir / "wandb.json"
        try:
            found = read_json(path)["id"]
            if isinstance(found, str) and _RUN_ID.fullmatch(found):
                return found
            raise ValueError(f"{found!r} is not an id")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            _logger.warning(f"{path} is damaged ({error}): a new run at Weights & Biases")
        new = uuid.uuid4().hex[:8]
        write_json(path, {"id": new})
        return new


def make_draw(
    config: config_dict.ConfigDict, recipe: Recipe, shapes: TrainState, mesh: Mesh
) -> Draw:
    """Returns a function that draws pictures of a step; all processes call it together.

    It draws `views` and `local_views`, if there are any, with a column for each of the first
    samples, and for MUSIC `joint_probability`; see `_heat_map`. It is a separate program: that of
    the training, and so every bit of its result, is the same with and without pictures.
    """
    objective, has_segments = config.objective, config.objective.name == "music"
    units = objective.units_per_segment
    segments = min(objective.num_segments, max(1, _MAX_UNITS // units))
    at_once = min(config.batch_size // config.accumulation_steps, _MAX_EMBEDDED)
    rows = max(at_once // mesh.size, 1) * mesh.size

    def compute(state: TrainState, images: Crops, sample_index: jax.Array) -> dict[str, jax.Array]:
        images, sample_index = jax.tree.map(lambda x: x[:rows], (images, sample_index))
        groups = jax.tree.leaves(augmented_views(recipe, images, sample_index))
        shown = {
            name: views[:_SAMPLES_SHOWN].astype(jnp.float32)
            for name, views in zip(_VIEWS, groups, strict=False)
        }
        if has_segments:
            params = gather(state.params, mesh, recipe.dtype)
            _, embeddings, _ = recipe.network.embed(params, state.batch_stats, groups[0])
            a, b = embeddings[:, 0, : segments * units], embeddings[:, 1, : segments * units]
            if is_centered(config):
                a, b = subtract_mean(a), subtract_mean(b)
            shown["joint_probability"] = joint_probability(
                a, b, num_segments=segments, temperature=objective.temperature
            )
        return shown

    batch = batch_sharding(mesh)
    jitted = jax.jit(
        compute,
        in_shardings=(state_shardings(shapes, mesh), batch, batch),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )

    def draw(*arguments: Any) -> dict[str, np.ndarray]:
        with jax.set_mesh(mesh):
            drawn = jax.tree.map(np.asarray, jitted(*arguments))
        for name in drawn.keys() & set(_VIEWS):
            pixel_type = config.dataset.pixel_type
            pictures = as_pictures(
                drawn[name], mean=recipe.mean, std=recipe.std, pixel_type=pixel_type
            )
            drawn[name] = _view_sheet(pictures)
        if has_segments:
            drawn["joint_probability"] = _heat_map(drawn["joint_probability"], units)
        return drawn

    return draw


def _view_sheet(views: np.ndarray) -> np.ndarray:
    """Arranges views [samples, views, height, width, channels] in a grid, a sample in a column."""
    sheet = np.concatenate(np.concatenate(views, axis=2), axis=0)  # first side by side
    return _enlarged(sheet, _MIN_SIDE, views.shape[2])


def _heat_map(joint: np.ndarray, units_per_segment: int) -> np.ndarray:
    """Colors joint probabilities [units, units], from black to yellow.

    The scale is that of the square root and ends at 1/K, the value on the diagonal of a segment of
    K units if all are used equally and the views agree. Two independent segments then have an even
    color, at sqrt(1/K) of the scale.
    """
    from matplotlib import colormaps

    shares = np.sqrt(np.clip(joint * units_per_segment, 0, 1))
    colors = np.round(255 * colormaps["inferno"](shares)[..., :3]).astype(np.uint8)
    return _enlarged(colors, _MAX_UNITS, len(joint))


def _enlarged(image: np.ndarray, wanted: int, side: int) -> np.ndarray:
    times = max(1, wanted // side)
    return image.repeat(times, axis=0).repeat(times, axis=1)
