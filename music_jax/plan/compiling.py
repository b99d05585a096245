"""Compiling the real training step for chips that are not at hand, and XLA's figures of it.

TPUs are compiled for by libtpu, GPUs by JAX's CUDA plugin: the same compilers that the chips' own
machines use.

Everything here runs in a process whose environment `ENVIRONMENT` was set before JAX was imported.
"""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_dict

from music_jax.distributed.mesh import batch_sharding, check_divisible, make_data_mesh
from music_jax.errors import UserError
from music_jax.plan import counts, hlo
from music_jax.plan.cache import remember
from music_jax.plan.chips import chip_of
from music_jax.train.recipe import Recipe, make_recipe
from music_jax.train.state import abstract_state
from music_jax.train.step import lower_step

# JAX itself computes on the CPU; libtpu only compiles, asks nobody which TPU it sits on, and shares
# the machine with others that do.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # that there is no GPU is no news
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_LARGEST_ARRAYS = 5
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = r"([\d.]+)([KMGTP]?)i?B?"


@dataclasses.dataclass(frozen=True)
class Figures:
    """What XLA says of one step, for a whole chip.

    Attributes:
      chips: how many there are.
      batch_size: of the global batch.
      fits: whether it compiles into the chip's memory.
      hbm_available_bytes: what XLA may use of the chip's memory.
      hbm_needed_bytes: what the step needs at its peak; where it does not fit, what XLA would need.
      argument_bytes: of the state and of the batch.
      temporary_bytes: of everything between.
      flops: XLA's own figure, and what loops add to it.
      hbm_traffic_bytes: XLA's "bytes accessed" likewise: what its instructions read and write. It
        counts arrays that stay in on-chip memory too.
      hbm_only_bytes: counted here without those.
      received_bytes: what enters the chip from other chips.
      collective_bytes: results of the collectives, by kind.
      objective_flops: of the objective and its gradient alone.
      largest_arrays: the largest that the step writes: bytes, type and shape, how many, by what.
      compile_seconds: how long the step took to compile.
      estimates: of each figure that is not XLA's own for the chip, how it was found.
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
    largest_arrays: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    compile_seconds: float | None = None
    estimates: dict[str, str] = dataclasses.field(default_factory=dict)


# For GPUs XLA tells the memory, but neither FLOPs nor bytes.
_GPU_ESTIMATES = {
    "hbm_available_bytes": "the share of the memory that JAX takes by default",
    "temporary_bytes": "XLA's, without the workspaces that cuDNN asks for on a GPU",
    "hbm_needed_bytes": "likewise",
    "flops": "counted in XLA's program for this GPU: matrix products and convolutions alone",
    "objective_flops": "likewise",
    "hbm_traffic_bytes": "counted in XLA's program for this GPU: what each kernel takes and gives, "
    "as if none of it were found in a cache",
    "hbm_only_bytes": "likewise",
}


# Where this JAX cannot read the program that libtpu has compiled.
_NOT_KNOWN = "not known: this JAX cannot read the program that libtpu compiles for this chip"
_UNREAD_ESTIMATES = {
    "flops": "XLA's, which takes the body of each loop once",
    "hbm_traffic_bytes": "likewise",
    "hbm_only_bytes": _NOT_KNOWN,
    "received_bytes": _NOT_KNOWN,
    "collective_bytes": _NOT_KNOWN,
    "objective_flops": _NOT_KNOWN,
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that need not be at hand.

    Attributes:
      topology: its name.
      mesh: of their devices.
      chip_of_device: for each device of the mesh, in its order, the index of its chip.
      hbm_bytes: what XLA may use of the memory of one device.
      estimates: of the figures that XLA does not give for these chips, how they are found.
    """

    topology: str
    mesh: Mesh
    chip_of_device: tuple[int, ...]
    hbm_bytes: float
    estimates: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def chips(self) -> int:
        """How many chips they are; a chip of two devices counts once."""
        return len(set(self.chip_of_device))

    @property
    def devices_per_chip(self) -> int:
        """Devices on each chip."""
        return self.mesh.size // self.chips


def open_slice(topology: str, fsdp: int | None = None) -> Slice:
    """The chips that a topology such as `v5e:4x8` or `h100:8` names.

    Args:
      topology: its name.
      fsdp: as `config.sharding.fsdp`.

    Raises:
      UserError: libtpu knows no such topology, or `fsdp` does not divide its devices.
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
    """What XLA says is there when it is asked for more than any chip has."""
    whole = NamedSharding(mesh, PartitionSpec())
    side = 2**20
    too_large = jax.ShapeDtypeStruct((side, side), jnp.bfloat16, sharding=whole)
    try:
        jax.jit(lambda x: x @ x, out_shardings=whole).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        if (sizes := _out_of_memory(error)) is not None:
            return sizes[1]
        raise
    raise RuntimeError("XLA compiled a product of 2 TB matrices: it no longer checks memory")


def _out_of_memory(error: jax.errors.JaxRuntimeError) -> tuple[float, float] | None:
    """Bytes needed and available, if that is what the error is about."""
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
) -> Figures:
    """Compiles the training step for a slice, unless the same was compiled before.

    Args:
      config: what is trained.
      slice_: the chips.
      steps_per_epoch: for the schedule.
      with_objective: compile the objective alone too, for its share of the FLOPs.

    Returns:
      Its figures; only the memory's if it does not fit.

    Raises:
      UserError: the batch cannot be divided over the devices.
    """
    mesh = slice_.mesh
    check_divisible(config.batch_size, config.accumulation_steps, mesh)
    recipe = make_recipe(config, steps_per_epoch)
    state, side = abstract_state(config, recipe.optimizer), config.crop.size
    images = (config.batch_size, len(recipe.views), side, side, config.dataset.num_channels)
    lowered = lower_step(recipe, state, mesh, images)

    def make() -> Figures:
        return _measure(lowered, config, recipe, slice_, with_objective=with_objective)

    chips = f"{slice_.topology} objective={with_objective}"
    return remember(lowered.as_text(), chips, make, Figures)


def _measure(
    lowered: jax.stages.Lowered,
    config: config_dict.ConfigDict,
    recipe: Recipe,
    slice_: Slice,
    *,
    with_objective: bool,
) -> Figures:
    mesh, per_chip = slice_.mesh, slice_.devices_per_chip
    figures = Figures(
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
            figures,
            hbm_needed_bytes=sizes[0] * per_chip,
            compile_seconds=time.perf_counter() - start,
        )
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes
    figures = dataclasses.replace(
        figures,
        hbm_needed_bytes=peak * per_chip,
        compile_seconds=seconds,
        estimates=slice_.estimates,
    )
    if peak > slice_.hbm_bytes:  # where XLA compiles what does not fit, as for GPUs
        return figures
    figures = dataclasses.replace(
        figures,
        fits=True,
        argument_bytes=memory.argument_size_in_bytes * per_chip,
        temporary_bytes=memory.temp_size_in_bytes * per_chip,
    )
    try:
        program = read(compiled)
    except jax.errors.JaxRuntimeError:  # of a compiler that is newer than this JAX
        analysis: Any = compiled.cost_analysis()
        return dataclasses.replace(
            figures,
            flops=analysis["flops"] * per_chip,
            hbm_traffic_bytes=analysis["bytes accessed"] * per_chip,
            estimates=slice_.estimates | _UNREAD_ESTIMATES,
        )
    flops, traffic = costs(compiled, program)
    sent = counts.collectives(program, slice_.chip_of_device)
    return dataclasses.replace(
        figures,
        flops=flops * per_chip,
        hbm_traffic_bytes=traffic * per_chip,
        hbm_only_bytes=counts.work(program).hbm_bytes * per_chip,
        received_bytes=sent.received,
        collective_bytes={kind: size * per_chip for kind, size in sent.by_kind.items()},
        objective_flops=objective_flops(recipe, config, mesh) * per_chip
        if with_objective
        else None,
        largest_arrays=[
            {"bytes": size, "array": str(array), "count": count, "operation": scope}
            for size, array, count, scope in counts.largest_arrays(program, _LARGEST_ARRAYS)
        ],
    )


def objective_flops(recipe: Recipe, config: config_dict.ConfigDict, mesh: Mesh) -> float:
    """FLOPs a device of the objective and its gradient, compiled alone for the same devices."""

    def loss(embeddings: jax.Array) -> jax.Array:
        return recipe.objective(embeddings[:, 0], embeddings[:, 1])[0]

    shape = (config.batch_size, len(recipe.views), recipe.network.num_embedding)
    embeddings = jax.ShapeDtypeStruct(shape, recipe.dtype)
    batch = batch_sharding(mesh)
    step = jax.jit(jax.value_and_grad(loss), in_shardings=batch, out_shardings=(None, batch))
    with jax.set_mesh(mesh):
        compiled = step.lower(embeddings).compile()
    return costs(compiled, read(compiled))[0]


def read(compiled: jax.stages.Compiled) -> hlo.Program:
    """The program that XLA has compiled for one device."""
    return hlo.parse(compiled.as_text() or "")


def costs(compiled: jax.stages.Compiled, program: hlo.Program) -> tuple[float, float]:
    """FLOPs and bytes accessed a device.

    XLA's cost analysis takes a loop's body once. What its further turns add is counted here, and is
    nothing for a program without loops. For GPUs that are not at hand it has none: all is counted
    here.
    """
    analysis: Any = compiled.cost_analysis()
    all_turns, one_turn = counts.work(program), counts.work(program, loops_once=True)
    if analysis is None:
        return all_turns.flops, all_turns.bytes
    flops = analysis["flops"] + all_turns.flops - one_turn.flops
    return flops, analysis["bytes accessed"] + all_turns.bytes - one_turn.bytes


def _sentence(error: BaseException) -> str:
    return " ".join(re.sub(r"^[A-Z_]+: ", "", str(error).splitlines()[0]).split())
