"""What runs in the processes that compile: one topology each."""

import dataclasses
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

from ml_collections import config_dict

from music_jax.config import from_json
from music_jax.distributed.mesh import check_divisible
from music_jax.plan.compiling import Figures, measure, open_slice
from music_jax.plan.report import Plan
from music_jax.plan.search import largest_batch

_logger = logging.getLogger(__name__)


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


def begin() -> None:
    """Silences compilers, which warn on standard error that they sit on no TPU or GPU.

    When the process that started this one ends, by Ctrl-C or killed, this one ends too, in the
    midst of a compilation.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def check(task: Task) -> None:
    """Finds in seconds what would fail only after the slices before it.

    Raises:
      UserError: there is no such slice, or the batch cannot be divided over it.
    """
    config = _config(task)
    slice_ = open_slice(task.topology, config.sharding.fsdp)
    check_divisible(config.batch_size, config.accumulation_steps, slice_.mesh)


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

    wanted = config.batch_size
    main = figures(wanted, with_objective=True)

    def memory_share(batch_size: int) -> float:
        found = main if batch_size == wanted else figures(batch_size)
        share = (found.hbm_needed_bytes or 0.0) / found.hbm_available_bytes
        says = "fits" if found.fits else "does not fit"
        _logger.info(f"{task.topology}: a batch of {batch_size:,} needs {share:.0%} and {says}")
        return min(share, 1.0) if found.fits else max(share, 1.0 + 1e-9)

    largest = None
    if task.find_batch_size:
        unit = slice_.mesh.size * config.accumulation_steps
        largest = largest_batch(memory_share, unit, wanted)
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
