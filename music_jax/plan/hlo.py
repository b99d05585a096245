"""Reading a compiled program's text: instructions, and how often each of them runs.

The text is XLA's own, from `jax.stages.Compiled.as_text()`: one computation after the other, one
instruction a line. Shapes in it are those of one device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

# Bits of an element of each of XLA's types that a training step can hold.
_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16,
    "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|true_computation|false_computation)=\{?([^}=]*)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SCOPE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of one device.

    Attributes:
      dtype: XLA's name of the type.
      shape: its dimensions.
      in_hbm: whether it lives in the device's main memory, and not in its on-chip memory.
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> int:
        """Bytes of its elements, without the padding of its layout."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name.
      opcode: what it does.
      arrays: what it gives, a tuple's elements one by one.
      arguments: what stands in its brackets: the instructions that it takes, or a constant's value.
      attributes: the rest of the line.
      is_root: whether its result is the computation's.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions that it takes."""
        return tuple(_NAME.findall(self.arguments))

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations that it calls, by their role."""
        return {role: name for role, name in _CALLED.findall(self.attributes)}

    @property
    def branches(self) -> list[str]:
        """The computations that a `conditional` chooses from."""
        found = _BRANCHES.findall(self.attributes)
        return [name for names in found for name in _NAME.findall(names)]

    @property
    def scope(self) -> str:
        """Which operation of the traced program it comes from, or an empty text."""
        found = _SCOPE.search(self.attributes)
        return found[1].replace("\\'", "'") if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: the instructions of each computation, by its name.
      entry: the name of the one that runs first.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def runs(self, cost: Callable[[str, Instruction], tuple[int, ...]]) -> dict[str, int]:
        """How often each computation that is not part of a fusion runs.

        A loop's body runs as often as the loop turns; a loop of unknown length counts as one turn.
        Of a condition's branches the dearest runs.

        Args:
          cost: of an instruction of the computation so named.
        """
        return self._runs_from(self.entry, cost)

    def _runs_from(
        self, entry: str, cost: Callable[[str, Instruction], tuple[int, ...]]
    ) -> dict[str, int]:
        runs: dict[str, int] = {}

        def cost_of(branch: str) -> tuple[int, ...]:
            costs = [
                [times * number for number in cost(name, instruction)]
                for name, times in self._runs_from(branch, cost).items()
                for instruction in self.computations[name].values()
            ]
            return tuple(sum(numbers) for numbers in zip(*costs, strict=True))

        def visit(name: str, times: int) -> None:
            runs[name] = runs.get(name, 0) + times
            for instruction in self.computations[name].values():
                if instruction.opcode == "while":
                    visit(instruction.called["body"], times * self._trip_count(instruction))
                elif instruction.opcode in ("call", "async-start"):
                    for called in instruction.called.values():
                        visit(called, times)
                elif branches := instruction.branches:
                    visit(max(branches, key=cost_of), times)

        visit(entry, 1)
        return runs

    def operands(self, computation: str, instruction: Instruction) -> list[Array]:
        """The arrays that an instruction of a computation takes."""
        there = self.computations[computation]
        return [array for name in instruction.operands for array in there[name].arrays]

    def _trip_count(self, loop: Instruction) -> int:
        if found := _TRIP_COUNT.search(loop.attributes):
            return int(found[1])
        # JAX's scans count from 0 in steps of 1 while less than a constant.
        names = [loop.called["condition"]]
        names += [
            instruction.called["calls"]
            for instruction in self.computations[names[0]].values()
            if instruction.opcode == "fusion"
        ]
        condition = [line for name in names for line in self.computations[name].values()]
        bounds = {
            int(line.arguments)
            for line in condition
            if line.opcode == "constant" and line.arguments.isdigit()
        }
        counts = any("direction=LT" in line.attributes for line in condition)
        return bounds.pop() if counts and len(bounds) == 1 else 1


def parse(text: str) -> Program:
    """Reads a compiled program's text."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    return Program(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    opcode = _OPCODE.search(rest)
    if opcode is None:
        raise ValueError(f"not an instruction of XLA: {name} = {rest[:200]}")
    tail = rest[opcode.end() - 1 :]
    end = _closing(tail)
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" not in layout)
        for dtype, shape, layout in _ARRAY.findall(rest[: opcode.start()])
        if dtype in _BITS
    )
    return Instruction(name, opcode[1], arrays, tail[1:end], tail[end + 1 :], is_root)


def _closing(text: str) -> int:
    """Where the bracket that opens `text` closes."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return position
    return len(text)
