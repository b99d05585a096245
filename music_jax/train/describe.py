"""The summary of a run that is logged before it trains."""

import logging
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax.data.loader import TrainingOrder
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.objectives import music_lower_bound
from music_jax.train.state import TrainState

_logger = logging.getLogger(__name__)

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
    """Returns what defaults for large datasets do to a small one, and which field to change."""
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
