"""Plans one topology, in a process of its own."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable

from ml_collections import config_dict

from music_jax import registry
from music_jax.config import from_json
from music_jax.distributed.mesh import check_divisible
from music_jax.distributed.progress import log_to_stdout
from music_jax.distributed.signals import end_with_parent
from music_jax.plan.compiling import StepCost, measure, open_slice
from music_jax.plan.report import Plan

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """Input of a worker process that plans a topology.

    Attributes:
      config: The config as JSON.
      topology: Name of the topology.
      num_images: Number of images of the training split.
      decode_rate: Images that a core decodes in a second.
      find_batch_size: Whether to find the largest batch that fits.
    """

    config: str
    topology: str
    num_images: int
    decode_rate: float
    find_batch_size: bool


def begin() -> None:
    """Prepares a worker process; silences compilers, which warn that there is no TPU or GPU."""
    end_with_parent()
    log_to_stdout()
    registry.import_modules()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def check(task: Task) -> None:
    """Checks a task within seconds, before others are compiled for minutes.

    Raises:
      UserError: There is no such topology, or the batch cannot be divided over it.
    """
    config = _config(task)
    slice_ = open_slice(task.topology, config.sharding.fsdp)
    check_divisible(config.batch_size, config.accumulation_steps, slice_.mesh)


def run(task: Task) -> Plan:
    """Compiles the step, and further ones to find the largest batch that fits."""
    config = _config(task)
    slice_ = open_slice(task.topology, config.sharding.fsdp)

    def cost(batch_size: int, with_objective: bool = False) -> StepCost:
        config.batch_size = batch_size
        steps_per_epoch = max(1, task.num_images // batch_size)
        return measure(
            config, slice_, steps_per_epoch=steps_per_epoch, with_objective=with_objective
        )

    wanted = config.batch_size
    main = cost(wanted, with_objective=True)

    def memory_share(batch_size: int) -> float:
        found = main if batch_size == wanted else cost(batch_size)
        share = (found.hbm_needed_bytes or 0.0) / found.hbm_available_bytes
        verdict = "fits" if found.fits else "does not fit"
        _logger.info(f"{task.topology}: a batch of {batch_size:,} needs {share:.0%} and {verdict}")
        return min(share, 1.0) if found.fits else max(share, 1.0 + 1e-9)

    largest = None
    if task.find_batch_size:
        unit = slice_.mesh.size * config.accumulation_steps
        largest = largest_batch(memory_share, unit, wanted)
    return Plan(
        topology=task.topology,
        cost=main,
        num_images=task.num_images,
        num_epochs=config.num_epochs,
        decode_rate=task.decode_rate,
        largest_batch_size=largest,
    )


def _config(task: Task) -> config_dict.ConfigDict:
    return from_json(json.loads(task.config))


# The result is at most this share below the largest batch that fits.
_TOLERANCE = 1 / 32


def largest_batch(memory_share: Callable[[int], float], unit: int, start: int) -> int:
    """Returns the largest multiple of `unit` that fits, or up to 3 % less; 0 if none fits.

    Memory grows almost linearly with the batch, so a line through two batches gives the first
    guesses. Near the limit XLA saves memory, so bisection finds the rest.

    Args:
      memory_share: Function from a batch size to the share of the memory that it needs; it fits
        up to 1.
      unit: Number that divides every batch size.
      start: First batch size to try, a multiple of `unit`.
    """
    shares = {start // unit: memory_share(start)}
    while True:
        # In units: the largest that is known to fit, and the smallest that is known not to.
        low = max((n for n, share in shares.items() if share <= 1), default=0)
        high = min((n for n, share in shares.items() if share > 1), default=None)
        if high is not None and high - low <= max(1, int(low * _TOLERANCE)):
            return low * unit
        candidate = _candidate(shares, low, high)
        shares[candidate] = memory_share(candidate * unit)


def _candidate(shares: dict[int, float], low: int, high: int | None) -> int:
    """Returns a batch that has not been tried, above `low` and below `high`."""
    if high is not None and len(shares) > 3:
        return (low + high) // 2
    guess = _limit(shares)
    if high is None:
        return max(low + 1, min(guess, 8 * max(low, 1)))
    return min(max(guess, low + 1), high - 1)


def _limit(shares: dict[int, float]) -> int:
    """Returns the batch at which the line through the two batches near the limit reaches it."""
    nearest = sorted(shares, key=lambda n: abs(shares[n] - 1))[:2]
    a, b = nearest[0], nearest[1] if len(nearest) > 1 else 0
    at_a, at_b = shares[a], shares.get(b, 0.0)
    if (at_a - at_b) * (a - b) <= 0:  # no line: double or halve
        return 2 * a if at_a <= 1 else a // 2
    return int(a + (1 - at_a) * (a - b) / (at_a - at_b))
