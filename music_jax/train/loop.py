"""Pre-training from start to end; read `train_and_evaluate` and you know the run."""

import contextlib
import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax import config as config_lib
from music_jax.checkpoint.manager import Checkpoints
from music_jax.data import datasets
from music_jax.data.datasets import EvaluationSources
from music_jax.data.loader import TrainingOrder
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.distributed.mesh import (
    check_divisible,
    from_main_process,
    is_main_process,
    make_data_mesh,
    shares_cores,
    use_repeatable_gpu_operations,
)
from music_jax.distributed.signals import Stop
from music_jax.errors import NotMeasurableError, StoppedError, UserError
from music_jax.evaluation.run import agreed_fingerprint
from music_jax.evaluation.runner import evaluate, read_results, results_table
from music_jax.train import guards
from music_jax.train.corruption import CorruptionChecks
from music_jax.train.describe import describe
from music_jax.train.input import TrainingInput, check_same_images
from music_jax.train.log import Log
from music_jax.train.online_probe import OnlineProbe, make_online_probe
from music_jax.train.pictures import Pictures
from music_jax.train.profile import Profile
from music_jax.train.recovery import Recovery, TrainingFailedError, TrainingFailure
from music_jax.train.state import TrainState, abstract_state, init_state
from music_jax.train.step import StepFunction, compile_skip, compile_step, make_recipe
from music_jax.train.writers import Writers
from music_jax.workdir import records
from music_jax.workdir.lock import WorkdirLock

_logger = logging.getLogger(__name__)


def train_and_evaluate(
    config: config_dict.ConfigDict,
    workdir: str,
    *,
    profile_steps: tuple[int, int] | None = None,
    stop: Stop | None = None,
    initial: TrainState | None = None,
) -> TrainState:
    """Pre-trains, resuming if the workdir has a checkpoint, then probes the backbone.

    Args:
      config: as `music_jax.config.default_config` makes it.
      workdir: directory for checkpoints, logs and results; may be a `gs://` one.
      profile_steps: the first and the last step that a JAX profile is recorded of, in `profile/`.
      stop: Tells when to save and stop before the end; None for a run that no signal stops.
      initial: State whose parameters and batch statistics a new run starts from; by default they
        are random. A resumed run ignores it.

    Returns:
      The state after the last step.

    Raises:
      UserError: the config, the dataset or the workdir cannot be used.
      DivergedError: a guard tripped; see `music_jax.train.guards`.
      CorruptedError: devices did not hold, or did not compute, the same bits.
      StoppedError: `stop`, or the cluster, stopped the run; all is saved and the same call goes on.
    """
    config_lib.validate(config)
    if config.deterministic:
        use_repeatable_gpu_operations()
    mesh = make_data_mesh(fsdp=config.sharding.fsdp)
    check_divisible(config.batch_size, config.accumulation_steps, mesh)
    directory = records.open_workdir(workdir)
    records.check_same_run(directory, config)
    lock = WorkdirLock(directory) if is_main_process() else contextlib.nullcontext()
    with lock, Writers(config, directory) as writers:
        return _train_and_evaluate(
            config, directory, mesh, writers, profile_steps, stop or Stop(), initial
        )


def _train_and_evaluate(
    config: config_dict.ConfigDict,
    directory: epath.Path,
    mesh: Mesh,
    writers: Writers,
    profile_steps: tuple[int, int] | None,
    stop: Stop,
    initial: TrainState | None,
) -> TrainState:
    _prepare_datasets(config)
    source = datasets.training_source(config)
    if config.batch_size > len(source):
        raise UserError(
            f"config.batch_size = {config.batch_size} is larger than the dataset {source.name} of "
            f"{len(source)} images; take at most {len(source)}"
        )
    probed, why_not = _probed(config, source)  # fails now, not after training
    if bool(from_main_process(lambda: why_not)) != bool(why_not):
        raise UserError(
            "the processes do not find the same images to evaluate with; this one: "
            f"{why_not or 'there are some'}"
        )
    order = TrainingOrder(len(source), config.batch_size, config.seed)
    num_steps = config.num_epochs * order.steps_per_epoch
    profile = Profile(directory / "profile", profile_steps, num_steps)
    if is_main_process():
        records.write_config(directory, config)

    skipped = records.open_skipped(directory, config)
    skipped.check(source)  # fails now, if an earlier run ended so
    recipe = make_recipe(config, order.steps_per_epoch)
    shapes = abstract_state(config, recipe.optimizer)
    training = TrainingInput(config, source, order, mesh, skipped)
    events = records.EventsLog(directory)
    recovery = Recovery(config, directory, training, events)
    checkpoints = Checkpoints(
        directory,
        max_to_keep=config.checkpoint.max_to_keep,
        ignore_failed_saves=config.checkpoint.ignore_failed_saves,
        events=events,
    )
    try:
        start_step = checkpoints.latest_valid_step() or 0
        fingerprints = [agreed_fingerprint(source) for source in probed or ()]
        results = from_main_process(
            lambda: read_results(config, directory, num_steps, fingerprints)
        )
        if start_step == num_steps and (results is not None or probed is None):
            done = "trained and evaluated" if results else "trained"
            _logger.info(f"{directory} is done: {num_steps} steps {done}")
            if results:
                progress.log_lines(_logger, results_table(results))
            return checkpoints.restore(start_step, shapes, mesh)
        if is_main_process():
            check_same_images(directory, source, resuming=start_step > 0)
        describe(config, mesh, source, order, shapes, start_step)
        run = _Run(
            config=config,
            mesh=mesh,
            directory=directory,
            training=training,
            checkpoints=checkpoints,
            recovery=recovery,
            events=events,
            step_function=_blocking(compile_step(recipe, shapes, mesh), mesh),
            skip=compile_skip(shapes, mesh),
            checks=CorruptionChecks(config, shapes, mesh),
            probe=make_online_probe(config, probed, recipe.network, mesh, directory, skipped),
            writers=writers,
            pictures=Pictures(config, recipe, shapes, mesh) if writers.any else None,
            profile=profile,
        )
        with stop:
            while True:  # A rewind is a resume from an older checkpoint.
                if start_step:
                    state = checkpoints.restore(start_step, shapes, mesh, order)
                    events.write("resumed", step=start_step)
                else:
                    state = init_state(config, recipe.optimizer, mesh)
                    if initial is not None:
                        # Copies, because the step donates its state's buffers.
                        params, stats = jax.tree.map(
                            jnp.copy, (initial.params, initial.batch_stats)
                        )
                        state = dataclasses.replace(state, params=params, batch_stats=stats)
                try:
                    state = _train(run, state, start_step, stop)
                    break
                except TrainingFailedError as error:
                    failure = error.failure
                del state  # so that only one is held
                recovery.recover(failure, checkpoints)
                start_step = checkpoints.latest_valid_step() or 0
    finally:
        try:
            profile.close()
            checkpoints.close()
        finally:
            events.close()

    records.join_skipped(skipped, source)
    if probed is None:
        _logger.info(f"not probed: {why_not}")
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
    if is_main_process() and (results := read_results(config, directory, num_steps)):
        progress.log_lines(_logger, results_table(results))
        writers.scalars(num_steps, {f"{name}_top1": r["top1"] for name, r in results.items()})
    records.report_skipped(skipped)
    return state


def _probed(config: config_dict.ConfigDict, source: Source) -> tuple[EvaluationSources | None, str]:
    """What the backbone is probed with, or why it is not: images that are named must be usable."""
    try:
        return datasets.evaluation_sources(config, source), ""
    except NotMeasurableError as error:
        if config.evaluation.train or config.evaluation.test:
            raise
        _logger.info(f"the backbone will not be probed: {error}")
        return None, str(error)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a training works with; nothing of it changes when it rewinds."""

    config: config_dict.ConfigDict
    mesh: Mesh
    directory: epath.Path
    training: TrainingInput
    checkpoints: Checkpoints
    recovery: Recovery
    events: records.EventsLog
    step_function: StepFunction
    skip: Any
    checks: CorruptionChecks
    probe: OnlineProbe | None
    writers: Writers
    pictures: Pictures | None
    profile: Profile


def _train(run: _Run, state: TrainState, start_step: int, stop: Stop) -> TrainState:
    """Trains from a state to the last step.

    Raises:
      TrainingFailedError: a guard tripped, or a check for corruption failed.
      StoppedError: a signal came, and all is saved.
    """
    config, num_steps = run.config, run.training.num_steps
    if run.probe:
        run.probe.start(start_step, num_steps)
    run.profile.start(start_step)
    log = Log(config, run.directory, run.training, run.writers, start_step)
    with log:
        for step, batch in enumerate(run.training.on_devices(start_step), start=start_step + 1):
            metrics, wrong = None, None
            run.profile.before(step, state)
            if step in run.recovery.skipped:
                state = run.skip(state)
                run.events.write("skipped", step=step)
            else:
                state, metrics, wrong = run.checks.step(step, run.step_function, state, batch)
            if run.probe:
                run.probe.after_step(step, state.params, state.batch_stats)
            run.profile.after(step, state)
            stop.begin()  # the step is compiled; only now is there something to save
            last = step == num_steps
            asked = stop.received and jax.process_count() == 1  # several have to agree on a step
            stopping = asked or run.checkpoints.reached_preemption(step)
            if stopping:
                stop.agreed()
            saving = step % config.checkpoint.every_steps == 0 or last or stopping
            wrong = wrong or run.checks.replicas(step, state, saving=saving)
            if wrong:
                raise TrainingFailedError(TrainingFailure.of_corruption(step, wrong))
            if step % config.log_every_steps == 0 or step == start_step + 1 or saving:
                # The guards' state holds all that happened since it was last looked at.
                if (trip := guards.read_trip(state.guard)) is not None:
                    raise TrainingFailedError(TrainingFailure.of_trip(trip))
                if metrics is not None:
                    scalars = {name: float(value) for name, value in metrics.items()}
                    log.write(step, scalars | (run.probe.metrics() if run.probe else {}))
            if run.pictures and (saving or step == 1):
                log.images(step, run.pictures(state, *batch))
            if saving:
                log.flush()  # a checkpoint comes after all that belongs to it
                run.checkpoints.wait()
                if run.probe:
                    run.probe.save(step, run.checkpoints.all_steps())
                run.checkpoints.save(step, state, run.training.order)
            if stopping and not last:
                run.checkpoints.wait(required=True)
                raise StoppedError(
                    f"saved at step {step} of {num_steps}; run the same command to go on"
                )
    run.checkpoints.wait(required=True)
    if not stop.received and run.checkpoints.reached_preemption(num_steps + 1):
        stop.agreed()
    return state


def _blocking(step_function: StepFunction, mesh: Mesh) -> StepFunction:
    """Waits for each step where the devices share the real cores."""
    if not shares_cores(mesh):
        return step_function
    return lambda *arguments: jax.block_until_ready(step_function(*arguments))


def _prepare_datasets(config: config_dict.ConfigDict) -> None:
    """Prepares on the main process first, since the files may be shared by all."""
    if is_main_process():
        datasets.prepare(config)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("datasets prepared by the main process")
        datasets.prepare(config)
