"""Compiles the real training step for chips that are not at hand and reads its costs from XLA.

libtpu compiles for TPUs and JAX's CUDA plugin for GPUs, as on the machines with the chips.
Everything here needs `ENVIRONMENT` in the environment before JAX is imported.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.distributed.mesh import batch_sharding, check_divisible, make_data_mesh
from music_jax.errors import UserError
from music_jax.plan import counts, hlo
from music_jax.plan.chips import chip_of
from music_jax.train.recipe import Recipe, make_recipe
from music_jax.train.state import abstract_state
from music_jax.train.step import lower_step
from music_jax.workdir.files import write_new
from music_jax.workdir.user_directories import cache_directory

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
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = r"([\d.]+)([KMGTP]?)i?B?"


@dataclasses.dataclass(frozen=True)
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
      received_bytes: Bytes that enter the chip from other chips.
      collective_bytes: Bytes of the collectives' results, by kind.
      objective_flops: FLOPs of the objective and its gradient alone.
      compile_seconds: Compilation time.
      estimates: Origin of each value that XLA does not give for the chip.
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
_NOT_KNOWN = "unknown: this JAX cannot read the program that libtpu compiles for this chip"
_UNREAD_ESTIMATES = {
    "flops": "XLA's, which counts the body of each loop once",
    "hbm_traffic_bytes": "likewise",
    "hbm_only_bytes": _NOT_KNOWN,
    "received_bytes": _NOT_KNOWN,
    "collective_bytes": _NOT_KNOWN,
    "objective_flops": _NOT_KNOWN,
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips to compile for.

    Attributes:
      topology: Name of the topology.
      mesh: Mesh of the devices.
      chip_of_device: Index of the chip of each device of the mesh.
      hbm_bytes: Memory of one device that XLA may use.
      estimates: Origin of each value that XLA does not give for these chips.
    """

    topology: str
    mesh: Mesh
    chip_of_device: tuple[int, ...]
    hbm_bytes: float
    estimates: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def chips(self) -> int:
        """Number of chips."""
        return len(set(self.chip_of_device))

    @property
    def devices_per_chip(self) -> int:
        """Number of devices on each chip."""
        return self.mesh.size // self.chips


def open_slice(topology: str, fsdp: int | None = None) -> Slice:
    """Returns the chips of a topology such as `v5e:4x8` or `h100:8`.

    Args:
      topology: Name of the topology.
      fsdp: Value of `config.sharding.fsdp`.

    Raises:
      UserError: The topology is unknown to libtpu, or `fsdp` does not divide its devices.
    """
    chip = chip_of(topology)
    if chip.gpu is not None:
        description = topologies.get_topology_desc(
            platform="cuda",
            target_config=chip.gpu.target(chip.hbm_bytes_per_second),
            topology=f"1x1x{topology.partition(':')[2]}",  # GPUs of one machine
        )
        mesh = make_data_mesh(devices=description.devices, fsdp=fsdp)
        return Slice(topology, mesh, tuple(range(mesh.size)), chip.gpu.usable_bytes, _GPU_ESTIMATES)
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chip_config_name=chip.configuration
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={topology}: {_sentence(error)}; the sizes must be those of a slice, such "
            f"as {chip.example}"
        ) from error
    devices: Any = description.devices
    mesh = make_data_mesh(devices=devices, fsdp=fsdp)
    places: list[Any] = [tuple(device.coords) for device in mesh.devices.flat]
    chips = list(dict.fromkeys(places))
    chip_of_device = tuple(chips.index(place) for place in places)
    return Slice(topology, mesh, chip_of_device, _hbm_of_device(mesh))


def _hbm_of_device(mesh: Mesh) -> float:
    """Returns the memory of a device, which XLA reports for a program that needs too much."""
    whole = NamedSharding(mesh, PartitionSpec())
    side = 2**20
    too_large = jax.ShapeDtypeStruct((side, side), jnp.bfloat16, sharding=whole)
    try:
        jax.jit(lambda x: x @ x, out_shardings=whole).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        if (sizes := _out_of_memory(error)) is not None:
            return sizes[1]
        raise
    raise RuntimeError("XLA compiled a product of 2 TB matrices; expected an out-of-memory error")


def _out_of_memory(error: jax.errors.JaxRuntimeError) -> tuple[float, float] | None:
    """Returns the bytes needed and available; None if the error is not about memory."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    found = re.search(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", text)
    found = found or re.search(rf"Used {_SIZE} of {_SIZE} hbm", text)
    if found is None:
        return None
    needed, unit, available, unit_available = found.groups()
    return float(needed) * _UNITS[unit], float(available) * _UNITS[unit_available]


def measure(
    config: config_dict.ConfigDict, slice_: Slice, *, steps_per_epoch: int, with_objective: bool
) -> StepCost:
    """Returns the costs of the training step on a slice, from the cache if possible.

    Args:
      config: The config.
      slice_: The chips.
      steps_per_epoch: Steps per epoch of the learning-rate schedule.
      with_objective: Whether to compile the objective alone too, for its share of the FLOPs.

    Raises:
      UserError: The batch cannot be divided over the devices.
    """
    mesh = slice_.mesh
    check_divisible(config.batch_size, config.accumulation_steps, mesh)
    recipe = make_recipe(config, steps_per_epoch)
    state, side = abstract_state(config, recipe.optimizer), config.crop.size
    images = (config.batch_size, len(recipe.views), side, side, config.dataset.num_channels)
    lowered = lower_step(recipe, state, mesh, images)

    key = cache_key(lowered.as_text(), f"{slice_.topology} objective={with_objective}")
    return cached(
        key, lambda: _measure(lowered, config, recipe, slice_, with_objective=with_objective)
    )


def _measure(
    lowered: jax.stages.Lowered,
    config: config_dict.ConfigDict,
    recipe: Recipe,
    slice_: Slice,
    *,
    with_objective: bool,
) -> StepCost:
    mesh, per_chip = slice_.mesh, slice_.devices_per_chip
    cost = StepCost(
        chips=slice_.chips,
        batch_size=config.batch_size,
        fits=False,
        hbm_available_bytes=slice_.hbm_bytes * per_chip,
    )
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = _out_of_memory(error)
        if sizes is None:
            raise
        return dataclasses.replace(
            cost,
            hbm_needed_bytes=sizes[0] * per_chip,
            compile_seconds=time.perf_counter() - start,
        )
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes
    cost = dataclasses.replace(
        cost,
        hbm_needed_bytes=peak * per_chip,
        compile_seconds=seconds,
        estimates=slice_.estimates,
    )
    if peak > slice_.hbm_bytes:  # for GPUs, XLA also compiles what does not fit
        return cost
    cost = dataclasses.replace(
        cost,
        fits=True,
        argument_bytes=memory.argument_size_in_bytes * per_chip,
        temporary_bytes=memory.temp_size_in_bytes * per_chip,
    )
    try:
        program = read(compiled)
    except jax.errors.JaxRuntimeError:  # the compiler is newer than this JAX
        analysis: Any = compiled.cost_analysis()
        return dataclasses.replace(
            cost,
            flops=analysis["flops"] * per_chip,
            hbm_traffic_bytes=analysis["bytes accessed"] * per_chip,
            estimates=slice_.estimates | _UNREAD_ESTIMATES,
        )
    flops, traffic = costs(compiled, program)
    sent = counts.collectives(program, slice_.chip_of_device)
    return dataclasses.replace(
        cost,
        flops=flops * per_chip,
        hbm_traffic_bytes=traffic * per_chip,
        hbm_only_bytes=counts.work(program).hbm_bytes * per_chip,
        received_bytes=sent.received,
        collective_bytes={kind: size * per_chip for kind, size in sent.by_kind.items()},
        objective_flops=objective_flops(recipe, config, mesh) * per_chip
        if with_objective
        else None,
    )


def objective_flops(recipe: Recipe, config: config_dict.ConfigDict, mesh: Mesh) -> float:
    """Returns the FLOPs per device of the objective and its gradient, compiled alone."""

    def loss(embeddings: jax.Array) -> jax.Array:
        return recipe.objective_of_step(0)(embeddings[:, 0], embeddings[:, 1])[0]

    shape = (config.batch_size, len(recipe.views), recipe.network.num_embedding)
    embeddings = jax.ShapeDtypeStruct(shape, recipe.dtype)
    batch = batch_sharding(mesh)
    step = jax.jit(jax.value_and_grad(loss), in_shardings=batch, out_shardings=(None, batch))
    with jax.set_mesh(mesh):
        compiled = step.lower(embeddings).compile()
    return costs(compiled, read(compiled))[0]


def read(compiled: jax.stages.Compiled) -> hlo.Program:
    """Parses the program that XLA has compiled for one device."""
    return hlo.parse(compiled.as_text() or "")


def costs(compiled: jax.stages.Compiled, program: hlo.Program) -> tuple[float, float]:
    """Returns the FLOPs and the bytes accessed per device.

    XLA's cost analysis counts a loop's body once, so further iterations are counted here. It
    gives no counts for absent GPUs, for which everything is counted here.
    """
    analysis: Any = compiled.cost_analysis()
    all_iterations, one_iteration = counts.work(program), counts.work(program, loops_once=True)
    if analysis is None:
        return all_iterations.flops, all_iterations.bytes
    flops = analysis["flops"] + all_iterations.flops - one_iteration.flops
    return flops, analysis["bytes accessed"] + all_iterations.bytes - one_iteration.bytes


def _sentence(error: BaseException) -> str:
    return " ".join(re.sub(r"^[A-Z_]+: ", "", str(error).splitlines()[0]).split())


def cached(key: str, make: Callable[[], StepCost]) -> StepCost:
    """Returns the costs from the user's cache, or computes and caches them."""
    try:
        return StepCost(**json.loads((cache_directory("plan") / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError):
        cost = make()
    try:
        content = json.dumps(dataclasses.asdict(cost)).encode()
        write_new(cache_directory("plan") / f"{key}.json", content)
    except OSError as error:
        _logger.info(f"the costs of this step are not cached: {error}")
    return cost


def cache_key(program: str, chips: str) -> str:
    """Returns a hash of all that costs depend on: program, chips, compilers, and this package."""
    digest = hashlib.sha256()
    for text in (program, chips, *(f"{name}={_version(name)}" for name in _COMPILERS)):
        digest.update(text.encode() + b"\0")
    for name in ("compiling", "counts", "hlo", "chips"):
        digest.update((pathlib.Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
