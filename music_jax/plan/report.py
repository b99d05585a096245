"""Estimates that follow from a step's costs, as a table and as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from music_jax.distributed import progress
from music_jax.plan.chips import chip_of, network_peak
from music_jax.plan.compiling import StepCost

# Values that XLA gives for no chip.
_COUNTED = {
    "hbm_only_bytes": "XLA's bytes accessed, counted in its program without on-chip memory",
    "received_bytes": "counted in XLA's program: the least that must enter a chip",
    "collective_bytes": "counted in XLA's program: the collectives' results",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The costs of a step on a topology, and estimates from the chip's published peaks.

    Attributes:
      topology: Name of the topology.
      cost: Costs of a step.
      num_images: Number of images of the training split.
      num_epochs: Number of epochs of the run.
      decode_rate: Images that a core of the host decodes and crops in a second.
      largest_batch_size: Largest batch that fits, if it was searched.
    """

    topology: str
    cost: StepCost
    num_images: int
    num_epochs: int
    decode_rate: float
    largest_batch_size: int | None = None

    @property
    def estimates(self) -> dict[str, str]:
        """Origin of each value that XLA does not give for the chip."""
        return _COUNTED | self.cost.estimates

    @property
    def peak_seconds(self) -> dict[str, float]:
        """Seconds that each resource alone needs for a step at its published peak, if known."""
        needs = {
            "compute": self.cost.flops,
            "hbm": self.cost.hbm_traffic_bytes,
            "network": self.cost.received_bytes,
        }
        peaks = self.peaks  # a single chip has no network, and needs none
        return {
            n: need / peaks[n] if need else 0.0 for n, need in needs.items() if need is not None
        }

    @property
    def bound(self) -> str:
        """The bottleneck: the resource that needs the longest."""
        seconds = self.peak_seconds
        return max(seconds, key=lambda name: seconds[name])

    @property
    def peaks(self) -> dict[str, float]:
        """Published peaks of the chip: FLOPs per second, and bytes per second of the others."""
        chip = chip_of(self.topology)
        return {
            "compute": chip.flops_per_second,
            "hbm": chip.hbm_bytes_per_second,
            "network": network_peak(self.topology),
        }

    @property
    def seconds_per_step(self) -> float:
        """Estimated time of a step, if all bytes accessed go through the HBM."""
        return max(self.peak_seconds.values())

    @property
    def least_seconds_per_step(self) -> float | None:
        """Lower bound of the time of a step, without the arrays in on-chip memory."""
        if self.cost.hbm_only_bytes is None:
            return None
        hbm = self.cost.hbm_only_bytes / self.peaks["hbm"]
        return max((self.peak_seconds | {"hbm": hbm}).values())

    @property
    def seconds_per_epoch(self) -> float:
        """Estimated time of an epoch."""
        return self.num_images // self.cost.batch_size * self.seconds_per_step

    @property
    def images_per_second(self) -> float:
        """Images per second and chip; an image counts once, whatever its number of views."""
        return self.cost.batch_size / self.cost.chips / self.seconds_per_step

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values; those that are unknown if it does not fit are null."""
        derived = {
            "hbm_free_bytes": lambda: _free(self),
            "bound": lambda: self.bound,
            "seconds_per_step": lambda: self.seconds_per_step,
            "least_seconds_per_step": lambda: self.least_seconds_per_step,
            "seconds_at_peak": lambda: self.peak_seconds,
            "seconds_per_epoch": lambda: self.seconds_per_epoch,
            "seconds_per_run": lambda: self.num_epochs * self.seconds_per_epoch,
            "images_per_second": lambda: self.images_per_second,
            "decode_cores": lambda: self.images_per_second / self.decode_rate,
        }
        fits = self.cost.fits
        return {
            "topology": self.topology,
            **dataclasses.asdict(self.cost),
            "estimates": self.estimates,
            "peaks_per_second": self.peaks,
            "decode_rate": self.decode_rate,
            **{name: figure() if fits else None for name, figure in derived.items()},
            "largest_batch_size": self.largest_batch_size,
        }


def table(plans: Sequence[Plan]) -> str:
    """Formats all plans as a table with a column per topology; ~ marks estimates."""
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, cells: list[str]) -> None:
        if any(cells):
            rows.append((name, cells))

    def if_fits(name: str, text: Any, field: str = "") -> None:
        marks = ["~" if field in plan.estimates else "" for plan in plans]
        cells = [text(plan) if plan.cost.fits else "" for plan in plans]
        row(name, [cell and mark + cell for cell, mark in zip(cells, marks, strict=True)])

    def heading(name: str) -> None:
        rows.extend([("", [""] * len(plans)), (name, [""] * len(plans))])

    row("chips", [str(plan.cost.chips) for plan in plans])
    row("batch, of all chips", [f"{plan.cost.batch_size:,}" for plan in plans])
    row(
        "largest batch that fits",
        [f"{p.largest_batch_size:,}" if p.largest_batch_size is not None else "" for p in plans],
    )
    row("it fits", ["yes" if plan.cost.fits else "NO" for plan in plans])
    row("compiled in", [_duration(plan.cost.compile_seconds or 0.0) for plan in plans])
    if_fits("bottleneck", lambda p: p.bound)
    if_fits("a step, estimate", lambda p: _duration(p.seconds_per_step))
    if_fits("a step, lower bound", lambda p: _duration(p.least_seconds_per_step))
    if_fits("an epoch, estimate", lambda p: _duration(p.seconds_per_epoch))
    if_fits("the run, estimate", lambda p: _duration(p.num_epochs * p.seconds_per_epoch))
    if_fits("images/s, estimate", lambda p: f"{p.images_per_second:,.0f}")
    if_fits("host cores to decode them", lambda p: f"{p.images_per_second / p.decode_rate:.1f}")
    if_fits("  images/s of such a core", lambda p: f"{p.decode_rate:,.0f}")
    heading("MEMORY")
    row("needed at the peak", [_mark(p, "hbm_needed_bytes", _gb) for p in plans])
    row("available", [_mark(p, "hbm_available_bytes", _gb) for p in plans])
    if_fits("free", lambda p: _gb(_free(p)), "hbm_available_bytes")
    if_fits("arguments", lambda p: _gb(p.cost.argument_bytes))
    if_fits("temporaries", lambda p: _gb(p.cost.temporary_bytes), "temporary_bytes")
    heading("WORK")
    if_fits("FLOPs", lambda p: f"{p.cost.flops / 1e12:,.3f} T", "flops")
    if_fits("  of the objective", _objective_share, "objective_flops")
    if_fits("bytes accessed", lambda p: _gb(p.cost.hbm_traffic_bytes), "hbm_traffic_bytes")
    if_fits("  not in on-chip memory", lambda p: _gb(p.cost.hbm_only_bytes), "hbm_only_bytes")
    if_fits("received from other chips", lambda p: _gb(p.cost.received_bytes), "received_bytes")
    for kind in sorted({kind for plan in plans for kind in plan.cost.collective_bytes}):
        if_fits(
            f"  by {kind}",
            lambda p, k=kind: _gb(_of_kind(p, k)),
            "collective_bytes",
        )
    heading("TIME AT THE PUBLISHED PEAKS")
    for name in ("compute", "hbm", "network"):
        if_fits(name, lambda p, n=name: _duration(p.peak_seconds.get(n)))
    heading("THE CHIP, PER SECOND")
    row("peak compute", [f"{plan.peaks['compute'] / 1e12:,.0f} TFLOP" for plan in plans])
    for name in ("hbm", "network"):
        row(f"peak {name}", [f"{plan.peaks[name] / 1e9:,.0f} GB" for plan in plans])
    header = ["per chip and step", *(plan.topology for plan in plans)]
    return progress.table(header, [[name, *cells] for name, cells in rows])


def _free(plan: Plan) -> float:
    return plan.cost.hbm_available_bytes - (plan.cost.hbm_needed_bytes or 0.0)


def _of_kind(plan: Plan, kind: str) -> float | None:
    if plan.cost.received_bytes is None:
        return None
    return plan.cost.collective_bytes.get(kind, 0.0)


def _objective_share(plan: Plan) -> str:
    if plan.cost.objective_flops is None:
        return ""
    return f"{plan.cost.objective_flops / (plan.cost.flops or 1.0):.2%}"


def _mark(plan: Plan, field: str, text: Any) -> str:
    cell = text(getattr(plan.cost, field))
    return "~" + cell if cell and field in plan.estimates else cell


def notes(plans: Sequence[Plan]) -> str:
    """Explains what does not fit, and where the values come from."""
    lines = []
    for plan in plans:
        if not plan.cost.fits:
            lines.append(
                f"{plan.topology}: batch {plan.cost.batch_size} does not fit: needs "
                f"{_gb(plan.cost.hbm_needed_bytes)} of {_gb(plan.cost.hbm_available_bytes)}; "
                "take more chips, a smaller batch_size (--find-batch-size finds the largest), "
                "backbone.remat=true or accumulation_steps=2"
            )
    estimates = {name: how for plan in plans for name, how in plan.estimates.items()}
    lines.append("~ marks values that are not XLA's own for the chip:")
    lines += [f"  {name}: {how}" for name, how in estimates.items()]
    sources = dict.fromkeys(chip.source for chip in (chip_of(plan.topology) for plan in plans))
    lines += [
        "All other values of memory and work are XLA's for the step compiled for these chips.",
        "Times are not measured: they are what the bottleneck of compute, HBM and network needs at",
        "the chip's published peak. The estimate assumes that all bytes accessed go through the",
        "HBM; the lower bound excludes arrays that XLA keeps in on-chip memory. The network's",
        "peak is that of the chip with the fewest links. Published peaks:",
        *(f"  {source}" for source in sources),
    ]
    return "\n".join(lines)


def _gb(size: float | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.3f} MB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
