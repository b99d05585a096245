"""Published peaks of the chips that a step can be compiled for, and the names of topologies."""

import dataclasses
import difflib
import re

from music_jax.errors import UserError
from music_jax.plan.gpus import A100, H100, H200, Gpu, attached_names


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip; all figures are of a whole chip and as published.

    Attributes:
      flops_per_second: peak of matrix products in bfloat16.
      hbm_bytes_per_second: peak of its main memory.
      network_bytes_per_second: peak that can enter over all its links to other chips, one
        direction; for a slice see `network_peak`.
      axes: dimensions of its topologies.
      example: a topology.
      source: where the figures are published.
      wraps: an axis whose size is a multiple of it is closed to a ring; 0 where there are no axes.
      configuration: what libtpu calls the way in which a chip is seen, where there is a choice.
      gpu: what else a compiler for GPUs is to know; None for TPUs.
    """

    flops_per_second: float
    hbm_bytes_per_second: float
    network_bytes_per_second: float
    axes: int
    example: str
    source: str
    wraps: int = 0
    configuration: str = "default"
    gpu: Gpu | None = None


# The bf16 peak, the HBM's bandwidth and the links' are those of the documentation's pages "TPU v3",
# "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)"; it gives the links' in both
# directions together, which is halved here. For v3 and v4 it gives no links': those (4 of 70 GB/s,
# 6 of 50 GB/s) are of table 4 of Jouppi et al, arXiv 2304.01433.
_DOCS = "https://cloud.google.com/tpu/docs/"
_PAPER = "; links: arXiv 2304.01433"
# Of the SXM form, bf16 without sparsity; NVLink's is halved likewise.
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
CHIPS = {
    "v3": Chip(123e12, 900e9, 4 * 70e9, 2, "v3:2x2", _DOCS + "v3" + _PAPER, 32),
    # Its two cores are one device to JAX on Cloud TPU, which is not libtpu's default.
    "v4": Chip(275e12, 1200e9, 6 * 50e9, 3, "v4:4x4x4", _DOCS + "v4" + _PAPER, 4, "megacore"),
    "v5e": Chip(197e12, 819e9, 400e9 / 2, 2, "v5e:4x8", _DOCS + "v5e", 16),
    "v5p": Chip(459e12, 2765e9, 1200e9 / 2, 3, "v5p:4x4x4", _DOCS + "v5p", 4),
    "v6e": Chip(918e12, 1638e9, 800e9 / 2, 2, "v6e:8x8", _DOCS + "v6e", 16),
    "tpu7x": Chip(2307e12, 7380e9, 1200e9 / 2, 3, "tpu7x:2x2x1", _DOCS + "tpu7x", 4),
    "a100": Chip(312e12, 2039e9, 600e9 / 2, 1, "a100:8", _NVIDIA + "a100", gpu=A100),
    "h100": Chip(989e12, 3350e9, 900e9 / 2, 1, "h100:8", _NVIDIA + "h100", gpu=H100),
    "h200": Chip(989e12, 4800e9, 900e9 / 2, 1, "h200:8", _NVIDIA + "h200", gpu=H200),
}
# TPUs have two links an axis. Slices of v4, v5p and tpu7x that are made of whole cubes of 4 x 4 x 4
# chips are closed to rings along all axes, others along none; an axis of v3, v5e and v6e is closed
# if it spans the pod, of 32 or 16 chips.
_GPUS_OF_A_MACHINE = 8
# Stands for the GPUs of this machine.
ATTACHED = "attached"


def attached_topology() -> str:
    """The topology of this machine's GPUs, such as `h100:8`.

    Raises:
      UserError: there are none, of several kinds, or of one whose peaks are not known here.
    """
    names = attached_names()
    kinds = sorted(set(names))
    known = {chip.gpu.name: name for name, chip in CHIPS.items() if chip.gpu is not None}
    if len(kinds) == 1 and kinds[0] in known:
        return f"{known[kinds[0]]}:{len(names)}"
    found = "are not found by nvidia-smi"
    if len(kinds) == 1:
        found = f"are {kinds[0]}, whose peaks are not known here"
    elif kinds:
        found = f"are of {len(kinds)} kinds: {', '.join(kinds)}"
    raise UserError(
        f"--topology={ATTACHED}: this machine's GPUs {found}; name chips such as h100:8; known are "
        f"{', '.join(known)}"
    )


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as `v5e:4x8`.

    Raises:
      UserError: there is no such chip, or the topology is not written so.
    """
    name, _, grid = topology.partition(":")
    if name not in CHIPS:
        nearest = difflib.get_close_matches(name, CHIPS, n=1, cutoff=0.0)[0]
        known = ", ".join(chip.example for chip in CHIPS.values())
        raise UserError(
            f"--topology={topology}: the chip {name!r} is not known; did you mean {nearest!r}? "
            f"Topologies are written like {known}"
        )
    chip = CHIPS[name]
    if chip.gpu is not None:
        if not re.fullmatch(r"[1-9]\d*", grid) or int(grid) > _GPUS_OF_A_MACHINE:
            raise UserError(
                f"--topology={topology}: expected 1 to {_GPUS_OF_A_MACHINE} GPUs after {name!r}, "
                f"those of one machine (what joins machines has no published peak), such as "
                f"{chip.example}; got {grid!r}"
            )
        return chip
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2})*", grid) or grid.count("x") + 1 != chip.axes:
        raise UserError(
            f"--topology={topology}: expected {chip.axes} sizes joined by x after {name!r}, such "
            f"as {chip.example}; got {grid!r}"
        )
    return chip


def network_peak(topology: str) -> float:
    """Bytes a second that can enter the chip of a topology that has the fewest links.

    An axis that is not closed to a ring has chips at its ends with one neighbor, and an axis of one
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
