"""Pre-trains and evaluates: `train_and_evaluate` calls the stages of a run in their order."""

import collections
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax import config as config_lib
from music_jax import registry
from music_jax.checkpoint.manager import Checkpoints
from music_jax.data import datasets
from music_jax.data.order import TrainingOrder
from music_jax.data.skipped import join_skipped, open_skipped, report_skipped
from music_jax.data.sources import Source
from music_jax.data.statistics import with_statistics
from music_jax.distributed import progress
from music_jax.distributed.mesh import (
    check_divisible,
    is_main_process,
    make_data_mesh,
    shares_cores,
    use_deterministic_gpu_operations,
)
from music_jax.distributed.signals import Stop
from music_jax.errors import StoppedError, UserError
from music_jax.models.network import Tree
from music_jax.objectives import music_lower_bound
from music_jax.train.failures import CheckedStep, Recovery, TrainingFailure, read_trip
from music_jax.train.input import (
    TrainingInput,
    check_same_images,
    color_warnings,
    small_data_warnings,
)
from music_jax.train.metric_logger import Draw, MetricLogger, make_draw
from music_jax.train.online_probe import OnlineProbe, make_online_probe
from music_jax.train.profile import Profile
from music_jax.train.recipe import Recipe, make_recipe
from music_jax.train.state import TrainState, abstract_state, init_state, restore_state, save_state
from music_jax.train.step import compile_skip, compile_step
from music_jax.workdir.directory import open_workdir
from music_jax.workdir.lock import WorkdirLock
from music_jax.workdir.logs import EventsLog
from music_jax.workdir.run_config import check_same_run, write_config

_logger = logging.getLogger(__name__)

# Parameters and running statistics as in a TrainState, each of all modules or of some of them.
Variables = tuple[dict[str, Any], dict[str, Any]]


def train_and_evaluate(
    config: config_dict.ConfigDict,
    workdir: str,
    *,
    profile_steps: tuple[int, int] | None = None,
    stop: Stop | None = None,
    initial: Variables | None = None,
) -> TrainState:
    """Pre-trains, resuming if the workdir has a checkpoint, then probes the backbone.

    Messages go to the logger `music_jax`; `music_jax.distributed.progress.log_to_stdout` prints
    them.

    Args:
      config: Config with the fields of `music_jax.config.default_config`.
      workdir: Directory of checkpoints, logs and results; may be a `gs://` one.
      profile_steps: First and last step to record a JAX profile of, in `workdir/profile`.
      stop: Request to save and stop early; None for a run without such requests.
      initial: Parameters and running statistics that a new run starts from, those of modules that
        are not in it being random; by default those of `config.backbone.init_from`. A resumed run
        reads neither.

    Returns:
      The state after the last step.

    Raises:
      UserError: The config, the dataset or the workdir cannot be used.
      DivergedError: A guard tripped; see `music_jax.train.guards`.
      CorruptedError: Devices did not hold, or did not compute, the same bits.
      StoppedError: `stop` or the cluster stopped the run; all is saved, and the same call resumes.
    """
    config_lib.validate(config)
    if config.deterministic:
        use_deterministic_gpu_operations()
    mesh = make_data_mesh(fsdp=config.sharding.fsdp)
    check_divisible(config.batch_size, config.accumulation_steps, mesh)
    directory, stop = open_workdir(workdir), stop or Stop()
    check_same_run(directory, config)
    lock = WorkdirLock(directory) if is_main_process() else contextlib.nullcontext()
    with lock, MetricLogger(config, directory) as logger:
        source = _open_source(config)
        config = with_statistics(config, source, directory)
        # What cannot be evaluated, profiled or read fails now, not after the training.
        final = registry.final_evaluation(config, directory, source)
        order = TrainingOrder(len(source), config.batch_size, config.seed)
        num_steps = config.num_epochs * order.steps_per_epoch
        profile = Profile(directory / "profile", profile_steps, num_steps)
        skipped = open_skipped(directory, config)
        skipped.check(source)

        recipe = make_recipe(config, order.steps_per_epoch)
        shapes = abstract_state(config, recipe.optimizer)
        training = TrainingInput(config, source, order, mesh, skipped)
        events = EventsLog(directory)
        checkpoints = Checkpoints(
            directory,
            max_to_keep=config.checkpoint.max_to_keep,
            ignore_failed_saves=config.checkpoint.ignore_failed_saves,
            events=events,
        )
        closing = contextlib.closing
        with closing(events), closing(profile), closing(checkpoints):
            recovery = Recovery(config, directory, training, events)
            start_step = checkpoints.latest_valid_step() or 0
            # Read once, but only if the run starts, or rewinds to its start.
            variables = functools.cache(lambda: initial or _initial_variables(config))
            if not start_step:
                variables()  # fails before the config is stored, which could then not be corrected
            if is_main_process():
                write_config(directory, config)
            if start_step == num_steps and final.is_done(num_steps):
                return restore_state(checkpoints, start_step, shapes, mesh)
            if is_main_process():
                check_same_images(directory, source, resuming=start_step > 0)
            _describe(config, mesh, source, order, shapes, start_step)
            labeled = final.sources.train if final.sources else source
            run = _Run(
                config=config,
                training=training,
                checkpoints=checkpoints,
                recovery=recovery,
                events=events,
                checked_step=CheckedStep(config, compile_step(recipe, shapes, mesh), shapes, mesh),
                skip=compile_skip(shapes, mesh),
                online=registry.online_evaluation(config, labeled, recipe.network, mesh, skipped)
                if config.online.every_steps
                else None,
                probe=make_online_probe(config, final.sources, recipe, mesh, skipped),
                logger=logger,
                draw=make_draw(config, recipe, shapes, mesh) if logger.shows_images else None,
                profile=profile,
            )
            with stop:
                while True:  # a rewind is a resume from an older checkpoint
                    if start_step:
                        state = restore_state(checkpoints, start_step, shapes, mesh, order)
                        events.write("resumed", step=start_step)
                    else:
                        state = _first_state(config, recipe, mesh, variables())
                    try:
                        state = _train(run, state, start_step, stop)
                        break
                    except TrainingFailure as error:
                        failure = error.with_traceback(None)  # whose frames hold the state
                    del state  # so that only one is in memory
                    recovery.recover(failure, checkpoints)
                    start_step = checkpoints.latest_valid_step() or 0

        join_skipped(skipped, source)
        accuracies = final.run(
            network=recipe.network,
            params=state.params,
            batch_stats=state.batch_stats,
            step=num_steps,
            mesh=mesh,
            skipped=skipped,
        )
        logger.summary(num_steps, accuracies)
        report_skipped(skipped)
        return state


@dataclasses.dataclass(frozen=True)
class _Run:
    """Everything that stays the same when a training rewinds."""

    config: config_dict.ConfigDict
    training: TrainingInput
    checkpoints: Checkpoints
    recovery: Recovery
    events: EventsLog
    checked_step: CheckedStep
    skip: Callable[[TrainState], TrainState]
    online: Callable[[Tree, Tree], dict[str, float]] | None
    probe: OnlineProbe | None
    logger: MetricLogger
    draw: Draw | None
    profile: Profile


def _train(run: _Run, state: TrainState, start_step: int, stop: Stop) -> TrainState:
    """Trains from a state to the last step.

    Raises:
      TrainingFailure: A guard tripped, or a check for corruption failed.
      StoppedError: The run was stopped, and all is saved.
    """
    config, num_steps = run.config, run.training.num_steps
    if run.probe:
        run.probe.start(start_step, num_steps, run.checkpoints)
    with run.logger.steps(start_step, run.training):
        if run.online and not start_step:
            run.logger.write(0, run.online(state.params, state.batch_stats))
        for step, batch in enumerate(run.training.on_devices(start_step), start=start_step + 1):
            metrics, wrong = None, None
            run.profile.before(step, state)
            if step in run.recovery.skipped:
                state = run.skip(state)
                run.events.write("skipped", step=step)
            else:
                state, metrics, wrong = run.checked_step(step, state, batch)
            if shares_cores(run.training.placing.mesh):
                jax.block_until_ready(state)
            if run.probe:
                run.probe.after_step(step, state.params, state.batch_stats)
            run.profile.after(step, state)

            stop.begin()  # the step is compiled: from now on there is something to save
            last = step == num_steps
            asked = stop.received and jax.process_count() == 1  # several have to agree on a step
            stopping = asked or run.checkpoints.reached_preemption(step)
            if stopping:
                stop.agreed()
            saving = step % config.checkpoint.every_steps == 0 or last or stopping
            wrong = wrong or run.checked_step.replicas(step, state, saving=saving)
            if wrong:
                raise TrainingFailure(step, step, wrong, corrupted=True)
            scheduled = last or step == 1 or step % config.log_every_steps == 0
            scheduled |= step % config.checkpoint.every_steps == 0
            due = scheduled or step == start_step + 1 or stopping
            measuring = run.online is not None and step % config.online.every_steps == 0
            if due or measuring:
                # The guards' state covers every step since it was last read.
                if (failure := read_trip(state.guard)) is not None:
                    raise failure
                if metrics is not None:
                    scalars = {name: float(value) for name, value in metrics.items()}
                    # Lines that an uninterrupted run lacks leave the probe's counts alone.
                    if run.probe and (scheduled or measuring):
                        scalars |= run.probe.metrics()
                    if run.online and measuring:
                        scalars |= run.online(state.params, state.batch_stats)
                    run.logger.write(step, scalars)
            if run.draw and (saving or step == 1):
                run.logger.summary(step, run.draw(state, *batch))
            if saving:
                run.logger.flush()  # first, so that no logged step before a checkpoint is lost
                trees = {"online_probe": run.probe.state} if run.probe else {}
                save_state(run.checkpoints, step, state, run.training.order, **trees)
            if stopping and not last:
                run.checkpoints.wait(required=True)
                raise StoppedError(
                    f"saved at step {step} of {num_steps}; rerun the command to resume"
                )
    run.checkpoints.wait(required=True)
    if not stop.received and run.checkpoints.reached_preemption(num_steps + 1):
        stop.agreed()
    return state


def _open_source(config: config_dict.ConfigDict) -> Source:
    """Opens the training images, after the main process has prepared the files that all share."""
    if is_main_process():
        datasets.prepare(config)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("datasets prepared by the main process")
        datasets.prepare(config)
    source = datasets.training_source(config)
    if config.batch_size > len(source):
        raise UserError(
            f"config.batch_size = {config.batch_size} is larger than the dataset {source.name} of "
            f"{len(source)} images; take at most {len(source)}"
        )
    return source


def _initial_variables(config: config_dict.ConfigDict) -> Variables:
    return registry.initial_backbone(config) if config.backbone.init_from else ({}, {})


def _first_state(
    config: config_dict.ConfigDict, recipe: Recipe, mesh: Mesh, initial: Variables
) -> TrainState:
    state = init_state(config, recipe.optimizer, mesh)

    def replace(tree: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        shardings = {name: jax.tree.map(lambda x: x.sharding, tree[name]) for name in new}
        # Copies, because the step donates its state's buffers.
        return tree | jax.tree.map(jnp.copy, jax.device_put(new, shardings))

    params, batch_stats = map(replace, (state.params, state.batch_stats), initial)
    return dataclasses.replace(state, params=params, batch_stats=batch_stats)


def _describe(
    config: config_dict.ConfigDict,
    mesh: Mesh,
    source: Source,
    order: TrainingOrder,
    state: TrainState,
    start_step: int,
) -> None:
    """Logs the parameters, the devices, the batch arithmetic, the objective and warnings.

    The table of all parameters is logged at the level DEBUG.
    """
    params = {"/".join(map(str, path)): x for path, x in flatten_dict(state.params).items()}
    if _logger.isEnabledFor(logging.DEBUG):
        from clu import parameter_overview

        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        progress.log_lines(_logger, table, level=logging.DEBUG)
    sizes: collections.Counter[str] = collections.Counter()
    for name, x in params.items():
        sizes[name.partition("/")[0]] += x.size
    groups = ", ".join(f"{group} {size:,}" for group, size in sizes.items())
    processes, objective = jax.process_count(), config.objective
    units = objective.units_per_segment
    lines = {
        "parameters": f"{sizes.total():,} ({groups})",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind} in {processes} process(es)",
        "batch": f"{config.batch_size} = {processes} process(es) x {mesh.size // processes} "
        f"device(s) x {config.batch_size // mesh.size}",
        "training": f"{config.num_epochs} epochs x {order.steps_per_epoch} steps of {source.name} "
        f"({order.num_records} images), {config.compute_dtype}",
        "objective": f"{objective.name} of {config_lib.embedding_size(config)} dimensions",
    }
    if objective.name == "music":
        lines["objective"] = f"music, {objective.num_segments} segments x {units} units"
        terms = ("diagonal", "cross_segment", "invariance")
        if all(
            objective[f"{term}_weight"] == 1.0 for term in terms
        ):  # no bound is known for others
            lines["lower bound"] = f"-3 log {units} = {music_lower_bound(units):.4f}"
    if start_step:
        lines["resuming"] = f"after step {start_step}"
    for name, value in lines.items():
        _logger.info(f"{name:12s} {value}")
    for warning in (*small_data_warnings(config, order), *color_warnings(config)):
        _logger.warning(f"warning: {warning}")
