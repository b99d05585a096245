"""Estimates that follow from a step's costs, as JSON and as a table."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from music_jax.distributed import progress
from music_jax.plan.chips import chip_of, network_peak
from music_jax.plan.costs import StepCost

Plan = dict[str, Any]

# Values that XLA gives for no chip.
_COUNTED = {
    "hbm_only_bytes": "XLA's bytes accessed, counted in its program without on-chip memory",
    "received_bytes": "counted in XLA's program: the least that must enter a chip",
    "dcn_bytes": "likewise, from other slices",
    "dcn_transfers": "counted in XLA's program",
    "collective_bytes": "counted in XLA's program: the collectives' results",
}


def make_plan(
    topology: str,
    cost: StepCost,
    largest_batch_size: int | None = None,
    *,
    num_images: int,
    num_epochs: int,
    decode_rate: float,
    host_bytes: int,
) -> Plan:
    """Estimates times from the costs of a step and the chip's published peaks.

    Args:
      topology: Name of the topology.
      cost: Costs of a step.
      largest_batch_size: Largest batch that fits, if it was searched.
      num_images: Number of images of the training split.
      num_epochs: Number of epochs of the run.
      decode_rate: Images that a core of the host decodes and crops in a second.
      host_bytes: Host memory of the input, per process.

    Returns:
      JSON values, per chip: the fields of `cost`; the chip's `peaks_per_second`, FLOPs and bytes;
      and, if the step fits, `seconds_at_peak` that each resource alone needs, the slowest as the
      `bound`, and the estimates that follow if all bytes accessed go through the HBM. For
      `least_seconds_per_step` those in on-chip memory do not. An image of `images_per_second`
      counts once, whatever its number of views. Unknown values are None.
    """
    chip = chip_of(topology)
    peaks = {
        "compute": chip.flops_per_second,
        "hbm": chip.hbm_bytes_per_second,
        "network": network_peak(topology),
    }
    needs = {"compute": cost.flops, "hbm": cost.hbm_traffic_bytes, "network": cost.received_bytes}
    if cost.slices > 1 and chip.dcn_bytes_per_second is not None:
        peaks["dcn"], needs["dcn"] = chip.dcn_bytes_per_second, cost.dcn_bytes
    seconds = {  # empty if it does not fit; a single chip has no network, and needs none
        name: need / peaks[name] if need else 0.0
        for name, need in needs.items()
        if need is not None
    }
    least = None
    if cost.hbm_only_bytes is not None:
        least = max((seconds | {"hbm": cost.hbm_only_bytes / peaks["hbm"]}).values())
    counted = {name: how for name, how in _COUNTED.items() if getattr(cost, name) is not None}
    free = cost.hbm_available_bytes - (cost.hbm_needed_bytes or 0.0)
    step = max(seconds.values(), default=None)
    epoch = step and num_images // cost.batch_size * step
    rate = step and cost.batch_size / cost.chips / step
    return {
        "topology": topology,
        **dataclasses.asdict(cost),
        "estimates": counted | cost.estimates,
        "peaks_per_second": peaks,
        "decode_rate": decode_rate,
        "host_input_bytes": host_bytes,
        "hbm_free_bytes": free if cost.fits else None,
        "bound": max(seconds, key=lambda name: seconds[name], default=None),
        "seconds_per_step": step,
        "least_seconds_per_step": least,
        "seconds_at_peak": seconds or None,
        "seconds_per_epoch": epoch,
        "seconds_per_run": epoch and num_epochs * epoch,
        "images_per_second": rate,
        "decode_cores": rate and rate / decode_rate,
        "largest_batch_size": largest_batch_size,
    }


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.3f} MB"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def table(plans: Sequence[Plan]) -> str:
    """Formats plans as a table with a column per topology; ~ marks estimates."""
    kinds = sorted({kind for plan in plans for kind in plan["collective_bytes"]})
    rows: list[tuple[str, str, Callable[[Any], str]]] = [  # name, value in the JSON, and its text
        ("chips", "chips", str),
        ("batch, of all chips", "batch_size", "{:,}".format),
        ("largest batch that fits", "largest_batch_size", "{:,}".format),
        ("it fits", "fits", lambda fits: "yes" if fits else "NO"),
        ("compiled in", "compile_seconds", _duration),
        ("bottleneck", "bound", str),
        ("a step, estimate", "seconds_per_step", _duration),
        ("a step, lower bound", "least_seconds_per_step", _duration),
        ("an epoch, estimate", "seconds_per_epoch", _duration),
        ("the run, estimate", "seconds_per_run", _duration),
        ("images/s of a chip, estimate", "images_per_second", "{:,.0f}".format),
        ("host cores to decode, per chip", "decode_cores", "{:.1f}".format),
        ("  images/s of a core", "decode_rate", "{:,.0f}".format),
        ("host memory of a process, at most", "host_input_bytes", _gb),
        ("MEMORY", "", str),
        ("needed at the peak", "hbm_needed_bytes", _gb),
        ("available", "hbm_available_bytes", _gb),
        ("free", "hbm_free_bytes", _gb),
        ("arguments", "argument_bytes", _gb),
        ("temporaries", "temporary_bytes", _gb),
        ("WORK", "", str),
        ("FLOPs", "flops", lambda flops: f"{flops / 1e12:,.3f} T"),
        ("  of the objective", "objective_flops/flops", "{:.2%}".format),
        ("bytes accessed", "hbm_traffic_bytes", _gb),
        ("  not in on-chip memory", "hbm_only_bytes", _gb),
        ("received from other chips", "received_bytes", _gb),
        *((f"  by {kind}", f"collective_bytes/{kind}", _gb) for kind in kinds),
        ("received from other slices", "dcn_bytes", _gb),
        ("  of the bytes accessed", "dcn_bytes/hbm_traffic_bytes", "{:.2%}".format),
        ("  of all bytes received", "dcn_bytes/all", "{:.2%}".format),
        ("  transfers", "dcn_transfers", str),
        ("TIME AT THE PUBLISHED PEAKS", "", str),
        ("compute", "seconds_at_peak/compute", _duration),
        ("hbm", "seconds_at_peak/hbm", _duration),
        ("network", "seconds_at_peak/network", _duration),
        ("network between slices", "seconds_at_peak/dcn", _duration),
        ("THE CHIP, PER SECOND", "", str),
        ("peak compute", "peaks_per_second/compute", lambda peak: f"{peak / 1e12:,.0f} TFLOP"),
        ("peak hbm", "peaks_per_second/hbm", lambda peak: f"{peak / 1e9:,.0f} GB"),
        ("peak network", "peaks_per_second/network", lambda peak: f"{peak / 1e9:,.0f} GB"),
        ("peak between slices", "peaks_per_second/dcn", lambda peak: f"{peak / 1e9:,.3g} GB"),
    ]
    columns = [_column(plan, kinds) for plan in plans]
    blank = [""] * len(plans)
    lines: list[list[str]] = []
    for name, field, text in rows:
        values = [column.get(field) for column in columns]
        marks = ["~" if field.partition("/")[0] in plan["estimates"] else "" for plan in plans]
        if not field:  # a heading
            lines += [["", *blank], [name, *blank]]
        elif any(value is not None for value in values):
            texts = ["" if value is None else text(value) for value in values]
            lines.append([name, *(cell and m + cell for m, cell in zip(marks, texts, strict=True))])
    return progress.table(["per chip and step", *map(_name, plans)], lines)


def _name(plan: Plan) -> str:
    several = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    return several + plan["topology"]


def _column(plan: Plan, kinds: Sequence[str]) -> Plan:
    """Returns the values of a plan; those in an inner object also as FIELD/NAME."""
    column = dict(plan)
    for field in ("seconds_at_peak", "peaks_per_second"):
        column |= {f"{field}/{name}": value for name, value in (plan[field] or {}).items()}
    if plan["received_bytes"] is not None:
        sent = plan["collective_bytes"]
        column |= {f"collective_bytes/{kind}": sent.get(kind, 0.0) for kind in kinds}
    if plan["objective_flops"] is not None:
        column["objective_flops/flops"] = plan["objective_flops"] / (plan["flops"] or 1.0)
    if plan["dcn_bytes"] is not None:
        everything = plan["dcn_bytes"] + plan["received_bytes"]
        column["dcn_bytes/hbm_traffic_bytes"] = plan["dcn_bytes"] / plan["hbm_traffic_bytes"]
        column["dcn_bytes/all"] = plan["dcn_bytes"] / (everything or 1.0)
    if not plan["fits"]:
        column["decode_rate"] = column["host_input_bytes"] = None
    return column


def notes(plans: Sequence[Plan]) -> str:
    """Explains what does not fit, and where the values come from."""
    sources = dict.fromkeys(chip_of(plan["topology"]).source for plan in plans)
    estimates = {name: how for plan in plans for name, how in plan["estimates"].items()}
    lines = [
        f"{_name(plan)}: batch {plan['batch_size']} does not fit: needs "
        f"{_gb(plan['hbm_needed_bytes'])} of {_gb(plan['hbm_available_bytes'])}; take more chips, "
        "a smaller batch_size (--find_batch_size finds the largest), backbone.remat=true or "
        "accumulation_steps=2"
        for plan in plans
        if not plan["fits"]
    ]
    lines += [
        "~ marks values that are not XLA's own for the chip:",
        *(f"  {name}: {how}" for name, how in estimates.items()),
        "All other values of memory and work are XLA's for the step compiled for these chips.",
        "Times are not measured: they are what the bottleneck of compute, HBM and network needs at",
        "the chip's published peak. The estimate assumes that all bytes accessed go through the",
        "HBM; the lower bound excludes arrays that XLA keeps in on-chip memory. The network's",
        "peak is that of the chip with the fewest links. The host memory is that of the batches in",
        "a process with images of 500 x 375 pixels and config.num_decode_threads, or 224, threads.",
        "Published peaks:",
        *(f"  {source}" for source in sources),
    ]
    return "\n".join(lines)
