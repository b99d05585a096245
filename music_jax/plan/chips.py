"""Published peaks of the chips that a step can be compiled for, and the names of topologies."""

import dataclasses
import difflib
import re

from music_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip; all figures are of a whole chip and as published.

    Attributes:
      flops_per_second: peak of matrix products in bfloat16.
      hbm_bytes_per_second: peak of its main memory.
      network_bytes_per_second: peak that can enter over its links to other chips, one direction.
      axes: dimensions of its topologies.
      example: a topology.
      source: where the figures are published.
      configuration: what libtpu calls the way in which a chip is seen, where there is a choice.
    """

    flops_per_second: float
    hbm_bytes_per_second: float
    network_bytes_per_second: float
    axes: int
    example: str
    source: str
    configuration: str = "default"


_DOCS = "https://cloud.google.com/tpu/docs/"
# Links of v3 and v4 (4 of 70 GB/s, 6 of 50 GB/s): table 4 of Jouppi et al, arXiv 2304.01433.
_PAPER = "; links: arXiv 2304.01433"
# The documentation gives the links' bandwidth in both directions together; here it is halved.
CHIPS = {
    "v3": Chip(123e12, 900e9, 4 * 70e9, 2, "v3:2x2", _DOCS + "v3" + _PAPER),
    # Its two cores are one device to JAX on Cloud TPU, which is not libtpu's default.
    "v4": Chip(275e12, 1200e9, 6 * 50e9, 3, "v4:4x4x4", _DOCS + "v4" + _PAPER, "megacore"),
    "v5e": Chip(197e12, 819e9, 400e9 / 2, 2, "v5e:4x8", _DOCS + "v5e"),
    "v5p": Chip(459e12, 2765e9, 1200e9 / 2, 3, "v5p:4x4x4", _DOCS + "tpu7x"),
    "v6e": Chip(918e12, 1638e9, 800e9 / 2, 2, "v6e:8x8", _DOCS + "tpu7x"),
    "tpu7x": Chip(2307e12, 7380e9, 1200e9 / 2, 3, "tpu7x:2x2x1", _DOCS + "tpu7x"),
}


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
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2})*", grid) or grid.count("x") + 1 != chip.axes:
        raise UserError(
            f"--topology={topology}: expected {chip.axes} sizes joined by x after {name!r}, such "
            f"as {chip.example}; got {grid!r}"
        )
    return chip
