"""What runs in the processes that compile: one topology each."""

import dataclasses
import json
import os

from ml_collections import config_dict

from music_jax import progress
from music_jax.config import from_json
from music_jax.mesh import check_divisible
from music_jax.plan.compiling import Figures, largest_batch, measure, open_slice
from music_jax.plan.report import Plan


@dataclasses.dataclass(frozen=True)
class Task:
    """What to compile.

    Attributes:
      config: the config as JSON.
      topology: the slice's name.
      num_images: of the training split.
      decode_rate: images a second that a core decodes.
      find_batch_size: whether to look for the largest batch that fits.
    """

    config: str
    topology: str
    num_images: int
    decode_rate: float
    find_batch_size: bool


def quiet() -> None:
    """Silences libtpu, which warns on standard error that it does not sit on a TPU."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def check(task: Task) -> None:
    """Finds in seconds what would fail only after the slices before it.

    Raises:
      UserError: there is no such slice, or the batch cannot be divided over it.
    """
    config = _config(task)
    slice_ = open_slice(task.topology, config.sharding.fsdp)
    check_divisible(config.batch_size, slice_.mesh, "batch_size")


def run(task: Task) -> Plan:
    """Compiles the step, and further ones if the largest batch is asked for."""
    config = _config(task)
    slice_ = open_slice(task.topology, config.sharding.fsdp)

    def figures(batch_size: int, with_objective: bool = False) -> Figures:
        config.batch_size = batch_size
        steps_per_epoch = max(1, task.num_images // batch_size)
        return measure(
            config, slice_, steps_per_epoch=steps_per_epoch, with_objective=with_objective
        )

    def fits(batch_size: int) -> bool:
        progress.say(f"compiling for {task.topology} with a batch of {batch_size} ...")
        found = figures(batch_size)
        progress.say(f"  {'fits' if found.fits else 'does not fit'}")
        return found.fits

    wanted = config.batch_size
    main = figures(wanted, with_objective=True)
    largest = None
    if task.find_batch_size:
        known = (wanted, None) if main.fits else (0, wanted)
        largest = largest_batch(fits, slice_.mesh.size, *known)
    return Plan(
        topology=task.topology,
        figures=main,
        num_images=task.num_images,
        num_epochs=config.num_epochs,
        decode_rate=task.decode_rate,
        largest_batch_size=largest,
    )


def _config(task: Task) -> config_dict.ConfigDict:
    return from_json(json.loads(task.config))
