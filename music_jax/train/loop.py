"""Pre-training from start to end; read `train_and_evaluate` and you know the run."""

import collections
import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax import config as config_lib
from music_jax import progress, records
from music_jax.data import datasets
from music_jax.data.crops import Crop
from music_jax.data.loader import TrainingOrder, training_batches
from music_jax.data.skipped import SkippedImages
from music_jax.data.sources import Source
from music_jax.errors import DivergedError, StoppedError, UserError
from music_jax.evaluation.evaluate import evaluate, read_results, results_table
from music_jax.mesh import (
    check_divisible,
    is_main_process,
    local_positions,
    make_data_mesh,
    to_devices,
)
from music_jax.signals import StopSignal
from music_jax.train.checkpoints import Checkpoints
from music_jax.train.lock import WorkdirLock
from music_jax.train.state import TrainState, init_state
from music_jax.train.step import Recipe, compile_step, make_recipe

_BATCHES_AHEAD = 2  # on their way to the devices while a step runs


def train_and_evaluate(config: config_dict.ConfigDict, workdir: str) -> TrainState:
    """Pre-trains, resuming if the workdir has a checkpoint, then probes the backbone.

    Args:
      config: as `music_jax.config.default_config` makes it.
      workdir: directory for checkpoints, logs and results; may be a `gs://` one.

    Returns:
      The state after the last step.

    Raises:
      UserError: the config, the dataset or the workdir cannot be used.
      DivergedError: a loss or gradient was not finite.
      StoppedError: a signal came; all is saved and the same call goes on.
    """
    config_lib.validate(config)
    mesh = make_data_mesh(fsdp=config.sharding.fsdp)
    check_divisible(config.batch_size, mesh, "batch_size")
    directory = records.open_workdir(workdir)
    records.check_same_run(directory, config)
    with WorkdirLock(directory) if is_main_process() else contextlib.nullcontext():
        return _train_and_evaluate(config, directory, mesh)


def _train_and_evaluate(
    config: config_dict.ConfigDict, directory: epath.Path, mesh: Mesh
) -> TrainState:
    _prepare_datasets(config)
    source = datasets.training_source(config)
    if config.batch_size > len(source):
        raise UserError(
            f"config.batch_size = {config.batch_size} is larger than the dataset {source.name} of "
            f"{len(source)} images; take at most {len(source)}"
        )
    probed = datasets.evaluation_sources(config, source)  # fails now, not after training
    order = TrainingOrder(len(source), config.batch_size, config.seed)
    num_steps = config.num_epochs * order.steps_per_epoch
    if is_main_process():
        records.write_config(directory, config)

    skipped = records.open_skipped(directory, config)
    skipped.add_left_out(source)
    recipe = make_recipe(config, order.steps_per_epoch)
    state = init_state(config, recipe.optimizer, mesh)
    checkpoints = Checkpoints(
        directory,
        max_to_keep=config.checkpoint.max_to_keep,
        ignore_failed_saves=config.checkpoint.ignore_failed_saves,
    )
    try:
        start_step = checkpoints.latest_whole_step() or 0
        if start_step:
            state = checkpoints.restore(start_step, state, mesh, order)
        results = read_results(config, directory, num_steps)
        if start_step == num_steps and (results is not None or probed is None):
            done = "trained and evaluated" if results else "trained"
            progress.say(f"{directory} is done: {num_steps} steps {done}")
            if results:
                progress.say(results_table(results))
            return state
        _describe(config, mesh, source, order, state, start_step)
        if start_step < num_steps:
            batches = _batches(config, source, order, mesh, start_step, num_steps, skipped)
            state = _train(
                config, recipe, state, batches, order, mesh, checkpoints, directory, start_step
            )
    finally:
        checkpoints.close()

    if probed is None:
        progress.say("not probed: name labelled images with --config.evaluation.test=")
        records.report_skipped(skipped)
        return state
    evaluate(
        config,
        directory,
        probed,
        skipped=skipped,
        network=recipe.network,
        params=state.params,
        batch_stats=state.batch_stats,
        step=num_steps,
        mesh=mesh,
    )
    if is_main_process():
        progress.say(results_table(read_results(config, directory, num_steps) or {}))
    records.report_skipped(skipped)
    return state


def _train(
    config: config_dict.ConfigDict,
    recipe: Recipe,
    state: TrainState,
    batches: Iterator[tuple[jax.Array, jax.Array]],
    order: TrainingOrder,
    mesh: Mesh,
    checkpoints: Checkpoints,
    directory: epath.Path,
    start_step: int,
) -> TrainState:
    num_steps = config.num_epochs * order.steps_per_epoch
    step_function = compile_step(recipe, state, mesh)
    # Fake devices share the real cores; unfinished steps of several of them can starve each other.
    block_each_step = mesh.size > 1 and jax.default_backend() == "cpu"
    log = records.MetricsLog(
        directory, start_step, ignore_failures=config.checkpoint.ignore_failed_saves
    )
    bar = progress.bar(
        num_steps * config.batch_size,
        unit="img",
        description="pre-training",
        done=start_step * config.batch_size,
    )
    stop = StopSignal(alone=jax.process_count() == 1, grace_seconds=config.checkpoint.grace_seconds)
    with stop, bar:
        clock = _Clock(start_step)
        for step, batch in enumerate(batches, start=start_step + 1):
            state, metrics = step_function(state, *batch)
            if step == start_step + 1:  # compiled; only now is there something to save
                stop.begin()
            if block_each_step:
                jax.block_until_ready(state)
            last = step == num_steps
            stopping = stop.received or checkpoints.reached_preemption(step)
            if stopping:
                stop.agreed()
            saving = step % config.checkpoint.every_steps == 0 or last or stopping
            if step % config.log_every_steps == 0 or step == start_step + 1 or saving:
                scalars = {name: float(value) for name, value in metrics.items()}
                _check_finite(state, checkpoints)
                rate = clock.images_per_second(step, config.batch_size)
                record = {
                    "step": step,
                    "epoch": step / order.steps_per_epoch,
                    **scalars,
                    "images_per_second": rate,
                }
                log.write(record)
                bar.set_postfix(collections.OrderedDict(_shown(scalars)), refresh=False)
                bar.update(step * config.batch_size - bar.n)
            if saving:
                checkpoints.save(step, state, order)
            if stopping and not last:
                checkpoints.wait()
                raise StoppedError(
                    f"saved at step {step} of {num_steps}; run the same command to go on"
                )
        checkpoints.wait()
        if stop.received or checkpoints.reached_preemption(num_steps + 1):
            raise StoppedError(
                f"saved at the last step, {num_steps}; run the same command to finish"
            )
    log.close()
    return state


class _Clock:
    """Images per second since it was last asked; the first answer, with compilation, is None."""

    def __init__(self, step: int):
        self._step = step
        self._time: float | None = None

    def images_per_second(self, step: int, batch_size: int) -> float | None:
        now = time.monotonic()
        rate = None
        if self._time is not None and now > self._time:
            rate = (step - self._step) * batch_size / (now - self._time)
        self._step, self._time = step, now
        return rate


def _check_finite(state: TrainState, checkpoints: Checkpoints) -> None:
    diverged = int(state.diverged_step)
    if diverged < 0:
        return
    checkpoints.wait()
    kept = checkpoints.latest_step()
    saved = "there is no checkpoint before it" if kept is None else f"step {kept} is saved"
    raise DivergedError(
        f"the loss or the gradient was not finite at step {diverged}; {saved}. Try a lower "
        "optimizer.base_learning_rate or a longer optimizer.warmup_epochs, in another workdir"
    )


def _shown(scalars: dict[str, float]) -> dict[str, str]:
    """The loss first, then its terms, for the progress bar."""
    hidden = ("loss", "learning_rate", "grad_norm")
    terms = {name: value for name, value in scalars.items() if name not in hidden}
    return {name: f"{value:.3f}" for name, value in ({"loss": scalars["loss"]} | terms).items()}


def _batches(
    config: config_dict.ConfigDict,
    source: Source,
    order: TrainingOrder,
    mesh: Mesh,
    start_step: int,
    num_steps: int,
    skipped: SkippedImages,
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Global batches on the mesh, the next ones on their way while one is used."""
    size = config.batch_size
    host = training_batches(
        source,
        order,
        crop=Crop(config.crop.size, tuple(config.crop.scale), tuple(config.crop.aspect_ratio)),
        channels=config.dataset.num_channels,
        positions=local_positions(size, mesh),
        num_steps=num_steps,
        start_step=start_step,
        skipped=skipped,
        num_threads=config.num_decode_threads,
    )
    moving = (
        (
            to_devices(batch["images"], size, mesh),
            to_devices(batch["sample_index"], size, mesh),
        )
        for batch in host
    )
    queue = collections.deque(itertools.islice(moving, _BATCHES_AHEAD))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(moving, 1))


def _prepare_datasets(config: config_dict.ConfigDict) -> None:
    """Prepares on the main process first, since the files may be shared by all."""
    if is_main_process():
        datasets.prepare(config)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("datasets prepared by the main process")
        datasets.prepare(config)


def _describe(
    config: config_dict.ConfigDict,
    mesh: Mesh,
    source: Source,
    order: TrainingOrder,
    state: TrainState,
    start_step: int,
) -> None:
    device = mesh.devices.flat[0]
    objective = config.objective
    progress.say(
        parameter_overview.get_parameter_overview(
            _plain(state.params), include_stats=False, max_lines=80
        )
    )
    lines: list[tuple[str, Any]] = [
        ("devices", f"{mesh.size} x {device.device_kind} in {jax.process_count()} process(es)"),
        (
            "batch",
            f"{config.batch_size} = {jax.process_count()} process(es) x "
            f"{mesh.size // jax.process_count()} device(s) x {config.batch_size // mesh.size}",
        ),
        (
            "training",
            f"{config.num_epochs} epochs x {order.steps_per_epoch} steps of {source.name} "
            f"({order.num_records} images), {config.compute_dtype}",
        ),
        (
            "objective",
            f"{objective.name}, {objective.num_segments} segments x "
            f"{objective.units_per_segment} units",
        ),
    ]
    if objective.name == "music":
        bound = -3 * np.log(objective.units_per_segment)
        lines.append(("lower bound", f"-3 log {objective.units_per_segment} = {bound:.4f}"))
    if start_step:
        lines.append(("resuming", f"after step {start_step}"))
    for name, value in lines:
        progress.say(f"{name:12s} {value}")


def _plain(tree: Any) -> Any:
    """The tree with text keys, as the parameter table wants them."""
    if isinstance(tree, dict):
        return {str(key): _plain(value) for key, value in tree.items()}
    return tree
