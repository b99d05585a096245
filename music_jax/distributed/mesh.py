"""Devices: choosing them, the mesh, and assigning rows of a batch to them."""

import collections
import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge  # Whether devices are started has no public name.
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from music_jax.distributed import usable_cores
from music_jax.distributed.progress import is_main_process as is_main_process
from music_jax.errors import UserError

_logger = logging.getLogger(__name__)

BATCH_AXES = ("data", "fsdp")


def check_gpu_plugins() -> None:
    """Checks that JAX has a plugin for the GPUs in JAX_PLATFORMS, which it may otherwise ignore.

    Raises:
      UserError: A plugin is missing.
    """
    chosen = os.environ.get("JAX_PLATFORMS", "")
    for platform in {"cuda", "rocm"} & set(chosen.split(",")):
        if not any(platform in plugin for plugin in _plugins()):
            raise UserError(
                f"JAX_PLATFORMS={chosen} cannot be used here: JAX's plugin for {platform} is not "
                "installed; unset it, or install what it names"
            )


def _plugins() -> list[str]:
    found = [point.value for point in importlib.metadata.entry_points(group="jax_plugins")]
    if (spec := importlib.util.find_spec("jax_plugins")) is not None:
        found += [module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)]
    return found


def skip_absent_tpu() -> None:
    """Keeps JAX from looking for a TPU if libtpu is installed but there is none, as for `plan`.

    JAX would use the CPU as well, but only after warnings of libtpu. Call it before anything uses
    JAX's devices; the user's JAX_PLATFORMS and other accelerators are respected.
    """
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None:
        return
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    on_google_hardware = any(path.read_text().strip() == "0x1ae0" for path in vendors)
    if not (on_google_hardware or _plugins()):
        jax.config.update("jax_platforms", "cpu")


def use_cores(batch_size: int) -> None:
    """Exposes up to four CPU cores as JAX devices, in a run of a single process.

    XLA's CPU backend runs most convolutions of a device on one thread. Call it before anything uses
    JAX's devices; the user's JAX_NUM_CPU_DEVICES or XLA_FLAGS are respected.

    Args:
      batch_size: Number of samples that are embedded at once, which the devices divide.
    """
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ
    chosen |= "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.distributed.is_initialized():
        return
    divisors = [n for n in (4, 2, 1) if n <= usable_cores() and batch_size % n == 0]
    jax.config.update("jax_num_cpu_devices", divisors[0])


_DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops"


def use_deterministic_gpu_operations() -> None:
    """Disables nondeterministic GPU operations, through XLA_FLAGS of this process.

    XLA reads them when JAX starts its devices. If it has started GPUs before, a warning is
    logged and nothing changes. The user's own XLA_FLAGS are respected.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _DETERMINISTIC in flags or "--xla_gpu_deterministic_ops" in flags:
        return
    if not xla_bridge.backends_are_initialized():
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}=true".strip()
    elif jax.default_backend() == "gpu":
        _logger.warning(
            "config.deterministic has no effect, since this process has already used its GPU: a "
            f"repeated run gives different bits. Set XLA_FLAGS={_DETERMINISTIC}=true before JAX is "
            "used"
        )


def make_data_mesh(
    num_devices: int | None = None,
    *,
    fsdp: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh with the axes `data` and `fsdp`, over both of which a batch is split.

    Devices of several slices, or of several machines with GPUs, are on separate networks, with a
    slower one in between. Only `data` spans slices.

    Args:
      num_devices: Number of devices; by default all.
      fsdp: Size of the axis over which the parameters are split; by default all devices of a slice.
      devices: Devices to choose from; by default those of the run.

    Returns:
      The mesh, [devices / fsdp, fsdp], with the devices of a slice side by side.

    Raises:
      UserError: The slices differ in size, or `fsdp` does not divide the devices of a slice.
    """
    devices = (jax.devices() if devices is None else devices)[:num_devices]
    sizes = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    slices, size = len(sizes), max(sizes.values())
    if slices * size != len(devices):
        raise UserError(
            f"the slices, or machines with GPUs, have {', '.join(map(str, sizes.values()))} "
            "devices; use the same number of each"
        )
    fsdp = size if fsdp is None else fsdp
    if size % fsdp:
        where = f"the {size} devices" + (f" of each of the {slices} slices" if slices > 1 else "")
        raise UserError(
            f"config.sharding.fsdp = {fsdp} does not divide {where}; use a divisor of their number"
        )
    shape, types = (size // fsdp, fsdp), (AxisType.Auto,) * 2
    if slices == 1:
        return jax.make_mesh(shape, BATCH_AXES, axis_types=types, devices=devices)
    grid = mesh_utils.create_hybrid_device_mesh(
        shape, (slices, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, BATCH_AXES, axis_types=types)


def shares_cores(mesh: Mesh) -> bool:
    """Returns whether each step must end before the next begins, as on several CPU devices.

    They share the cores, so that unfinished steps can starve each other.
    """
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over all devices of the mesh."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_divisible(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Checks that a batch and each of its microbatches can be divided evenly over all devices.

    Raises:
      UserError: It cannot; the message gives the nearest batch sizes that can.
    """
    n = mesh.size * accumulation_steps
    if batch_size % n:
        below, above = batch_size // n * n, (batch_size // n + 1) * n
        options = f"{below} or {above}" if below else str(above)
        parts = f" in accumulation_steps = {accumulation_steps}" if accumulation_steps > 1 else ""
        raise UserError(
            f"config.batch_size = {batch_size} cannot be divided over {mesh.size} devices{parts}; "
            f"use {options}"
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
        """The positions of the global batch that this process's devices hold, in order.

        These are all positions if the devices do not divide the batch.
        """
        indices = self._sharding.addressable_devices_indices_map((self.batch_size,))
        rows = [np.arange(self.batch_size)[index] for index in indices.values()]
        return np.unique(np.concatenate(rows))

    def __call__(self, local: np.ndarray) -> jax.Array:
        """Transfers this process's rows of a global batch to its devices, asynchronously.

        Args:
          local: Rows of the batch at the `positions`.
        """
        shape = (self.batch_size, *local.shape[1:])
        return jax.make_array_from_process_local_data(self._sharding, local, shape)

    @property
    def _sharding(self) -> NamedSharding:
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return replicated if self.batch_size % self.mesh.size else batch_sharding(self.mesh)


def from_main_process(make: Callable[[], Any]) -> Any:
    """Returns a value of the main process to all processes, so that they make the same decisions.

    What each process reads from shared storage may differ. All processes call this together.

    Args:
      make: Function that returns a JSON value; called on the main process only.
    """
    if jax.process_count() == 1:
        return make()
    text = json.dumps(make() if is_main_process() else None).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    content = np.zeros(size, np.uint8)
    if is_main_process():
        content[:] = np.frombuffer(text, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes())
