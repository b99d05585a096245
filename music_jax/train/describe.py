"""What a run says of itself before it trains."""

import logging
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax.data.loader import TrainingOrder
from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.train.state import TrainState

_logger = logging.getLogger(__name__)

_FEW_STEPS = 10  # of an epoch
_UNUSED_SHARE = 0.01  # of the images, that every epoch may leave out


def describe(
    config: config_dict.ConfigDict,
    mesh: Mesh,
    source: Source,
    order: TrainingOrder,
    state: TrainState,
    start_step: int,
) -> None:
    """Prints the parameters, the devices, the arithmetic of the batch and the objective."""
    device = mesh.devices.flat[0]
    objective = config.objective
    progress.log_lines(
        _logger,
        parameter_overview.get_parameter_overview(
            _plain(state.params), include_stats=False, max_lines=80
        ),
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
        _logger.info(f"{name:12s} {value}")
    for hint in small_data_hints(config, order):
        _logger.info(f"warning: {hint}")


def small_data_hints(config: config_dict.ConfigDict, order: TrainingOrder) -> list[str]:
    """What defaults that are meant for large datasets do to a small one, and which field helps."""
    steps, images, logged = order.steps_per_epoch, order.num_records, config.log_every_steps
    unused = images - steps * config.batch_size
    hints = []
    if steps < _FEW_STEPS:
        hints.append(
            f"an epoch of {images} images is only {steps} step{'s' * (steps > 1)} of "
            f"config.batch_size = {config.batch_size}; a smaller batch makes more of it"
        )
    if unused > _UNUSED_SHARE * images:
        hints.append(
            f"each epoch leaves out {unused} of {images} images ({unused / images:.0%}), others "
            "each time, since batches are whole; another config.batch_size leaves out fewer"
        )
    if logged > config.num_epochs * steps:
        hints.append(
            f"the run has fewer steps than config.log_every_steps = {logged}: besides the first "
            "step and those of checkpoints only the last is logged"
        )
    elif logged > steps:
        hints.append(
            f"metrics are logged once in {logged / steps:.1f} epochs; a smaller "
            "config.log_every_steps logs more often"
        )
    return hints


def _plain(tree: Any) -> Any:
    """The tree with text keys, as the parameter table wants them."""
    if isinstance(tree, dict):
        return {str(key): _plain(value) for key, value in tree.items()}
    return tree
