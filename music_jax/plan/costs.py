"""The costs of a training step, and their cache in the user's directory."""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
from collections.abc import Callable

from music_jax.workdir.directory import user_directory
from music_jax.workdir.files import write_new

_logger = logging.getLogger(__name__)

_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt")
_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclasses.dataclass
class StepCost:
    """Memory, work and communication of one step, per chip.

    Attributes:
      chips: Number of chips.
      batch_size: Global batch size.
      fits: Whether the step fits into the chip's memory. If not, only memory is known.
      hbm_available_bytes: Memory of the chip that XLA may use.
      hbm_needed_bytes: Peak memory of the step.
      argument_bytes: Memory of the state and the batch.
      temporary_bytes: Memory of all intermediate arrays.
      flops: FLOPs as counted by XLA, with all iterations of loops.
      hbm_traffic_bytes: XLA's "bytes accessed", with all iterations of loops: bytes that
        instructions read and write, including arrays that stay in on-chip memory.
      hbm_only_bytes: The same without arrays in on-chip memory, counted by this package.
      received_bytes: Bytes that enter the chip from other chips of its slice.
      collective_bytes: Bytes of the collectives' results within a slice, by kind.
      objective_flops: FLOPs of the objective and its gradient alone.
      compile_seconds: Compilation time.
      estimates: Origin of each value that XLA does not give for the chip.
      slices: Number of slices.
      processes: Number of processes, one per host.
      dcn_bytes: Bytes that enter the chip from other slices, through the data center network.
      dcn_transfers: Number of transfers from other slices.
    """

    chips: int
    batch_size: int
    fits: bool
    hbm_available_bytes: float
    hbm_needed_bytes: float | None = None
    argument_bytes: float | None = None
    temporary_bytes: float | None = None
    flops: float | None = None
    hbm_traffic_bytes: float | None = None
    hbm_only_bytes: float | None = None
    received_bytes: float | None = None
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    objective_flops: float | None = None
    compile_seconds: float | None = None
    estimates: dict[str, str] = dataclasses.field(default_factory=dict)
    slices: int = 1
    processes: int = 1
    dcn_bytes: float | None = None
    dcn_transfers: int | None = None


def cached(key: str, compute: Callable[[], StepCost]) -> StepCost:
    """Returns the costs from the user's cache, or computes and caches them."""
    try:
        return StepCost(**json.loads((user_directory("cache", "plan") / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError):
        cost = compute()
    try:
        content = json.dumps(dataclasses.asdict(cost)).encode()
        write_new(user_directory("cache", "plan") / f"{key}.json", content)
    except OSError as error:
        _logger.info(f"the costs of this step are not cached: {error}")
    return cost


def cache_key(program: str, chips: str) -> str:
    """Returns a hash of all that costs depend on: program, chips, compilers and their settings."""
    installed = importlib.metadata.distributions()
    compilers = sorted(f"{d.name}={d.version}" for d in installed if d.name in _COMPILERS)
    names = ("chips", "compiling", "costs", "programs")
    own = [pathlib.Path(__file__).parent / f"{name}.py" for name in names]
    settings = [f"{name}={os.environ.get(name)}" for name in _SETTINGS]
    parts = [program, chips, *compilers, *settings, *(path.read_text() for path in own)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
