"""What a run says of itself before it trains."""

from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import config_dict

from music_jax import progress
from music_jax.data.loader import TrainingOrder
from music_jax.data.sources import Source
from music_jax.train.state import TrainState


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
    progress.say_lines(
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
