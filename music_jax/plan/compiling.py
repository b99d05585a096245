"""Compiles the real training step for chips that you do not have and reads its costs from XLA.

libtpu compiles for TPUs and JAX's CUDA plugin for GPUs, as on the machines with the chips. Each
topology has a process of its own, which needs `ENVIRONMENT` in its environment.
"""

import dataclasses
import functools
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax import registry
from music_jax.config import from_json, validate
from music_jax.distributed.mesh import batch_sharding, check_divisible, make_data_mesh
from music_jax.distributed.progress import log_to_stdout
from music_jax.distributed.signals import end_with_parent
from music_jax.errors import UserError, one_line
from music_jax.plan import programs
from music_jax.plan.chips import check_has_slices, chip_of
from music_jax.plan.costs import StepCost, cache_key, cached
from music_jax.train.recipe import Recipe, make_recipe
from music_jax.train.state import abstract_state
from music_jax.train.step import crop_shapes, lower_step, mean_over_pairs

_logger = logging.getLogger(__name__)

# JAX computes on the CPU. libtpu only compiles: it looks for no TPU, and others may load it too.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # silences the warning that there is no GPU
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_TOLERANCE = 1 / 32  # largest share by which the batch that is found is below the largest that fits

# For GPUs, XLA gives the memory, but neither FLOPs nor bytes.
_GPU_ESTIMATES = {
    "hbm_available_bytes": "the share of the memory that JAX takes by default",
    "temporary_bytes": "XLA's, without the workspaces of cuDNN",
    "hbm_needed_bytes": "likewise",
    "flops": "counted in XLA's program for this GPU: matrix products and convolutions alone",
    "objective_flops": "likewise",
    "hbm_traffic_bytes": "counted in XLA's program for this GPU: what each kernel reads and "
    "writes, without caches",
    "hbm_only_bytes": "likewise",
}

# For a program that this JAX cannot read.
_UNREAD = "unknown: this JAX cannot read the program that libtpu compiles for this chip"
_UNREAD_ESTIMATES = {
    "flops": "XLA's, which counts the body of each loop once",
    "hbm_traffic_bytes": "likewise",
} | dict.fromkeys(
    ("hbm_only_bytes", "received_bytes", "collective_bytes", "objective_flops"), _UNREAD
)
_UNREAD_DCN = dict.fromkeys(("dcn_bytes", "dcn_transfers"), _UNREAD)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips to compile for, of one slice or of several equal ones."""

    topology: str  # of a slice
    mesh: Mesh
    chip_of_device: list[int]  # index of the chip of each device of the first slice
    hbm_bytes: float  # memory of one device that XLA may use
    estimates: dict[str, str]  # origin of each value that XLA does not give for these chips
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips."""
        return len(set(self.chip_of_device)) * self.slices


def prepare_process() -> None:
    """Prepares a worker process; silences compilers, which warn that there is no TPU or GPU."""
    end_with_parent()
    log_to_stdout()
    registry.import_modules()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def check(config: dict[str, Any], topology: str, slices: int = 1) -> None:
    """Checks a topology within seconds, before others are compiled for minutes.

    Args:
      config: The config as JSON values.
      topology: Name of the topology.
      slices: Number of slices.

    Raises:
      UserError: There is no such topology, the batch cannot be divided over it, or a part of the
        config is not registered in this process.
    """
    validate(from_json(config))  # This process may lack a registered part.
    mesh = open_slice(topology, config["sharding"]["fsdp"], slices).mesh
    check_divisible(config["batch_size"], config["accumulation_steps"], mesh)


def run(
    config: dict[str, Any],
    topology: str,
    num_images: int,
    find_batch_size: bool,
    slices: int = 1,
) -> tuple[StepCost, int | None]:
    """Compiles the step, and further ones to find the largest batch that fits.

    Args:
      config: The config as JSON values.
      topology: Name of a topology that `check` has accepted.
      num_images: Number of images of the training split.
      find_batch_size: Whether to find the largest batch that fits.
      slices: Number of slices.

    Returns:
      The costs of the config's step, and the largest batch size, None if it was not searched.
    """
    changed = from_json(config)
    slice_, wanted = open_slice(topology, changed.sharding.fsdp, slices), changed.batch_size

    @functools.cache
    def cost(batch_size: int) -> StepCost:
        changed.batch_size = batch_size
        steps_per_epoch = max(1, num_images // batch_size)
        return measure(changed, slice_, steps_per_epoch, with_objective=batch_size == wanted)

    def memory_share(batch_size: int) -> float:
        found = cost(batch_size)
        share = (found.hbm_needed_bytes or 0.0) / found.hbm_available_bytes
        verdict = "fits" if found.fits else "does not fit"
        _logger.info(f"{topology}: a batch of {batch_size:,} needs {share:.0%} and {verdict}")
        return min(share, 1.0) if found.fits else max(share, 1.0 + 1e-9)

    if not find_batch_size:
        return cost(wanted), None
    unit = slice_.mesh.size * changed.accumulation_steps
    return cost(wanted), largest_batch(memory_share, unit, wanted)


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
    shares, candidate = {0: 0.0}, start // unit  # by batch, in units
    while True:
        shares[candidate] = memory_share(candidate * unit)
        low = max(n for n, share in shares.items() if share <= 1)
        high = min((n for n, share in shares.items() if share > 1), default=None)
        if high is not None and high - low <= max(1, int(low * _TOLERANCE)):
            return low * unit
        if high is not None and len(shares) > 4:
            candidate = (low + high) // 2
            continue
        a, b = sorted(shares, key=lambda n: abs(shares[n] - 1))[:2]  # the nearest to the limit
        slope = max((shares[a] - shares[b]) / (a - b), 1e-9)
        limit = 8 * max(low, 1) if high is None else high - 1
        candidate = min(max(int(a + (1 - shares[a]) / slope), low + 1), limit)


def open_slice(topology: str, fsdp: int | None = None, slices: int = 1) -> Slice:
    """Returns the chips of a topology such as `v5e:4x8` or `h100:8`.

    Args:
      topology: Name of the topology.
      fsdp: Value of `config.sharding.fsdp`.
      slices: Number of slices of this topology.

    Raises:
      UserError: The topology is unknown to libtpu, `fsdp` does not divide its devices, or the
        bandwidth between slices is not published.
    """
    chip = chip_of(topology)
    if slices > 1:
        check_has_slices(topology)
    if chip.gpu is not None:
        description = topologies.get_topology_desc(
            platform="cuda",
            target_config=chip.gpu.target(chip.hbm_bytes_per_second),
            topology=f"1x1x{topology.partition(':')[2]}",  # GPUs of one machine
        )
        mesh = make_data_mesh(devices=description.devices, fsdp=fsdp)
        chips = list(range(mesh.size))
        return Slice(topology, mesh, chips, chip.gpu.usable_bytes, _GPU_ESTIMATES)
    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology,
            chip_config_name=chip.configuration,
            **({"num_slices": slices} if slices > 1 else {}),
        )
    except jax.errors.JaxRuntimeError as error:
        reason = re.sub(r"^[A-Z_]+: ", "", one_line(str(error).splitlines()[0]))
        raise UserError(
            f"--topology={topology}: {reason}; the sizes must be those of a slice, such as "
            f"{chip.example}"
        ) from error
    mesh = make_data_mesh(devices=description.devices, fsdp=fsdp)
    first: list[Any] = mesh.devices.flat[: mesh.size // slices].tolist()
    places = [tuple(device.coords) for device in first]
    chips = [sorted(set(places)).index(place) for place in places]
    return Slice(topology, mesh, chips, _hbm_of_device(mesh), {}, slices)


def _hbm_of_device(mesh: Mesh) -> float:
    """Returns the memory of a device, which XLA reports for a program that needs too much."""
    whole = NamedSharding(mesh, PartitionSpec())
    too_large = jax.ShapeDtypeStruct((2**20, 2**20), jnp.bfloat16, sharding=whole)
    try:
        jax.jit(lambda x: x @ x, out_shardings=whole).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        return _out_of_memory(error)[1]
    raise RuntimeError("XLA compiled a product of 2 TB matrices; expected an out-of-memory error")


def _out_of_memory(error: jax.errors.JaxRuntimeError) -> list[float]:
    """Returns the bytes needed and available; raises an error again that is not about memory."""
    size = r"([\d.]+)([KMGTP]?)i?B?"
    before, between = r"(?:\(|Used )", r"(?:\) exceeds available HBM \(| of )"
    found = re.search(f"RESOURCE_EXHAUSTED.*?{before}{size}{between}{size}", str(error), re.DOTALL)
    if found is None:
        raise error
    return [float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3)]


def measure(
    config: config_dict.ConfigDict, slice_: Slice, steps_per_epoch: int, *, with_objective: bool
) -> StepCost:
    """Returns the costs of the training step on a slice, from the cache if possible.

    Args:
      config: The config, whose batch can be divided over the devices.
      slice_: The chips.
      steps_per_epoch: Steps per epoch of the learning-rate schedule.
      with_objective: Whether to compile the objective alone too, for its share of the FLOPs.
    """
    recipe = make_recipe(config, steps_per_epoch)
    state = abstract_state(config, recipe.optimizer)
    lowered = lower_step(recipe, state, slice_.mesh, crop_shapes(config))

    def compute() -> StepCost:
        cost = _measure(lowered, slice_, config.batch_size)
        if with_objective and cost.received_bytes is not None:
            flops = _objective_flops(recipe, config.batch_size, slice_.mesh)
            cost.objective_flops = flops * (slice_.mesh.size // slice_.chips)
        return cost

    chips = f"{slice_.slices} x {slice_.topology} objective={with_objective}"
    key = cache_key(lowered.as_text(), chips)
    return cached(key, compute)


def _measure(lowered: jax.stages.Lowered, slice_: Slice, batch_size: int) -> StepCost:
    """Returns all costs but those of the objective alone."""
    per_chip = slice_.mesh.size // slice_.chips
    cost = StepCost(
        chips=slice_.chips,
        batch_size=batch_size,
        fits=False,
        hbm_available_bytes=slice_.hbm_bytes * per_chip,
        estimates=slice_.estimates,
        slices=slice_.slices,
        processes=len({device.process_index for device in slice_.mesh.devices.flat}),
    )
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        cost.hbm_needed_bytes = _out_of_memory(error)[0] * per_chip
        return cost
    finally:
        cost.compile_seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    cost.hbm_needed_bytes = memory.peak_memory_in_bytes * per_chip
    # For GPUs, XLA also compiles what does not fit.
    cost.fits = memory.peak_memory_in_bytes <= slice_.hbm_bytes
    if not cost.fits:
        return cost
    cost.argument_bytes = memory.argument_size_in_bytes * per_chip
    cost.temporary_bytes = memory.temp_size_in_bytes * per_chip
    try:
        program = programs.read(compiled)
    except jax.errors.JaxRuntimeError:  # the compiler is newer than this JAX
        analysis: Any = compiled.cost_analysis()
        cost.flops = analysis["flops"] * per_chip
        cost.hbm_traffic_bytes = analysis["bytes accessed"] * per_chip
        unknown = _UNREAD_ESTIMATES | (_UNREAD_DCN if slice_.slices > 1 else {})
        cost.estimates = slice_.estimates | unknown
        return cost
    flops, traffic = programs.costs(compiled, program)
    sent = programs.collectives(program, slice_.chip_of_device)
    cost.flops, cost.hbm_traffic_bytes = flops * per_chip, traffic * per_chip
    cost.hbm_only_bytes = programs.work(program).hbm_bytes * per_chip
    cost.received_bytes = sent.received
    cost.collective_bytes = {kind: size * per_chip for kind, size in sent.by_kind.items()}
    if sent.dcn_transfers:
        cost.dcn_bytes, cost.dcn_transfers = sent.dcn_received * per_chip, sent.dcn_transfers
    elif slice_.slices > 1:  # none is recognized, although gradients are exchanged
        cost.estimates = cost.estimates | _UNREAD_DCN
    return cost


def _objective_flops(recipe: Recipe, batch_size: int, mesh: Mesh) -> float:
    """Returns the FLOPs per device of the objective and its gradient, compiled alone."""

    def loss(embeddings: jax.Array) -> jax.Array:
        return mean_over_pairs(recipe.objective_of_step(0), embeddings)[0]

    num_views = len(recipe.views) + len(recipe.local_views)
    shape = (batch_size, num_views, recipe.network.num_embedding)
    embeddings = jax.ShapeDtypeStruct(shape, recipe.dtype)
    batch = batch_sharding(mesh)
    step = jax.jit(jax.value_and_grad(loss), in_shardings=batch, out_shardings=(None, batch))
    with jax.set_mesh(mesh):
        compiled = step.lower(embeddings).compile()
    return programs.costs(compiled, programs.read(compiled))[0]
