"""Describes the chips that a step can be compiled for: published peaks, topologies, GPUs.

JAX's CUDA plugin compiles for a described GPU on a machine without one and without CUDA. It cannot
tune kernels of cuDNN and Triton there, and does not know the workspace of cuDNN's convolutions.
"""

import collections
import contextlib
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from collections.abc import Sequence

from music_jax.errors import UserError

# CUDA versions that JAX has a plugin for, the newest first.
_CUDA = (13, 12)
# Share of a GPU's memory that JAX takes by default.
_JAX_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU, described by CUDA's device properties, for XLA's `GpuTargetConfigProto`."""

    name: str
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2_bytes: int
    clock_ghz: float
    memory_bytes: int

    @property
    def usable_bytes(self) -> float:
        """Memory that JAX takes, by default or by XLA_PYTHON_CLIENT_MEM_FRACTION.

        Raises:
          UserError: That variable is not a number.
        """
        share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or _JAX_SHARE
        try:
            return self.memory_bytes * float(share)
        except ValueError as error:
            raise UserError(
                f"XLA_PYTHON_CLIENT_MEM_FRACTION={share}: expected a share such as 0.9"
            ) from error

    def target(self, bytes_per_second: float) -> str:
        """Returns XLA's `GpuTargetConfigProto` as text."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_memory_per_core}
              shared_memory_per_block_optin: {self.shared_memory_per_block}
              threads_per_core_limit: 2048
              core_count: {self.cores}
              fpus_per_core: {self.fpus_per_core}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              memory_bandwidth: {bytes_per_second:.0f}
              l2_cache_size: {self.l2_bytes}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 8 }}
            runtime_version {{ major: 12 minor: 8 }}
            device_description_str: "{self.name}"
        """


A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 166912, 40 * 2**20, 1.41, 85100068864)
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 232448, 50 * 2**20, 1.98, 84942979072)
H200 = dataclasses.replace(H100, name="NVIDIA H200", memory_bytes=151397597184)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip with its published peaks, each that of a complete chip."""

    flops_per_second: float  # of matrix products in bfloat16
    hbm_bytes_per_second: float  # of its main memory
    network_bytes_per_second: float  # of all links to other chips, in one direction
    axes: int  # number of dimensions of its topologies
    example: str  # of a topology
    source: str  # publication of the peaks
    dcn_bytes_per_second: float | None = None  # from other slices; None if not published
    wraps: int = 0  # number that divides the size of every axis that is closed to a ring
    configuration: str = "default"  # libtpu's name for it, if the chip has several
    gpu: Gpu | None = None  # for the compiler of GPUs; None for TPUs


# The peaks in bf16 and the bandwidths of HBM, links and data center network (DCN) are from the
# documentation pages "TPU v3", "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)",
# checked on 2026-11-29 in stored copies without a date.
# - The pages give the bandwidth of links as the sum of both directions, which is halved here, and
#   none for v3 and v4: those (4 links of 70 GB/s, 6 of 50 GB/s) are from table 4 of Jouppi et al,
#   arXiv 2304.01433.
# - HBM of v5e: 819 GB/s in most copies; one has 800 GiB/s, which would be 859 GB/s.
# - HBM of v6e: 1,638 GB/s in the newest copy; 1,600 and 1,640 in others.
# - DCN: 50, 100 and 100 Gb/s per chip on the page of tpu7x for v5p, v6e and tpu7x; of v5e 6.4 Tb/s
#   per pod of 256 chips, and 2 x 100 Gb/s per host of 8 chips; none on the pages of v3 and v4.
_DOCS = "https://cloud.google.com/tpu/docs/"
_PAPER = "; links: arXiv 2304.01433"
# Peaks of the SXM form, in bf16 without sparsity; the bandwidth of NVLink is halved likewise. The
# pages could not be read on 2026-11-30; several summaries of NVIDIA's data sheets agree on these.
_NVIDIA = "not checked: https://www.nvidia.com/en-us/data-center/"
CHIPS = {
    "v3": Chip(123e12, 900e9, 4 * 70e9, 2, "v3:2x2", _DOCS + "v3" + _PAPER, None, 32),
    # JAX on Cloud TPU uses its two cores as one device, which is not libtpu's default.
    "v4": Chip(275e12, 1200e9, 6 * 50e9, 3, "v4:4x4x4", _DOCS + "v4" + _PAPER, None, 4, "megacore"),
    "v5e": Chip(197e12, 819e9, 400e9 / 2, 2, "v5e:4x8", _DOCS + "v5e", 25e9 / 8, 16),
    "v5p": Chip(459e12, 2765e9, 1200e9 / 2, 3, "v5p:4x4x4", _DOCS + "v5p", 50e9 / 8, 4),
    "v6e": Chip(918e12, 1638e9, 800e9 / 2, 2, "v6e:8x8", _DOCS + "v6e", 100e9 / 8, 16),
    "tpu7x": Chip(2307e12, 7380e9, 1200e9 / 2, 3, "tpu7x:2x2x1", _DOCS + "tpu7x", 100e9 / 8, 4),
    "a100": Chip(312e12, 2039e9, 600e9 / 2, 1, "a100:8", _NVIDIA + "a100", gpu=A100),
    "h100": Chip(989e12, 3350e9, 900e9 / 2, 1, "h100:8", _NVIDIA + "h100", gpu=H100),
    "h200": Chip(989e12, 4800e9, 900e9 / 2, 1, "h200:8", _NVIDIA + "h200", gpu=H200),
}
# TPUs have two links per axis. Slices of v4, v5p and tpu7x that consist of complete cubes of
# 4 x 4 x 4 chips are closed to rings along all axes, others along none; an axis of v3, v5e and v6e
# is closed if it spans the pod, of 32 or 16 chips.
ATTACHED = "attached"  # the GPUs of this machine


def attached_topology() -> str:
    """Returns the topology of this machine's GPUs, such as `h100:8`.

    Raises:
      UserError: There are no GPUs, several kinds, or a kind whose peaks are not known here.
    """
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # there is no driver
        names = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout
    gpus = collections.Counter(name.strip() for name in names.splitlines())
    known = {chip.gpu.name: name for name, chip in CHIPS.items() if chip.gpu is not None}
    found = "are not found by nvidia-smi"
    if len(gpus) == 1:
        ((kind, count),) = gpus.items()
        if kind in known:
            return f"{known[kind]}:{count}"
        found = f"are {kind}, whose peaks are not known here"
    elif gpus:
        found = f"are of {len(gpus)} kinds: {', '.join(sorted(gpus))}"
    raise UserError(
        f"--topology={ATTACHED}: this machine's GPUs {found}; name chips such as h100:8; known are "
        f"{', '.join(known)}"
    )


def chip_of(topology: str) -> Chip:
    """Returns the chip of a topology such as `v5e:4x8`.

    Raises:
      UserError: The chip is unknown, or the topology has another form.
    """
    name, _, grid = topology.partition(":")
    if name not in CHIPS:
        nearest = difflib.get_close_matches(name, CHIPS, n=1, cutoff=0.0)[0]
        known = ", ".join(chip.example for chip in CHIPS.values())
        raise UserError(
            f"--topology={topology}: unknown chip {name!r}; did you mean {nearest!r}? Examples of "
            f"topologies: {known}"
        )
    chip = CHIPS[name]
    if chip.gpu is None:
        sizes = "x".join([r"[1-9]\d{0,2}"] * chip.axes)
        expected = f"{chip.axes} sizes joined by x after {name!r}"
    else:
        sizes = "[1-8]"
        expected = (
            f"1 to 8 GPUs after {name!r}, on one machine (networks between machines have no "
            "published peak)"
        )
    if not re.fullmatch(sizes, grid):
        raise UserError(
            f"--topology={topology}: expected {expected}, such as {chip.example}; got {grid!r}"
        )
    return chip


def check_has_slices(topology: str) -> None:
    """Checks that several slices of a topology can be planned.

    Raises:
      UserError: The bandwidth between slices of this chip is not published.
    """
    if chip_of(topology).dcn_bytes_per_second is None:
        known = ", ".join(name for name, chip in CHIPS.items() if chip.dcn_bytes_per_second)
        raise UserError(
            f"--topology={topology} cannot be planned with --slices above 1: the bandwidth between "
            f"its slices is not published; it is for {known}"
        )


def network_peak(topology: str) -> float:
    """Returns the bytes per second that can enter the chip with the fewest links of a topology.

    The chips at the ends of an axis have one neighbor unless it is closed to a ring; an axis of one
    chip has no links.
    """
    chip = chip_of(topology)
    if chip.gpu is not None:
        return chip.network_bytes_per_second
    sizes = [int(size) for size in topology.partition(":")[2].split("x")]
    closed = [size % chip.wraps == 0 for size in sizes]
    if chip.axes == 3:
        closed = [all(closed)] * 3
    links = sum(2 if ring else min(size - 1, 1) for size, ring in zip(sizes, closed, strict=True))
    return chip.network_bytes_per_second * links / (2 * chip.axes)


def check_compilers(topologies: Sequence[str]) -> None:
    """Checks that the compilers for some topologies are installed.

    Raises:
      UserError: The topology is malformed, or libtpu or JAX's CUDA plugin is not installed.
    """
    gpus = [chip_of(topology).gpu is not None for topology in topologies]
    if not all(gpus) and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for TPUs needs libtpu, their compiler; on Linux and x86-64: "
            "pip install libtpu"
        )
    with contextlib.suppress(ModuleNotFoundError):  # no plugin at all
        if not any(gpus) or any(
            importlib.util.find_spec(f"jax_plugins.xla_cuda{cuda}") for cuda in _CUDA
        ):
            return
    version = importlib.metadata.version("jax")
    packages = f"jax-cuda{_CUDA[0]}-plugin=={version} jax-cuda{_CUDA[0]}-pjrt=={version}"
    raise UserError(
        "planning for GPUs needs JAX's CUDA plugin, which compiles without a GPU and without CUDA; "
        f"on Linux: pip install {packages}"
    )
