"""Devices and processes: the mesh, which rows of a batch are whose, and how they get there."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import pkgutil
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax._src import xla_bridge  # Whether devices are started has no public name.
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from music_jax.distributed import failure_propagation
from music_jax.distributed.cores import usable_cores
from music_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")

# What JAX says where it recognizes no cluster.
_NO_CLUSTER = "coordinator_address should be defined"
# Where a launcher that JAX cannot ask for the peers says how many there are: Open MPI from 5 on,
# and what starts MPICH. As so many runs of one process they would all write to one workdir.
_LAUNCHERS_COUNTS = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE")


def join_cluster(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the run's other processes, if there are any; to be called before anything uses JAX.

    The cluster is asked only if none of the three is given.

    Args:
      coordinator_address: HOST:PORT of process 0, or None where the cluster tells all three.
      num_processes: processes in the run.
      process_id: index of this one.

    Raises:
      UserError: only some of the three are given, the processes do not find each other, or a
        launcher has started several without saying where process 0 is.
    """
    given = num_processes is not None
    _check_processes(coordinator_address, num_processes, process_id)
    if num_processes == 1:
        return
    # Until there is something to save, SIGTERM is not JAX's; see `hear_preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with failure_propagation.joining():
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                cluster_detection_method="deactivate" if given else None,
                initialization_timeout=failure_propagation.JOIN_TIMEOUT_SECONDS,
                heartbeat_timeout_seconds=failure_propagation.HEARTBEAT_TIMEOUT_SECONDS,
            )
    except Exception as error:  # a cluster's own client raises whatever it likes
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if (address := failure_propagation.coordinator()) is not None:
            raise UserError(
                f"cannot join the run's other processes at {address}: {message}; is process 0 "
                "running, and its port reachable?"
            ) from error
        if _NO_CLUSTER not in message:
            raise UserError(
                f"cannot find out whether this cluster runs further processes: {message}; give "
                "--num_processes=1 if it does not, else --coordinator_address, --num_processes and "
                "--process_id"
            ) from error
        for name in _LAUNCHERS_COUNTS:
            if int(os.environ.get(name) or 1) > 1:
                raise UserError(
                    f"{name} says that there are {os.environ[name]} processes, but not where "
                    "process 0 is; give --coordinator_address, --num_processes and --process_id"
                ) from error
        logging.info("running as a single process: %s", error)
    if failure_propagation.exist():
        failure_propagation.watch()


def _check_processes(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Checks the three flags."""
    given = (coordinator_address, num_processes, process_id)
    if num_processes == 1 and process_id in (None, 0):
        return
    if any(g is None for g in given) and any(g is not None for g in given):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id go together: give all three, "
            "none where the cluster tells them, or --num_processes=1 alone; got "
            f"{coordinator_address}, {num_processes}, {process_id}"
        )
    if coordinator_address is None or num_processes is None or process_id is None:
        return
    if not re.fullmatch(r".+:\d{1,5}", coordinator_address):
        raise UserError(f"--coordinator_address must be HOST:PORT; got {coordinator_address!r}")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id must be in [0, num_processes = {num_processes}); got {process_id}"
        )


def check_gpu_plugins() -> None:
    """Checks that the GPUs that JAX_PLATFORMS names have a plugin; JAX may pass over those without.

    Raises:
      UserError: one has none.
    """
    plugins = [point.value for point in importlib.metadata.entry_points(group="jax_plugins")]
    spec = importlib.util.find_spec("jax_plugins")
    if spec is not None:
        plugins += [m.name for m in pkgutil.iter_modules(spec.submodule_search_locations)]
    chosen = os.environ.get("JAX_PLATFORMS", "")
    for platform in {"cuda", "rocm"} & set(chosen.split(",")):
        if not any(platform in plugin for plugin in plugins):
            raise UserError(
                f"JAX_PLATFORMS={chosen} cannot be used here: JAX's plugin for {platform} is not "
                "installed; unset it, or install what it names"
            )


def look_for_no_absent_tpu() -> None:
    """Where there is libtpu but no TPU, as on a machine that plans, has JAX not look for one.

    It would find the CPU as well, but only after libtpu's warnings. To be called before anything
    uses JAX's devices; it leaves alone what the user has chosen, and any other accelerator.
    """
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None:
        return
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    on_google_hardware = any(path.read_text().strip() == "0x1ae0" for path in vendors)
    others = importlib.metadata.entry_points(group="jax_plugins")
    if not (on_google_hardware or others or importlib.util.find_spec("jax_plugins")):
        jax.config.update("jax_platforms", "cpu")


def use_cores(batch_size: int) -> None:
    """Where a single process trains on a CPU, makes a device of each core, up to four.

    XLA's CPU backend runs most convolutions of a device on one thread. To be called before anything
    uses JAX's devices; it leaves alone what the user has set by JAX_NUM_CPU_DEVICES or XLA_FLAGS.

    Args:
      batch_size: samples that are embedded at once; the devices are as many as divide them.
    """
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ
    chosen |= "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.distributed.is_initialized():
        return
    divisors = [n for n in (4, 2, 1) if n <= usable_cores() and batch_size % n == 0]
    jax.config.update("jax_num_cpu_devices", divisors[0])


_REPEATABLE = "--xla_gpu_exclude_nondeterministic_ops"


def use_repeatable_gpu_operations() -> None:
    """Disables nondeterministic GPU operations, by XLA_FLAGS of this process.

    XLA reads them when JAX starts its devices. If that has happened, nothing changes, and a warning
    says so where the devices are GPUs. What the user has set by XLA_FLAGS is left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _REPEATABLE in flags or "--xla_gpu_deterministic_ops" in flags:
        return
    if not xla_bridge.backends_are_initialized():
        os.environ["XLA_FLAGS"] = f"{flags} {_REPEATABLE}=true".strip()
    elif jax.default_backend() == "gpu":
        logging.warning(
            "config.deterministic has no effect, since this process has used its GPU before: a run "
            "repeated gives other bits. Set XLA_FLAGS=%s=true before JAX is used",
            _REPEATABLE,
        )


def make_data_mesh(
    num_devices: int | None = None,
    *,
    fsdp: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of the axes `data` and `fsdp`; a batch is split over both.

    Args:
      num_devices: how many devices to take; by default all.
      fsdp: size of the axis over which the parameters themselves are split; by default all.
      devices: what to take them from; by default the run's own.

    Returns:
      The mesh, [devices / fsdp, fsdp].

    Raises:
      UserError: `fsdp` does not divide the number of devices.
    """
    devices = (jax.devices() if devices is None else devices)[:num_devices]
    fsdp = len(devices) if fsdp is None else fsdp
    if len(devices) % fsdp:
        raise UserError(
            f"config.sharding.fsdp = {fsdp} does not divide the {len(devices)} devices; take a "
            "divisor of them"
        )
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def shares_cores(mesh: Mesh) -> bool:
    """Whether each step must end before the next begins, as on several CPU devices.

    These share the real cores, and unfinished steps of several of them can starve each other.
    """
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over all devices of the mesh."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_divisible(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Checks that every device gets the same share of a batch, and of each of its microbatches.

    Raises:
      UserError: it does not; the message gives the nearest batches that would.
    """
    n = mesh.size * accumulation_steps
    if batch_size % n:
        below, above = batch_size // n * n, (batch_size // n + 1) * n
        options = f"{below} or {above}" if below else str(above)
        parts = f" in accumulation_steps = {accumulation_steps}" if accumulation_steps > 1 else ""
        raise UserError(
            f"config.batch_size = {batch_size} cannot be divided over {mesh.size} devices{parts}; "
            f"take {options}"
        )


def local_positions(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The positions of a global batch that this process's devices hold, ascending."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[index] for index in indices.values()]
    return np.unique(np.concatenate(rows))


def to_devices(local: np.ndarray, batch_size: int, mesh: Mesh) -> jax.Array:
    """Puts this process's rows of a global batch onto its devices; does not wait for it."""
    return jax.make_array_from_process_local_data(
        batch_sharding(mesh), local, (batch_size, *local.shape[1:])
    )


@dataclasses.dataclass(frozen=True)
class Placing:
    """Puts batches onto a mesh: sharded, or replicated if the devices do not divide them.

    Attributes:
      batch_size: Size of the global batch.
      mesh: The devices.
    """

    batch_size: int
    mesh: Mesh

    @property
    def positions(self) -> np.ndarray:
        """The positions of the global batch that this process provides."""
        if self.batch_size % self.mesh.size:
            return np.arange(self.batch_size)
        return local_positions(self.batch_size, self.mesh)

    @property
    def sharding(self) -> NamedSharding:
        """The sharding of a batch."""
        if self.batch_size % self.mesh.size:
            return NamedSharding(self.mesh, PartitionSpec())
        return batch_sharding(self.mesh)

    def __call__(self, local: np.ndarray) -> jax.Array:
        """Puts this process's rows of a batch onto its devices."""
        shape = (self.batch_size, *local.shape[1:])
        return jax.make_array_from_process_local_data(self.sharding, local, shape)


def is_main_process() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def from_main_process(make: Callable[[], Any]) -> Any:
    """Gives all processes what the main one makes, so that they decide alike.

    What each reads from shared storage may differ. All processes call this together.

    Args:
      make: Function that returns a JSON value; called on the main process alone.
    """
    if jax.process_count() == 1:
        return make()
    text = json.dumps(make() if is_main_process() else None).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    content = np.zeros(size, np.uint8)
    if is_main_process():
        content[:] = np.frombuffer(text, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes())
