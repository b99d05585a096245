"""GPUs that are not at hand: what XLA's compiler for them is told of them.

JAX's CUDA plugin compiles for a GPU that it is given a description of, on a machine without one and
without CUDA. What it cannot do there is to try out kernels: cuDNN's and Triton's are not tuned, and
the workspace that a convolution of cuDNN takes is not known.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import subprocess

from music_jax.errors import UserError

# Versions of the CUDA runtime that JAX has a plugin for, the newest first.
_CUDA = (13, 12)
# The share of a GPU's memory that JAX takes, unless told otherwise.
_JAX_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of GPU, as CUDA's device properties give it.

    Attributes:
      name: as CUDA gives it.
      capability: the compute capability, major and minor.
      cores: streaming multiprocessors.
      fpus_per_core: float32 units of each.
      shared_memory_per_core: bytes of each.
      shared_memory_per_block: bytes that a block may ask for.
      l2_bytes: of the cache.
      clock_ghz: its boost clock.
      memory_bytes: of its main memory.
    """

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
        """What JAX takes of the memory, by default or by XLA_PYTHON_CLIENT_MEM_FRACTION."""
        share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or _JAX_SHARE
        return self.memory_bytes * float(share)

    def target(self, bytes_per_second: float) -> str:
        """XLA's `GpuTargetConfigProto`, as text."""
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


def attached_names() -> list[str]:
    """Names of this machine's GPUs, as its driver tells them; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.stdout.splitlines() if line.strip()]


def check_plugin() -> None:
    """Checks that the compiler is there.

    Raises:
      UserError: it is not; the message says how to get it.
    """
    for cuda in _CUDA:
        try:
            if importlib.util.find_spec(f"jax_plugins.xla_cuda{cuda}") is not None:
                return
        except ModuleNotFoundError:
            pass
    version = importlib.metadata.version("jax")
    packages = f"jax-cuda{_CUDA[0]}-plugin=={version} jax-cuda{_CUDA[0]}-pjrt=={version}"
    raise UserError(
        "planning for GPUs needs JAX's CUDA plugin, which compiles without a GPU and without CUDA; "
        f"on Linux: pip install {packages}"
    )
