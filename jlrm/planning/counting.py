"""What a compiled program computes and moves, counted in its HLO text.

The compiler's `cost_analysis` counts the body of a loop once, whatever its trip count, and counts
on-chip buffers as memory. Here the text of the scheduled program is walked instead. A computation
counts as often as it runs, and an operand counts as memory traffic only if its layout says HBM.

If the condition of a loop compares a counter with a constant, that is its trip count. Other trip
counts depend on data: for these loops the caller says what to assume (`Assumed`).

Counts are those of one device. Left out: the inside of Pallas kernels but those of experts, FLOPs
of anything but matrix products, and time. `cycles` is the compiler's own estimate, not a
measurement.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jlrm.planning import hlo
from jlrm.planning.hlo import Instruction, Shape

# End of a loop's op_name: how often the loops of that name run, in the order in which they begin;
# the last number holds for all further ones.
Assumed = Mapping[str, Sequence[int]]

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = ("dynamic-slice", "slice", "gather")
# These move nothing: names for parts, control flow (whose parts count), what only allocates.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"}
FREE |= {"while", "conditional", "call", "async-start", "send", "recv", "partition-id"}
FREE |= {"replica-id", "optimization-barrier"}
FREE_CALLS = ('"AllocateBuffer"', '"ConcatBitcast"')
# Kernels that multiply rows with the matrix of their expert (model/experts.py), and the gradient.
GROUPED = re.compile(r"(^|_)t?gmm(_|\.|$)|^ragged-dot-none(\.|$)")
MEASURES = ("count", "ici_bytes", "dcn_bytes")


@dataclass
class Counts:
    """What one device does; collectives by kind, each over ICI (in a slice) or DCN (between)."""

    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)
    kernels: float = 0.0  # calls of Pallas kernels; of experts alone the inside is counted
    unknown_loops: int = 0  # neither known nor assumed: counted once

    def add(self, other: Counts, times: float = 1.0) -> None:
        """Add what something else does, so many times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.cycles += times * other.cycles
        self.kernels += times * other.kernels
        self.unknown_loops += other.unknown_loops
        for kind, moved in other.collectives.items():
            self.move(kind, *(times * moved[name] for name in MEASURES))

    def move(self, kind: str, *numbers: float) -> None:
        """Add transfers of one kind: how many, and bytes over ICI and DCN."""
        into = self.collectives.setdefault(kind, dict.fromkeys(MEASURES, 0.0))
        for name, number in zip(MEASURES, numbers, strict=True):
            into[name] += number


@dataclass(frozen=True)
class Program:
    """Counts of a whole program, and of one turn of each loop that had to be assumed, in order."""

    total: Counts
    loops: list[tuple[int, Counts]]  # turns assumed, what one turn does


def analyse(
    text: str, assumed: Assumed | None = None, slice_devices: int = 0, num_experts: int = 0
) -> Program:
    """Count what a scheduled HLO module does.

    A collective's bytes are the larger of what goes in and what comes out on a device.

    Args:
      assumed: how often the loops run whose trip count is not in the HLO.
      slice_devices: devices of a slice; a collective of more than one slice's goes over DCN.
        0: there is one slice.
      num_experts: of a layer; a device with some of them is taken to run its share of the tokens.
    """
    computations, entry = hlo.parse(text)
    assumed = {key: list(n) for key, n in (assumed or {}).items()}
    walk = _Walk(computations, assumed, slice_devices, num_experts)
    return Program(walk.computation(entry), walk.loops)


class _Walk:
    """One walk over a module; loops that are assumed take their numbers one after the other."""

    def __init__(
        self,
        computations: dict[str, list[Instruction]],
        assumed: dict[str, list[int]],
        slice_devices: int,
        num_experts: int,
    ) -> None:
        self.computations, self.assumed = computations, assumed
        self.slice_devices, self.num_experts = slice_devices, num_experts
        self.loops: list[tuple[int, Counts]] = []

    def computation(self, name: str) -> Counts:
        """Count one run of a computation that is executed instruction by instruction."""
        counts, here = Counts(), self.computations[name]
        shapes = {instruction.name: instruction.shapes for instruction in here}
        for instruction in here:
            counts.cycles += hlo.cycles(instruction)
            self._control(counts, here, instruction)
            counts.add(self._work(instruction, shapes))
            counts.bytes += _traffic(self.computations, instruction, shapes)
        return counts

    def _control(self, counts: Counts, here: list[Instruction], instruction: Instruction) -> None:
        """Add what a loop, branch or call runs; of branches the one that does most."""
        if instruction.opcode == "while":
            condition, body = (hlo.called(instruction, key)[0] for key in ("condition", "body"))
            known = hlo.known_turns(instruction, self.computations[condition], here)
            turns = self._assume(instruction) if known is None else known
            one = self.computation(body)
            one.add(self.computation(condition))
            counts.add(one, 1 if turns is None else turns)
            counts.unknown_loops += turns is None
            if known is None and turns is not None:
                self.loops.append((turns, one))
        elif instruction.opcode == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            names = [name for key in keys for name in hlo.called(instruction, key)]
            branches = [self.computation(name) for name in names]
            counts.add(max(branches, key=lambda branch: (branch.flops, branch.bytes)))
        elif instruction.opcode in ("call", "async-start"):
            for name in hlo.called(instruction, "to_apply") or hlo.called(instruction, "calls"):
                counts.add(self.computation(name))

    def _assume(self, instruction: Instruction) -> int | None:
        for ending, numbers in self.assumed.items():
            if hlo.op_name(instruction).endswith(ending):
                return numbers.pop(0) if len(numbers) > 1 else numbers[0]
        return None

    def _work(self, instruction: Instruction, shapes: Mapping[str, Sequence[Shape]]) -> Counts:
        """Count matrix products, collectives and kernels of one instruction."""
        counts, opcode = Counts(), instruction.opcode
        kind = opcode.removesuffix("-start")
        if opcode == "fusion":
            counts.add(self._fusion(hlo.called(instruction, "calls")[0]))
        elif opcode == "dot":
            counts.flops += _dot_flops(instruction, shapes)
        elif opcode == "convolution":
            counts.flops += _convolution_flops(instruction, shapes)
        elif kind in COLLECTIVES:
            _collective(counts, kind, instruction, shapes, self.slice_devices)
        elif opcode == "send" and "is_host_transfer=true" in instruction.rest:
            transfer = re.search(r'megascale_transfer_type="(\w+)"', instruction.rest)
            name = transfer[1].lower().replace("_", "-") if transfer else "send"
            counts.move(name, 1, 0, instruction.shapes[0].num_bytes)
        elif opcode == "custom-call" and '"tpu_custom_call"' in instruction.rest:
            counts.kernels += 1
            if GROUPED.search(instruction.name):
                counts.flops += _grouped_flops(instruction, shapes, self.num_experts)
        return counts

    def _fusion(self, name: str) -> Counts:
        """Count the products and collectives inside a fusion.

        A collective that runs beside computation stands in several fusions, and counts in the one
        that starts it. A fused all-reduce of which each device keeps a share is a reduce-scatter.
        """
        counts, here = Counts(), self.computations[name]
        shapes = {instruction.name: instruction.shapes for instruction in here}
        is_start = any('"AsyncCollectiveStart"' in instruction.rest for instruction in here)
        is_share = name.startswith("all-reduce-scatter")
        for instruction in here:
            work = self._work(instruction, shapes)
            if instruction.opcode in COLLECTIVES and not (is_start or is_share):
                work.collectives = {}
            if is_share and "all-reduce" in work.collectives:
                work.collectives = {"reduce-scatter": work.collectives["all-reduce"]}
            counts.add(work)
        return counts


# --- Memory traffic ---


def _traffic(
    computations: Mapping[str, list[Instruction]],
    instruction: Instruction,
    shapes: Mapping[str, Sequence[Shape]],
) -> float:
    """Return the bytes that one instruction reads from HBM and writes to it."""
    opcode, results = instruction.opcode, instruction.shapes
    operands = [shapes.get(name, ()) for name in instruction.operands]
    is_free_call = any(name in instruction.rest for name in FREE_CALLS)
    if opcode in FREE or opcode.endswith("-done") or is_free_call:
        return 0.0
    if opcode == "fusion":
        inside = computations[hlo.called(instruction, "calls")[0]]
        reads = (
            min(hlo.hbm_bytes(shape), _read(computations, inside, i))
            for i, shape in enumerate(operands)
            if hlo.hbm_bytes(shape)
        )
        return sum(reads) + _written(inside, results)
    if opcode == "copy-start":  # the result holds both ends
        return hlo.hbm_bytes(results[:2])
    if opcode == "slice-start" or opcode in SLICES:
        part = results[1] if opcode == "slice-start" else results[0]
        return part.num_bytes * ((hlo.hbm_bytes(operands[0]) > 0) + part.is_hbm)
    if opcode in ("dynamic-update-slice", "scatter"):
        part = operands[1 if opcode == "dynamic-update-slice" else -1]
        into = sum(shape.num_bytes for shape in part) if hlo.hbm_bytes(results) else 0
        return hlo.hbm_bytes(part) + into
    if opcode.endswith("-start"):  # the operands stand in the result, too
        return hlo.hbm_bytes(results)
    return sum(map(hlo.hbm_bytes, operands)) + hlo.hbm_bytes(results)


def _read(
    computations: Mapping[str, list[Instruction]], inside: list[Instruction], number: int
) -> float:
    """Return how much of its operand a fusion reads: of a sliced one the slices."""
    total = 0.0
    names = [i.name for i in inside if i.opcode == "parameter" and i.text == str(number)]
    while names:
        name = names.pop()
        for user in inside:
            if name not in user.operands:
                continue
            is_first = user.operands[0] == name
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in SLICES and is_first:
                total += sum(shape.num_bytes for shape in user.shapes)
            elif user.opcode == "fusion":
                called = computations[hlo.called(user, "calls")[0]]
                places = [i for i, operand in enumerate(user.operands) if operand == name]
                total += sum(_read(computations, called, i) for i in places)
            elif not (user.opcode == "dynamic-update-slice" and is_first):  # written in place
                return math.inf
    return total


def _written(inside: list[Instruction], results: Sequence[Shape]) -> float:
    """Return what a fusion writes: of an array updated in place, the update."""
    by_name = {instruction.name: instruction for instruction in inside}
    root = next(instruction for instruction in inside if instruction.is_root)
    parts = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(results):
        return hlo.hbm_bytes(results)
    total = 0.0
    for part, result in zip(parts, results, strict=True):
        while part.opcode == "bitcast" and part.operands[0] in by_name:
            part = by_name[part.operands[0]]
        written = result.num_bytes
        if part.opcode == "dynamic-update-slice":
            written = sum(shape.num_bytes for shape in by_name[part.operands[1]].shapes)
        total += written if result.is_hbm else 0.0
    return total


# --- Products and collectives ---


def _dot_flops(instruction: Instruction, shapes: Mapping[str, Sequence[Shape]]) -> float:
    left = shapes[instruction.operands[0]][0].dims
    listed = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.rest)
    contracted = [int(n) for n in listed[1].split(",") if n] if listed else []
    return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(left[n] for n in contracted)


def _grouped_flops(
    instruction: Instruction, shapes: Mapping[str, Sequence[Shape]], num_experts: int
) -> float:
    """Return the FLOPs of rows times the matrix of their expert, or of a gradient of such.

    The last two operands are rows `[n, inputs]` and matrices `[E, inputs, outputs]`; or, where the
    result is the gradient of matrices, rows and gradients of their outputs.
    """
    left, right = (shapes[name][0].dims for name in instruction.operands[-2:])
    out = instruction.shapes[0].dims
    num_own = out[0] if len(out) == 3 else right[0]
    per_row = math.prod(out[1:] if len(out) == 3 else right[1:])
    num_rows = math.prod(left) // out[1] if len(out) == 3 else out[0]
    return 2.0 * num_rows * per_row * (num_own / num_experts if num_experts else 1)


def _convolution_flops(instruction: Instruction, shapes: Mapping[str, Sequence[Shape]]) -> float:
    """Return the FLOPs of a convolution, the form that matrix products take on TPUs.

    A batch of products is one along a dilated dimension, in which most pairs meet holes.
    """
    labelled = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labelled, instruction.rest
    left, right = (shapes[name][0].dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    flops = (
        2.0
        * out[labelled[3].index("b")]
        * out[labelled[3].index("f")]
        * right[labelled[2].index("i")]
    )
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    settings = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    arrays = list(zip((left, right, out), labelled.groups(), strict=True))
    for place, label in enumerate(sorted(label for label in labelled[1] if label.isdigit())):
        sizes = [dims[labels.index(label)] for dims, labels in arrays]
        flops *= _pairs(sizes[0], sizes[1], sizes[2], settings, place)
    return flops


def _pairs(left: int, right: int, out: int, settings: Mapping[str, str], place: int) -> int:
    """Return how many pairs of an output and a window position meet an input along one axis."""

    def setting(name: str, default: str) -> str:
        values = settings.get(name, "").split("x")
        return values[place] if len(values) > place and values[place] else default

    stride, spread = int(setting("stride", "1")), int(setting("lhs_dilate", "1"))
    step, low = int(setting("rhs_dilate", "1")), int(setting("pad", "0_0").split("_")[0])
    last = (left - 1) * spread
    places = (i * stride + j * step - low for i, j in itertools.product(range(out), range(right)))
    return sum(0 <= position <= last and position % spread == 0 for position in places)


def _collective(
    counts: Counts,
    kind: str,
    instruction: Instruction,
    shapes: Mapping[str, Sequence[Shape]],
    slice_devices: int,
) -> None:
    goes_in = sum(s.num_bytes for name in instruction.operands for s in shapes.get(name, ()))
    comes_out = sum(shape.num_bytes for shape in instruction.shapes)
    if instruction.opcode != kind:  # a start's result holds its operands as well
        comes_out -= goes_in
    moved = max(goes_in, comes_out)
    is_dcn = slice_devices > 0 and any(
        len({device // slice_devices for device in group}) > 1
        for group in hlo.replica_groups(instruction.rest)
    )
    counts.move(kind, 1, *((0, moved) if is_dcn else (moved, 0)))
