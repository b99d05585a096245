"""Parses the text of a compiled program, `jax.stages.Compiled.as_text()`.

It has one instruction per line. Shapes are those of one device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

# Bits of an element of XLA's types.
_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16,
    "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|true_computation|false_computation)=\{?([^}=]*)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of one device.

    Attributes:
      dtype: XLA's name of the type.
      shape: Shape.
      in_hbm: Whether it is in the device's main memory, not in its on-chip memory.
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> int:
        """Size in bytes, without the padding of its layout."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    Attributes:
      name: Name.
      opcode: Operation.
      arrays: Results.
      arguments: Text in its brackets: names of its operands, or a constant's value.
      attributes: Rest of the line.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results are its operands."""
        return tuple(_NAME.findall(self.arguments))

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations that it calls, by role."""
        return {role: name for role, name in _CALLED.findall(self.attributes)}

    @property
    def branches(self) -> list[str]:
        """Computations that a `conditional` chooses from."""
        found = _BRANCHES.findall(self.attributes)
        return [name for names in found for name in _NAME.findall(names)]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: Instructions of each computation, by name.
      entry: Name of the computation that runs first.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def runs(self, cost: Callable[[str, Instruction], tuple[int, ...]]) -> dict[str, int]:
        """Returns how often each computation that is not part of a fusion runs.

        A loop of unknown length counts as one iteration. A `conditional` runs its most expensive
        branch.

        Args:
          cost: Cost of an instruction of the named computation.
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
        """Returns the operands of an instruction of a computation."""
        there = self.computations[computation]
        return [array for name in instruction.operands for array in there[name].arrays]

    def _trip_count(self, loop: Instruction) -> int:
        if found := _TRIP_COUNT.search(loop.attributes):
            return int(found[1])
        # The loops of JAX's scans count from 0 in steps of 1 up to a constant.
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
    """Parses the text of a compiled program."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[1]] = _instruction(found[1], found[2])
    return Program(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    opcode = _OPCODE.search(rest)
    if opcode is None:
        raise ValueError(f"cannot parse an instruction of XLA: {name} = {rest[:200]}")
    tail = rest[opcode.end() - 1 :]
    end = _closing(tail)
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" not in layout)
        for dtype, shape, layout in _ARRAY.findall(rest[: opcode.start()])
        if dtype in _BITS
    )
    return Instruction(name, opcode[1], arrays, tail[1:end], tail[end + 1 :])


def _closing(text: str) -> int:
    """Returns the position of the bracket that closes the one at the start of `text`."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return position
    return len(text)
