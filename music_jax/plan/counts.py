"""What a compiled program sends over the network, reads, writes and multiplies, from its text.

Sizes and FLOPs in a plan are XLA's own wherever it gives them. It does not give the collectives,
and it counts the body of a loop once, however often the loop turns: what is counted here tells by
which factor that falls short.
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
# They only name, regroup or wait for what others have written.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "opt-barrier", "partition-id", "replica-id", "after-all",
}  # fmt: skip
# The groups of devices of a collective, in each of the forms that XLA writes them in.
_GROUP_LIST = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# Of cuBLAS and cuDNN.
_LIBRARY_CALL = re.compile(r'custom_call_target="__(cublas|cudnn)\$([\w$]+)"')
# A collective that overlaps with computation is written in a chain of fusions: in what starts it,
# in each that it overlaps with, and in what waits for its end.
_CHAIN = re.compile(r'chain_id="(\d+)"')
_STARTS_CHAIN = "AsyncCollectiveStart"
_ALIASES = re.compile(r"\{(\d*)\}: \((\d+), \{\}")  # result and operand that share their memory
_GEMM_CONTRACTING = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')


@dataclasses.dataclass(frozen=True)
class Collectives:
    """What the collectives of a program move in one run of it.

    Attributes:
      received: bytes that enter a chip from other chips; those of the chip that most enter.
      by_kind: bytes of the collectives' results on one device, by kind.
    """

    received: float
    by_kind: dict[str, int]


def collectives(program: Program, chip_of_device: Sequence[int]) -> Collectives:
    """Counts the collectives of a program.

    What devices of one chip send each other does not enter the chip. A chip that holds the share p
    of a group's devices receives 1 - p of what an all-gather returns, twice that of what an
    all-reduce returns, 1 - p of all that a reduce-scatter adds up, and 1 - p of what an all-to-all
    returns to each of its devices: the least that is possible, and what rings of chips achieve.

    Args:
      program: the program.
      chip_of_device: for each device of the mesh, in its order, the index of its chip.
    """
    sent: dict[str, tuple[int, _Sent]] = {}
    for name, times in _runs(program).items():
        for instruction in program.computations[name].values():
            for found in _sent(program, name, instruction, len(chip_of_device)):
                # Of a chain that goes through a loop, what is outside tells how often it runs.
                before = sent.get(found.key)
                if before is None or times < before[0]:
                    sent[found.key] = times, found
    received, by_kind = np.zeros(max(chip_of_device) + 1), dict[str, int]()
    for times, found in sent.values():
        by_kind[found.kind] = by_kind.get(found.kind, 0) + times * found.size
        received += times * _received(found, np.asarray(chip_of_device))
    return Collectives(float(received.max()), by_kind)


def _received(sent: "_Sent", chip_of_device: np.ndarray) -> np.ndarray:
    """Bytes of a collective that enter each chip."""
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
    """A collective: which it is, its kind, the bytes of its result, and its groups of devices."""

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
            # What starts a collective gives its operands, its results and some counters.
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
        # An all-reduce of which each device keeps its share: what moves is a reduce-scatter.
        return [
            found._replace(kind="reduce-scatter", size=found.size // len(found.groups[0]))
            for found in sent
        ]
    return sent


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices that exchange with each other, by their place in the mesh."""
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
    """What one device does in one run of a program.

    Attributes:
      flops: of its matrix products and convolutions.
      bytes: read and written by its instructions, in whatever memory.
      hbm_bytes: those in the device's main memory.
    """

    flops: float
    bytes: float
    hbm_bytes: float


def work(program: Program, *, loops_once: bool = False) -> Work:
    """Counts what a program does.

    Args:
      program: the program.
      loops_once: count a loop's body once, as XLA's own cost analysis does.
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
    """How often each computation runs; the dearest branch is that of most FLOPs, then bytes."""

    def cost(computation: str, instruction: Instruction) -> tuple[int, int]:
        touched = _touched(program, computation, instruction)
        return _flops(program, computation, instruction), sum(array.size for array in touched)

    return program.runs(cost)


def _touched(program: Program, computation: str, instruction: Instruction) -> list[Array]:
    """The arrays that an instruction reads or writes."""
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return []
    if instruction.opcode == "custom-call" and "ConcatBitcast" in instruction.attributes:
        return []  # several arrays that lie one behind the other, seen as one
    if instruction.opcode in ("copy-start", "slice-start"):
        # It gives its operand and its result, in either order; of the larger it touches a part.
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
    """Which results and operands of a fusion are those of a collective that it overlaps with.

    They are handed on along the chain, and count where it starts.
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
    # The attributes are always those of the forward convolution.
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
    positions = 1  # pairs of a position of the output and one of the kernel that meet the image
    for axis, (size, options) in enumerate(_window(attributes)):
        digit = str(axis)
        inputs, outputs = left.shape[image.index(digit)], result.shape[output.index(digit)]
        positions *= _meeting(inputs, outputs, size, options)
    batch = result.shape[output.index("b")]
    features = right.shape[kernel.index("i")] * right.shape[kernel.index("o")]
    return 2 * batch * features * positions


def _window(attributes: str) -> list[tuple[int, dict[str, tuple[int, ...]]]]:
    """Of each spatial axis of a convolution: the kernel's size, and strides, padding, dilation."""
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


def largest_arrays(program: Program, count: int) -> list[tuple[int, Array, int, str]]:
    """The largest arrays that the program writes to the device's main memory.

    Args:
      program: the program.
      count: how many kinds of them.

    Returns:
      Bytes of one, the array, how many such are written, and what writes the first; arrays of the
      same shape and type are one kind. They need not all live at the same time.
    """
    kinds: dict[Array, list[str]] = {}
    for name in _runs(program):
        for instruction in program.computations[name].values():
            if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
                continue
            handed_on = _handed_on(program, instruction)[0]
            for n, array in enumerate(instruction.arrays):
                if array.in_hbm and n not in handed_on:
                    kinds.setdefault(array, []).append(instruction.scope)
    largest = sorted(kinds, key=lambda array: array.size, reverse=True)[:count]
    return [(array.size, array, len(kinds[array]), _last(kinds[array])) for array in largest]


def _last(scopes: list[str]) -> str:
    return next((scope.rpartition("/")[2] for scope in scopes if scope), "")
