"""Parses programs that XLA has compiled, and counts their FLOPs, memory traffic and communication.

A plan uses XLA's own counts wherever there are any. XLA has none for collectives and for GPUs that
are not at hand, and counts the body of a loop once.

The text of a program, `jax.stages.Compiled.as_text()`, has one instruction per line. Shapes are
those of one device.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

# Bits of an element of XLA's types.
_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16,
    "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that read and write nothing themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "opt-barrier", "partition-id", "replica-id", "after-all",
}  # fmt: skip

# Adjacent arrays that are used as one, and memory that a loop writes to.
_FREE_CALL = re.compile(r'custom_call_target="(?:ConcatBitcast|AllocateBuffer)"')
# Instructions that read a part of their first operand.
_SLICES = ("dynamic-slice", "gather", "slice")

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
# Name, results, opcode, arguments, which may have brackets of their own, and attributes.
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\(([^()]*(?:\([^()]*\)[^()]*)*)\)(.*)$"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|body|branch_computations|true_computation|false_computation)="
    r"\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# The forms in which XLA writes the groups of devices of a collective.
_GROUP_LIST = re.compile(r"(?:replica_groups|source_target_pairs)=(\{\{[\d,{}]*\}\})")
_GROUP_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
# Transfers between slices, which libtpu compiles to sends to the host and receives from it.
_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="?\{+([\d,]+)\}.*?_xla_megascale_transfer_type="(\w+)"'
)
# A collective that overlaps with computation is in every fusion of a chain: the one that starts it,
# those that it overlaps with, and the one that waits for its end.
_CHAIN = re.compile(r'chain_id="(\d+)"')
_STARTS_CHAIN = "AsyncCollectiveStart"
_ALIASES = re.compile(r"\{(\d*)\}: \((\d+), \{\}")  # a result and an operand that share memory
_LIBRARY_CALL = re.compile(r'custom_call_target="__(cublas|cudnn)\$([\w$]+)"')
_CONTRACTING = re.compile(r'lhs_contracting_dim\w*"?[=:][{\[]([\d,"]*)')
_DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")


class Array(NamedTuple):
    """An array of one device."""

    shape: tuple[int, ...]
    size: int  # in bytes, without the padding of its layout
    in_hbm: bool  # in the device's main memory, not in its on-chip memory


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """An instruction of a computation."""

    opcode: str
    results: list[Array]
    operands: list[list[Array]]
    arguments: str  # in its brackets: names of its operands, or the value of a constant
    attributes: str  # the rest of its line
    called: list["Computation"]  # of a loop, the condition and the body


Computation = list[Instruction]


def read(compiled: jax.stages.Compiled) -> Computation:
    """Returns the program that XLA has compiled for one device; see `parse`."""
    return parse(compiled.as_text() or "")


def parse(text: str) -> Computation:
    """Parses the text of a compiled program; returns the computation that runs first."""
    computations: dict[str, Computation] = collections.defaultdict(list)
    entry, current = "", ""
    arrays: dict[str, list[Array]] = {}  # results of the instructions of the current computation
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current, arrays = found[2], {}
            entry = current if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, results, opcode, arguments, attributes = found.groups()
            arrays[name] = [
                _array(*parts) for parts in _ARRAY.findall(results) if parts[0] in _BITS
            ]
            operands = [arrays[operand] for operand in _NAME.findall(arguments)]
            called = _NAME.findall(" ".join(_CALLED.findall(attributes)))
            bodies = [computations[computation] for computation in called]
            computations[current].append(
                Instruction(opcode, arrays[name], operands, arguments, attributes, bodies)
            )
    return computations[entry]


def _array(dtype: str, shape: str, layout: str) -> Array:
    sizes = tuple(int(n) for n in shape.split(",") if n)
    return Array(sizes, math.prod(sizes) * _BITS[dtype] // 8, "S(" not in layout)


def _runs(entry: Computation, *, loops_once: bool = False) -> dict[Instruction, int]:
    """Returns how often each instruction that is not part of a fusion runs.

    A loop of unknown length counts as one iteration. A `conditional` runs its most expensive
    branch, by FLOPs and then by bytes.
    """
    runs: dict[Instruction, int] = collections.defaultdict(int)

    def visit(computation: Computation, times: int) -> None:
        for instruction in computation:
            runs[instruction] += times
            if instruction.opcode == "while":
                turns = 1 if loops_once else _trip_count(instruction)
                visit(instruction.called[1], times * turns)
            elif instruction.opcode == "conditional":
                visit(max(instruction.called, key=work), times)
            elif instruction.opcode in ("call", "async-start"):
                visit(instruction.called[0], times)

    visit(entry, 1)
    return runs


def _trip_count(loop: Instruction) -> int:
    if found := _TRIP_COUNT.search(loop.attributes):
        return int(found[1])
    # The loops of JAX's scans count from 0 in steps of 1 up to a constant.
    condition = list(loop.called[0])
    condition += [n for fusion in condition if fusion.opcode == "fusion" for n in fusion.called[0]]
    bounds = {n.arguments for n in condition if n.opcode == "constant" and n.arguments.isdigit()}
    counts = any("direction=LT" in n.attributes for n in condition)
    return int(bounds.pop()) if counts and len(bounds) == 1 else 1


class Collectives(NamedTuple):
    """Bytes that the collectives of a program move in one run.

    Attributes:
      received: From other chips of the slice, by the chip that receives most.
      by_kind: Size of the results on one device, within a slice.
      dcn_received: From other slices, by one device.
      dcn_transfers: Number of transfers from other slices.
    """

    received: float
    by_kind: dict[str, int]
    dcn_received: float
    dcn_transfers: int


class _Sent(NamedTuple):
    """A collective: identifier, kind, bytes of the result, and groups of devices."""

    key: Any
    kind: str
    size: int
    groups: list[list[int]]


def collectives(program: Computation, chip_of_device: Sequence[int]) -> Collectives:
    """Counts the collectives of a program.

    Bytes between devices of one chip do not enter the chip. A chip that holds the share p of a
    group's devices receives 1 - p of the result of an all-gather, twice that of an all-reduce,
    1 - p of all inputs of a reduce-scatter, and 1 - p of the result of an all-to-all on each of its
    devices. This is the minimum, which rings of chips achieve. The same holds between slices, where
    a device exchanges data with those at its place in the other slices.

    Args:
      program: The program.
      chip_of_device: Index of the chip of each device of the slice that runs the program.
    """
    chips = np.asarray(chip_of_device)
    sent: dict[Any, tuple[int, _Sent]] = {}
    for instruction, times in _runs(program).items():
        for found in _sent(instruction, len(chips)):
            # A chain through a loop runs as often as its part outside the loop.
            if found.key not in sent or times < sent[found.key][0]:
                sent[found.key] = times, found
    received, by_kind = np.zeros(chips.max() + 1), collections.Counter[str]()
    crossing = [(times, _from_slices(n)) for n, times in _runs(program).items()]
    for times, found in sent.values():
        by_kind[found.kind] += times * found.size
        received += times * _received(found, chips)
    return Collectives(
        float(received.max()),
        dict(by_kind),
        sum(times * size for times, size in crossing),
        sum(times for times, size in crossing if size),
    )


def _from_slices(instruction: Instruction) -> float:
    """Returns the bytes that a device receives from other slices."""
    found = _BETWEEN_SLICES.search(instruction.attributes)
    if instruction.opcode != "recv" or found is None:
        return 0.0
    slices, size = found[1].count(",") + 1, instruction.results[0].size
    kind = found[2].lower().replace("_", "-")
    if kind not in _COLLECTIVES:  # from one slice to another
        return size
    places = np.arange(slices)
    return float(_received(_Sent(None, kind, size, [places.tolist()]), places)[0])


def _sent(instruction: Instruction, devices: int) -> list[_Sent]:
    """Returns the collectives of an instruction, those in a fusion included."""
    if instruction.opcode == "fusion":
        sent = [found for inner in instruction.called[0] for found in _sent(inner, devices)]
        if "calls=%all-reduce-scatter" in instruction.attributes:
            # An all-reduce of which each device keeps a share is a reduce-scatter.
            return [
                found._replace(kind="reduce-scatter", size=found.size // len(found.groups[0]))
                for found in sent
            ]
        return sent
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return []
    arrays = instruction.results
    if instruction.opcode != kind and kind != "all-reduce":
        # The results of a start are its operands, its results and some counters.
        arrays = [array for array in arrays if array.shape]
        arrays = arrays[len(arrays) // 2 :]
    chain = _CHAIN.search(instruction.attributes)
    size = sum(array.size for array in arrays)
    key = chain[1] if chain else instruction
    return [_Sent(key, kind, size, _groups(instruction, devices))]


def _groups(collective: Instruction, devices: int) -> list[list[int]]:
    """Returns the groups of devices, by position in the mesh."""
    if found := _GROUP_LIST.search(collective.attributes):
        return json.loads(found[1].translate(str.maketrans("{}", "[]")))
    # All devices as a grid; the order of its axes; the number of groups, and of devices in each.
    grid, order, shape = [devices], [0], [1, devices]
    if found := _GROUP_IOTA.search(collective.attributes):
        shape, grid = ([int(n) for n in text.split(",")] for text in found.groups()[:2])
        order = [int(n) for n in found[3].split(",")] if found[3] else list(range(len(grid)))
    elif found := _GROUP_MESH.search(collective.attributes):
        axes = dict(axis.split("=") for axis in found[1].split(","))
        inner = found[2].split(",")
        grid = [int(size) for size in axes.values()]
        order = sorted(range(len(axes)), key=lambda axis: list(axes)[axis] in inner)
        shape = [-1, math.prod(int(axes[axis]) for axis in inner)]
    return np.arange(math.prod(grid)).reshape(grid).transpose(order).reshape(shape).tolist()


def _received(sent: _Sent, chip_of_device: np.ndarray) -> np.ndarray:
    """Returns the bytes of a collective that enter each chip."""
    received = np.zeros(chip_of_device.max() + 1)
    for group in sent.groups:
        on_chip = np.bincount(chip_of_device[group], minlength=len(received))
        if sent.kind == "collective-permute":  # a group is a pair: source and target
            source, target = chip_of_device[group]
            received[target] += sent.size * (source != target)
            continue
        times: Any = {"all-reduce": 2, "reduce-scatter": len(group), "all-to-all": on_chip}
        whole = sent.size * times.get(sent.kind, 1)
        received += np.where(on_chip > 0, whole * (1 - on_chip / len(group)), 0.0)
    return received


class Work(NamedTuple):
    """Work of one device in one run of a program."""

    flops: int  # of matrix products and convolutions
    bytes: int  # that instructions read and write, in any memory
    hbm_bytes: int  # those in the device's main memory


def work(program: Computation, *, loops_once: bool = False) -> Work:
    """Counts the work of a program.

    Args:
      program: The program.
      loops_once: Whether to count a loop's body once, as XLA's own cost analysis does.
    """
    flops, total, hbm = 0, 0, 0
    for instruction, times in _runs(program, loops_once=loops_once).items():
        flops += times * _flops(instruction)
        for array in _accessed(instruction):
            total += times * array.size
            hbm += times * array.size * array.in_hbm
    return Work(flops, total, hbm)


def costs(compiled: jax.stages.Compiled, program: Computation) -> tuple[float, float]:
    """Returns the FLOPs and the bytes accessed per device.

    XLA's cost analysis counts a loop's body once, so further iterations are counted here. It
    gives no counts for absent GPUs, for which everything is counted here.
    """
    analysis: Any = compiled.cost_analysis()
    counted = work(program)
    if analysis is None:
        return counted.flops, counted.bytes
    once = work(program, loops_once=True)
    flops = analysis["flops"] + counted.flops - once.flops
    return flops, analysis["bytes accessed"] + counted.bytes - once.bytes


def _accessed(instruction: Instruction) -> list[Array]:
    """Returns the arrays that an instruction reads or writes."""
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return []
    if instruction.opcode == "custom-call" and _FREE_CALL.search(instruction.attributes):
        return []
    if instruction.opcode in ("copy-start", "slice-start"):
        # It returns operand and result, in either order, and touches a part of the larger one.
        ends = instruction.results[:2]
        return [array._replace(size=min(end.size for end in ends)) for array in ends]
    results, operands = _passed_along(instruction)
    read, written = _sizes_of_parts(instruction)
    accessed = [
        array._replace(size=written.get(n, array.size))
        for n, array in enumerate(instruction.results)
        if n not in results
    ]
    for n, arrays in enumerate(instruction.operands):
        if n not in operands:
            for array in arrays:  # several parts of one may overlap
                part = min(read.get(n, array.size), array.size)
                accessed.append(array._replace(size=part))
    return accessed


def _sizes_of_parts(instruction: Instruction) -> tuple[dict[int, int], dict[int, int]]:
    """Returns the bytes of the operands and of the results of which only parts are accessed.

    The steps of a loop read slices of its arrays, and update slices in place.
    """
    if instruction.opcode in _SLICES:
        return {0: instruction.results[0].size}, {}
    if instruction.opcode == "dynamic-update-slice":
        return {0: 0}, {0: instruction.operands[1][0].size}
    if instruction.opcode != "fusion":
        return {}, {}
    body = instruction.called[0]
    # Bitcasts are other names of their operand.
    renamed = {id(n.results): id(n.operands[0]) for n in body if n.opcode == "bitcast"}

    def source(arrays: list[Array]) -> int:
        key = id(arrays)
        while key in renamed:
            key = renamed[key]
        return key

    whole = set[int]()  # arrays that are used as a whole
    used: dict[int, int] = collections.defaultdict(int)  # bytes of the parts of others
    updates: dict[int, int] = {}
    for inner in body:
        if inner.opcode == "bitcast":
            continue
        read, written = _sizes_of_parts(inner)
        updates |= {id(inner.results): written[0]} if written and len(inner.results) == 1 else {}
        for n, arrays in enumerate(inner.operands):
            if n in read:
                used[source(arrays)] += read[n]
            else:
                whole.add(source(arrays))
    parameters = {int(n.arguments): id(n.results) for n in body if n.opcode == "parameter"}
    root = body[-1]
    outputs = root.operands if root.opcode == "tuple" else [root.results]
    found = [updates.get(source(arrays)) for arrays in outputs]
    return (
        {n: used[key] for n, key in parameters.items() if key in used and key not in whole},
        {n: size for n, size in enumerate(found) if size is not None},
    )


def _passed_along(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Returns the results and operands of a fusion that belong to an overlapping collective.

    They are passed along the chain, and are counted at its start.
    """
    inside = instruction.called[0] if instruction.opcode == "fusion" else []
    if not any(n.opcode in _COLLECTIVES and _CHAIN.search(n.attributes) for n in inside):
        return set(), set()
    shared = _ALIASES.findall(instruction.attributes)
    starts = any(n.opcode == "custom-call" and _STARTS_CHAIN in n.attributes for n in inside)
    operands = set() if starts else {int(operand) for _, operand in shared}
    return {int(result or 0) for result, _ in shared}, operands


def _flops(instruction: Instruction) -> int:
    if instruction.opcode == "fusion":
        return sum(map(_flops, instruction.called[0]))
    library = _LIBRARY_CALL.search(instruction.attributes)
    if not library and instruction.opcode not in ("convolution", "dot"):
        return 0
    result = instruction.results[0].shape
    left, right = (arrays[0].shape for arrays in instruction.operands[:2])
    if instruction.opcode == "dot" or (library and library[1] == "cublas"):
        found = _CONTRACTING.search(instruction.attributes)
        axes = re.findall(r"\d+", found[1]) if found else []
        return 2 * math.prod(result) * math.prod(left[int(axis)] for axis in axes)
    # The attributes of a call of cuDNN always describe the forward convolution.
    if library and library[2] == "convBackwardInput":
        left, result = result, left
    elif library and library[2] == "convBackwardFilter":
        right, result = result, right
    return _convolution_flops(left, right, result, instruction.attributes)


def _convolution_flops(
    left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...], attributes: str
) -> int:
    labels, window = _DIM_LABELS.search(attributes), _WINDOW.search(attributes)
    if labels is None:
        return 0
    image, kernel, output = labels.groups()
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    options = {  # of each spatial axis; of the padding, that before the image
        name: [int(axis.split("_")[0]) for axis in text.split("x")] for name, text in fields.items()
    }
    positions = 1  # pairs of positions in the output and the kernel that are inside the image
    for axis, size in enumerate(options.get("size", [])):
        stride, kernel_step, dilation = (
            options[name][axis] if name in options else 1
            for name in ("stride", "rhs_dilate", "lhs_dilate")
        )
        before = options["pad"][axis] if "pad" in options else 0
        inputs, outputs = left[image.index(str(axis))], result[output.index(str(axis))]
        where = np.arange(outputs)[:, None] * stride + np.arange(size) * kernel_step - before
        inside = (where >= 0) & (where <= (inputs - 1) * dilation) & (where % dilation == 0)
        positions *= int(np.count_nonzero(inside))
    features = right[kernel.index("i")] * right[kernel.index("o")]
    return 2 * result[output.index("b")] * features * positions
