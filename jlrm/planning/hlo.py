"""The text of a compiled program, parsed into computations of instructions.

The text is what `compiled.as_text()` returns for a scheduled module. Each instruction has one line,
with the shapes of its result, the names of its operands, and attributes as text.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTHS = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](?:\{([^}]*)\})?")


@dataclass(frozen=True)
class Shape:
    """One array of an instruction's operands or result."""

    dtype: str
    dims: tuple[int, ...]
    is_hbm: bool

    @property
    def num_bytes(self) -> float:
        """Bytes without the padding of tiles."""
        return math.prod(self.dims) * _width(self.dtype)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]
    rest: str  # everything after the operands
    text: str  # of the operands: a parameter's number, a constant's value
    is_root: bool


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return every computation's instructions by name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split(" ")[0].removeprefix("%")
            current = computations.setdefault(name, [])
            entry = name if line.startswith("ENTRY ") else entry
        elif current is not None and " = " in line:
            current.append(_instruction(line))
    if not entry:
        raise ValueError("This is no text of an HLO module: it has no ENTRY.")
    return computations, entry


def _instruction(line: str) -> Instruction:
    head, _, body = line.strip().partition(" = ")
    end = _closing(body, 0) if body.startswith("(") else body.index(" ")
    kind, body = body[:end], body[end:].lstrip()
    opcode, _, _ = body.partition("(")
    end = _closing(body, len(opcode))
    operands = body[len(opcode) + 1 : end - 1]
    return Instruction(
        name=head.removeprefix("ROOT ").removeprefix("%"),
        opcode=opcode,
        shapes=_shapes(kind),
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        rest=body[end:],
        text=operands,
        is_root=head.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Return where the parenthesis that opens at `start` is closed, plus one."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.end()
    raise ValueError(f"Unbalanced parentheses in HLO: {text[:200]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        shapes.append(Shape(dtype, sizes, not re.search(r"S\([1-9]", layout)))
    return tuple(shapes)


def _width(dtype: str) -> float:
    if dtype in WIDTHS:
        return WIDTHS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) / 8 if digits else 0


def hbm_bytes(shapes: Sequence[Shape]) -> float:
    return sum(shape.num_bytes for shape in shapes if shape.is_hbm)


def called(instruction: Instruction, key: str) -> list[str]:
    names = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", instruction.rest)
    return re.findall(r"%([\w.\-]+)", names[1]) if names else []


def op_name(instruction: Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', instruction.rest)
    return match[1] if match else ""


def cycles(instruction: Instruction) -> float:
    match = re.search(r'"estimated_cycles":"?(\d+)', instruction.rest)
    return float(match[1]) if match else 0.0


def known_turns(
    loop: Instruction, condition: list[Instruction], here: list[Instruction]
) -> int | None:
    """Return how often a loop runs if its condition compares a counter with a constant."""
    stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if stated:
        return int(stated[1])
    by_name = {instruction.name: instruction for instruction in condition}
    root = next(instruction for instruction in condition if instruction.is_root)
    direction = re.search(r"direction=(LT|LE)", root.rest)
    if root.opcode != "compare" or not direction:
        return None
    counter, limit = (by_name[name] for name in root.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    place = re.search(r"index=(\d+)", counter.rest)
    first = _initial(here, loop, int(place[1])) if place else 0
    return max(int(limit.text) + (direction[1] == "LE") - first, 0)


def _initial(here: list[Instruction], loop: Instruction, place: int) -> int:
    """Return the constant that a loop's counter begins with; 0 where it is not one."""
    by_name = {instruction.name: instruction for instruction in here}
    start = by_name.get(loop.operands[0])
    value = by_name.get(start.operands[place]) if start and start.opcode == "tuple" else None
    while value and value.opcode in ("copy", "bitcast"):
        value = by_name.get(value.operands[0])
    return int(value.text) if value and re.fullmatch(r"-?\d+", value.text) else 0


def replica_groups(text: str) -> Iterator[list[int]]:
    """Yield the devices that exchange with each other, of any way in which HLO writes them."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[0-9,{}]*\})\}", text)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text)
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if listed:
        for group in re.findall(r"\{([0-9,]+)\}", listed[1]):
            yield [int(device) for device in group.split(",")]
    elif iota:
        sizes = [int(size) for size in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else range(len(sizes))
        yield from _split(_ordered(sizes, order), int(iota[2]))
    elif mesh:
        axes = re.findall(r"('[^']*')=(\d+)", mesh[1])
        chosen = re.findall(r"'[^']*'", mesh[2])
        inner = [n for n, (name, _) in enumerate(axes) if name in chosen]
        outer = [n for n in range(len(axes)) if n not in inner]
        sizes = [int(size) for _, size in axes]
        yield from _split(_ordered(sizes, [*outer, *inner]), math.prod(sizes[n] for n in inner))


def _ordered(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """Return 0, 1, ... of an array with these sizes, in the order of its transpose."""
    strides = [math.prod(sizes[n + 1 :]) for n in range(len(sizes))]
    places = itertools.product(*(range(sizes[n]) for n in order))
    return [sum(i * strides[n] for i, n in zip(place, order, strict=True)) for place in places]


def _split(devices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(devices), size):
        yield devices[start : start + size]
