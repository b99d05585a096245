"""Counts the communication, memory traffic and FLOPs of a compiled program.

A plan uses XLA's own counts wherever there are any. XLA has none for collectives and for GPUs that
are not at hand, and counts the body of a loop once.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from music_jax.plan.hlo import Array, Instruction, Program

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Instructions that read and write nothing themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "opt-barrier", "partition-id", "replica-id", "after-all",
}  # fmt: skip
# The forms in which XLA writes the groups of devices of a collective.
_GROUP_LIST = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# Calls of cuBLAS and cuDNN.
_LIBRARY_CALL = re.compile(r'custom_call_target="__(cublas|cudnn)\$([\w$]+)"')
# A collective that overlaps with computation is in every fusion of a chain: the one that starts it,
# those that it overlaps with, and the one that waits for its end.
_CHAIN = re.compile(r'chain_id="(\d+)"')
_STARTS_CHAIN = "AsyncCollectiveStart"
_ALIASES = re.compile(r"\{(\d*)\}: \((\d+), \{\}")  # a result and an operand that share memory
_GEMM_CONTRACTING = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Bytes that the collectives of a program move in one run.

    Attributes:
      received: Bytes that enter a chip from other chips, for the chip that receives most.
      by_kind: Bytes of the collectives' results on one device, by kind.
    """

    received: float
    by_kind: dict[str, int]


def collectives(program: Program, chip_of_device: Sequence[int]) -> Collectives:
    """Counts the collectives of a program.

    Bytes between devices of one chip do not enter the chip. A chip that holds the share p of a
    group's devices receives 1 - p of the result of an all-gather, twice that of an all-reduce,
    1 - p of all inputs of a reduce-scatter, and 1 - p of the result of an all-to-all on each of its
    devices. This is the minimum, which rings of chips achieve.

    Args:
      program: The program.
      chip_of_device: Index of the chip of each device of the mesh.
    """
    sent: dict[str, tuple[int, _Sent]] = {}
    for name, times in _runs(program).items():
        for instruction in program.computations[name].values():
            for found in _sent(program, name, instruction, len(chip_of_device)):
                # A chain through a loop runs as often as its part outside the loop.
                before = sent.get(found.key)
                if before is None or times < before[0]:
                    sent[found.key] = times, found
    received, by_kind = np.zeros(max(chip_of_device) + 1), dict[str, int]()
    for times, found in sent.values():
        by_kind[found.kind] = by_kind.get(found.kind, 0) + times * found.size
        received += times * _received(found, np.asarray(chip_of_device))
    return Collectives(float(received.max()), by_kind)


def _received(sent: "_Sent", chip_of_device: np.ndarray) -> np.ndarray:
    """Returns the bytes of a collective that enter each chip."""
    chips = int(chip_of_device.max()) + 1
    received = np.zeros(chips)
    for group in sent.groups:
        on_chip = np.bincount(chip_of_device[list(group)], minlength=chips)
        if sent.kind == "collective-permute":  # a group is a pair: source and target
            source, target = chip_of_device[list(group)]
            received[target] += sent.size * (source != target)
            continue
        times: Any = {"all-reduce": 2, "reduce-scatter": len(group), "all-to-all": on_chip}
        whole = sent.size * times.get(sent.kind, 1)
        received += np.where(on_chip > 0, whole * (1 - on_chip / len(group)), 0.0)
    return received


class _Sent(NamedTuple):
    """A collective: identifier, kind, bytes of the result, and groups of devices."""

    key: str
    kind: str
    size: int
    groups: tuple[tuple[int, ...], ...]


def _sent(
    program: Program, computation: str, instruction: Instruction, devices: int
) -> list[_Sent]:
    kind = instruction.opcode.removesuffix("-start")
    if kind in _COLLECTIVES:
        arrays = instruction.arrays
        if instruction.opcode != kind and kind != "all-reduce":
            # The results of a start are its operands, its results and some counters.
            arrays = tuple(array for array in arrays if array.shape)
            arrays = arrays[len(arrays) // 2 :]
        size = sum(array.size for array in arrays)
        chain = _CHAIN.search(instruction.attributes)
        key = chain[1] if chain else f"{computation}/{instruction.name}"
        return [_Sent(key, kind, size, _groups(instruction.attributes, devices))]
    if instruction.opcode != "fusion":
        return []
    called = instruction.called["calls"]
    sent = [
        found
        for inner in program.computations[called].values()
        for found in _sent(program, called, inner, devices)
    ]
    if called.startswith("all-reduce-scatter"):
        # An all-reduce of which each device keeps a share is a reduce-scatter.
        return [
            found._replace(kind="reduce-scatter", size=found.size // len(found.groups[0]))
            for found in sent
        ]
    return sent


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Returns the groups of devices, by position in the mesh."""
    if found := _GROUP_MESH.search(attributes):
        sizes = {axis: int(size) for axis, size in (a.split("=") for a in found[1].split(","))}
        inner = [list(sizes).index(axis) for axis in found[2].split(",")]
        outer = [axis for axis in range(len(sizes)) if axis not in inner]
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        width = math.prod(ids.shape[axis] for axis in inner)
        ids = ids.transpose(outer + inner).reshape((-1, width))
    elif found := _GROUP_IOTA.search(attributes):
        # Groups and devices in each; all devices as a grid; the order of the grid's axes.
        shape, grid = (tuple(int(n) for n in text.split(",")) for text in found.groups()[:2])
        order = [int(n) for n in found[3].split(",")] if found[3] else range(len(grid))
        ids = np.arange(math.prod(grid)).reshape(grid).transpose(order).reshape(shape)
    elif found := _GROUP_LIST.search(attributes) or _PAIRS.search(attributes):
        groups = found[1].strip("{}").split("},{")
        return tuple(tuple(int(n) for n in group.split(",")) for group in groups)
    else:
        ids = np.arange(devices)[None]
    return tuple(tuple(group) for group in ids.tolist())


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one device in one run of a program.

    Attributes:
      flops: FLOPs of matrix products and convolutions.
      bytes: Bytes that instructions read and write, in any memory.
      hbm_bytes: Those in the device's main memory.
    """

    flops: float
    bytes: float
    hbm_bytes: float


def work(program: Program, *, loops_once: bool = False) -> Work:
    """Counts the work of a program.

    Args:
      program: The program.
      loops_once: Whether to count a loop's body once, as XLA's own cost analysis does.
    """
    flops, total, hbm = 0, 0, 0
    for name, runs in _runs(program).items():
        times = 1 if loops_once else runs
        for instruction in program.computations[name].values():
            flops += times * _flops(program, name, instruction)
            for array in _touched(program, name, instruction):
                total += times * array.size
                hbm += times * array.size * array.in_hbm
    return Work(float(flops), float(total), float(hbm))


def _runs(program: Program) -> dict[str, int]:
    """Returns how often each computation runs; branches are compared by FLOPs, then bytes."""

    def cost(computation: str, instruction: Instruction) -> tuple[int, int]:
        touched = _touched(program, computation, instruction)
        return _flops(program, computation, instruction), sum(array.size for array in touched)

    return program.runs(cost)


def _touched(program: Program, computation: str, instruction: Instruction) -> list[Array]:
    """Returns the arrays that an instruction reads or writes."""
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return []
    if instruction.opcode == "custom-call" and "ConcatBitcast" in instruction.attributes:
        return []  # adjacent arrays, used as one
    if instruction.opcode in ("copy-start", "slice-start"):
        # It returns operand and result, in either order, and touches a part of the larger one.
        source, result = instruction.arrays[:2]
        smaller = min(source, result, key=lambda array: array.size)
        return [dataclasses.replace(smaller, in_hbm=a.in_hbm) for a in (source, result)]
    results, operands = _handed_on(program, instruction)
    there = program.computations[computation]
    return [
        *(array for n, array in enumerate(instruction.arrays) if n not in results),
        *(
            array
            for n, name in enumerate(instruction.operands)
            if n not in operands
            for array in there[name].arrays
        ),
    ]


def _handed_on(program: Program, instruction: Instruction) -> tuple[set[int], set[int]]:
    """Returns the results and operands of a fusion that belong to an overlapping collective.

    They are passed along the chain, and are counted at its start.
    """
    if instruction.opcode != "fusion":
        return set(), set()
    inside = program.computations[instruction.called["calls"]].values()
    if not any(n.opcode in _COLLECTIVES and _CHAIN.search(n.attributes) for n in inside):
        return set(), set()
    shared = _ALIASES.findall(instruction.attributes)
    results = {int(result or 0) for result, _ in shared}
    if any(n.opcode == "custom-call" and _STARTS_CHAIN in n.attributes for n in inside):
        return results, set()
    return results, {int(operand) for _, operand in shared}


def _flops(program: Program, computation: str, instruction: Instruction) -> int:
    if instruction.opcode == "fusion":
        called = instruction.called["calls"]
        return sum(
            _flops(program, called, inner) for inner in program.computations[called].values()
        )
    if instruction.opcode == "custom-call":
        return _library_flops(program, computation, instruction)
    if instruction.opcode not in ("convolution", "dot"):
        return 0
    result = instruction.arrays[0]
    left, right = program.operands(computation, instruction)[:2]
    if instruction.opcode == "dot":
        found = _CONTRACTING.search(instruction.attributes)
        return _product_flops(left, result, found[1] if found else "")
    return _convolution_flops(left, right, result, instruction.attributes)


def _library_flops(program: Program, computation: str, instruction: Instruction) -> int:
    call = _LIBRARY_CALL.search(instruction.attributes)
    if call is None:
        return 0
    result = instruction.arrays[0]
    left, right = program.operands(computation, instruction)[:2]
    if call[1] == "cublas":
        found = _GEMM_CONTRACTING.search(instruction.attributes)
        return _product_flops(left, result, found[1].replace('"', "") if found else "")
    # The attributes always describe the forward convolution.
    if call[2] == "convBackwardInput":
        left, result = result, left
    elif call[2] == "convBackwardFilter":
        right, result = result, right
    return _convolution_flops(left, right, result, instruction.attributes)


def _product_flops(left: Array, result: Array, contracting: str) -> int:
    axes = [int(n) for n in contracting.split(",") if n]
    return 2 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in axes)


def _convolution_flops(left: Array, right: Array, result: Array, attributes: str) -> int:
    found = _DIM_LABELS.search(attributes)
    if found is None:
        return 0
    image, kernel, output = found.groups()
    positions = 1  # pairs of positions in the output and the kernel that are inside the image
    for axis, (size, options) in enumerate(_window(attributes)):
        digit = str(axis)
        inputs, outputs = left.shape[image.index(digit)], result.shape[output.index(digit)]
        positions *= _meeting(inputs, outputs, size, options)
    batch = result.shape[output.index("b")]
    features = right.shape[kernel.index("i")] * right.shape[kernel.index("o")]
    return 2 * batch * features * positions


def _window(attributes: str) -> list[tuple[int, dict[str, tuple[int, ...]]]]:
    """Returns the kernel's size and the strides, padding and dilation of each spatial axis."""
    found = _WINDOW.search(attributes)
    if found is None:
        return []
    fields = dict(field.split("=") for field in found[1].split())
    axes = {
        name: [tuple(int(n) for n in axis.split("_")) for axis in value.split("x")]
        for name, value in fields.items()
        if name in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
    }
    sizes = axes.pop("size")
    return [
        (size, {name: values[axis] for name, values in axes.items()})
        for axis, (size,) in enumerate(sizes)
    ]


def _meeting(inputs: int, outputs: int, size: int, options: dict[str, tuple[int, ...]]) -> int:
    stride, kernel_step = options.get("stride", (1,))[0], options.get("rhs_dilate", (1,))[0]
    dilation, before = options.get("lhs_dilate", (1,))[0], options.get("pad", (0, 0))[0]
    where = np.arange(outputs)[:, None] * stride + np.arange(size)[None, :] * kernel_step - before
    inside = (where >= 0) & (where <= (inputs - 1) * dilation) & (where % dilation == 0)
    return int(np.count_nonzero(inside))
