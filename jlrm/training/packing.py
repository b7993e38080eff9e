"""Rows of tokens without waste: groups packed into rows of one length, each prompt once.

A group is a prompt and completions that see it and not each other. A row holds whole groups (or, of
a group that is longer than a row, several completions and their prompt again): all prompts first,
then all completions. One device runs one row at a time, so an optimiser step is so many *passes* of
so many rows, and their number is data, not shape:

    A passes   B rows of a pass, one per device   T slots of a row   C targets of a row (= T)

A row's length comes from a closed set, whichever wastes least on the batch at hand; each length is
compiled once. The last token of a completion predicts nothing and gets no slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from jlrm.model.visibility import BLOCK, Packing, prefix_align
from jlrm.runtime.mesh import Layout, global_array

GROWTH = 1.08  # from one row length of the closed set to the next, at least
# A row that keeps a chip busy; longer ones leave its fast memory. A CPU's caches are smaller.
AUTO_TOKENS = {"cpu": 1536}


class Group(NamedTuple):
    """A prompt and its completions, as token ids."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]


class Rows(NamedTuple):
    """Packed rows as the programs take them; `A` is 1, or the most passes there can be."""

    tokens: Int[Array, "A B T"]
    positions: Int[Array, "A B T"]  # within prompt + completion
    packing: Packing  # arrays [A, B, T] and [A, B]
    sources: Int[Array, "A B C"]  # slot whose state predicts the target
    targets: Int[Array, "A B C"]
    sequence: Int[Array, "A B C"]  # number of the target's completion within its row
    count: Int[Array, " A"]  # targets of the fullest row of a pass
    num_passes: Int[Array, ""]


@dataclass(frozen=True)
class Packed:
    """Rows on the host, and where each target came from."""

    rows: Rows
    completion: Int[np.ndarray, "A B C"]  # its number, counted through all groups; -1: no target
    offset: Int[np.ndarray, "A B C"]  # which of its tokens
    num_tokens: int  # slots in use

    @property
    def is_target(self) -> np.ndarray:
        """Where there is a target: the loss mask, `[A, B, C]`."""
        return self.completion >= 0

    @property
    def metrics(self) -> dict[str, float]:
        """The shape of the work: passes, slots of a row, and the share of slots left empty."""
        _, num_rows, num_slots = self.rows.tokens.shape
        num_passes = int(self.rows.num_passes)
        padding = 1 - self.num_tokens / (num_passes * num_rows * num_slots)
        return {"perf/passes": num_passes, "perf/row_tokens": num_slots, "perf/padding": padding}

    def take(self, values: np.ndarray) -> Any:
        """Lay out values `[completions, T]` or `[completions]` as `[A, B, C]`, 0 elsewhere."""
        where = (self.completion, self.offset)[: values.ndim]
        found = values[where]
        return np.where(self.is_target, found, np.zeros((), values.dtype))


def row_sizes(
    longest_prompt: int,
    longest_completion: int,
    most_tokens: int,
    pack_tokens: int = 0,
    platform: str = "tpu",
) -> list[int]:
    """Return the closed set of row lengths, ascending.

    Args:
      longest_prompt, longest_completion: what the longest row must have room for, in tokens.
      most_tokens: of the longest batch of one device; longer rows would never be full.
      pack_tokens: wanted length of the longest row; 0 chooses for `platform`.
    """
    aligned = _round_up(longest_prompt, _coarsest(longest_prompt + longest_completion))
    wanted = pack_tokens or min(most_tokens, AUTO_TOKENS.get(platform, 6144))
    size = _round_up(max(aligned + longest_completion, wanted), BLOCK)
    sizes = [size]
    while size > BLOCK:
        smaller = int(size / GROWTH)
        size = max(smaller - smaller % BLOCK, BLOCK)
        sizes.append(size)
    return sizes[::-1]


def pack(groups: Sequence[Group], sizes: Sequence[int], num_rows: int) -> Packed:
    """Pack groups into passes of `num_rows` rows, of whichever size computes the fewest slots.

    Raises:
      ValueError: a completion with its prompt is longer than every size.
    """
    best: tuple[int, int, list[list[_Piece]]] | None = None
    for size in sizes:
        bins = _first_fit(_pieces(groups, size), size)
        if bins is None:
            continue
        num_slots = -(-len(bins) // num_rows) * size
        if best is None or num_slots <= best[0]:  # of equals the longer: fewer passes
            best = num_slots, size, bins
    if best is None:
        raise ValueError(f"A completion with its prompt is longer than {max(sizes)} slots.")
    _, size, bins = best
    num_completions = sum(len(group.completions) for group in groups)
    return _lay_out(bins, size, num_rows, -(-num_completions // num_rows))


def to_devices(layout: Layout, tree: Any) -> Any:
    """Spread arrays `[A, B, ...]` over the devices by row; those of fewer dimensions are whole."""
    return jax.tree.map(lambda x: global_array(x, spread(layout, x.ndim)), tree)


def spread(layout: Layout, num_dimensions: int) -> NamedSharding:
    """Return the sharding of `[A, B, ...]`, or of fewer dimensions: whole on every device."""
    if num_dimensions < 2:
        return layout.replicated()
    return layout.activation(" ".join(["-", "B", *["-"] * (num_dimensions - 2)]))


class _Piece(NamedTuple):
    """A group, or as much of it as one row takes."""

    prompt: Sequence[int]
    completions: list[tuple[int, Sequence[int]]]  # (number counted through all groups, ids)
    num_slots: int  # of its completions
    num_targets: int


class _Room(NamedTuple):
    """What a row holds so far: slots of prompts and of completions, and targets."""

    prompts: int = 0
    slots: int = 0
    targets: int = 0

    def with_(self, prompt: int, slots: int, targets: int) -> _Room:
        return _Room(self.prompts + prompt, self.slots + slots, self.targets + targets)

    def fits(self, size: int) -> bool:
        prompts = _round_up(self.prompts, prefix_align(size))
        return max(prompts + self.slots, self.targets) <= size


def _pieces(groups: Sequence[Group], size: int) -> list[_Piece]:
    """Cut groups so that each piece fits a row by itself, if it can."""
    pieces: list[_Piece] = []
    number = 0
    for group in groups:
        completions: list[tuple[int, Sequence[int]]] = []
        room = empty = _Room(len(group.prompt))
        for ids in group.completions:
            grown = room.with_(0, len(ids) - 1, len(ids))
            if completions and not grown.fits(size):
                pieces.append(_Piece(group.prompt, completions, room.slots, room.targets))
                completions, grown = [], empty.with_(0, len(ids) - 1, len(ids))
            completions.append((number, ids))
            room = grown
            number += 1
        pieces.append(_Piece(group.prompt, completions, room.slots, room.targets))
    return pieces


def _first_fit(pieces: list[_Piece], size: int) -> list[list[_Piece]] | None:
    """Put each piece, longest first, into the first row with room; None: one fits nowhere."""
    bins: list[list[_Piece]] = []
    rooms: list[_Room] = []
    for piece in sorted(pieces, key=lambda p: -(len(p.prompt) + p.num_slots)):
        needs = len(piece.prompt), piece.num_slots, piece.num_targets
        for i, room in enumerate(rooms):
            if room.with_(*needs).fits(size):
                bins[i].append(piece)
                rooms[i] = room.with_(*needs)
                break
        else:
            if not _Room(*needs).fits(size):
                return None
            bins.append([piece])
            rooms.append(_Room(*needs))
    return bins


def _lay_out(bins: list[list[_Piece]], size: int, num_rows: int, most_passes: int) -> Packed:
    num_passes = -(-len(bins) // num_rows)
    shape = (1 if num_passes == 1 else most_passes, num_rows, size)
    names = "tokens", "positions", "group", "start", "sources", "targets", "sequence", "offset"
    cells = {name: np.zeros(shape, np.int32) for name in names}
    completion = np.full(shape, -1, np.int32)
    prefix = np.zeros(shape[:2], np.int32)
    count = np.zeros(shape[:1], np.int32)
    num_tokens = 0
    for place, row in enumerate(bins):
        at = divmod(place, num_rows)
        here = {name: array[at] for name, array in cells.items()}
        prefix[at], used, num_targets = _fill(row, here, completion[at])
        count[at[0]] = max(count[at[0]], num_targets)
        num_tokens += used
    rows = Rows._make(
        (
            cells["tokens"],
            cells["positions"],
            Packing._make((cells["group"], cells["start"], prefix)),
            cells["sources"],
            cells["targets"],
            cells["sequence"],
            count,
            np.array(num_passes, np.int32),
        )
    )
    return Packed(rows, completion, cells["offset"], num_tokens)


def _fill(
    row: list[_Piece], cells: dict[str, np.ndarray], completion: np.ndarray
) -> tuple[int, int, int]:
    """Write one row in place; return its prefix, slots in use, and targets."""
    slot = 0
    last_slots = []
    for number, piece in enumerate(row, 1):
        _segment(cells, slot, piece.prompt, number, 0)
        slot += len(piece.prompt)
        last_slots.append(slot - 1)
    num_used = slot
    slot = prefix = _round_up(slot, prefix_align(len(completion)))
    target = sequence = 0
    for number, (piece, last) in enumerate(zip(row, last_slots, strict=True), 1):
        for index, ids in piece.completions:
            _segment(cells, slot, ids[:-1], number, len(piece.prompt))
            here = slice(target, target + len(ids))
            cells["targets"][here] = ids
            cells["sources"][here] = [last, *range(slot, slot + len(ids) - 1)]
            cells["sequence"][here] = sequence
            cells["offset"][here] = range(len(ids))
            completion[here] = index
            slot += len(ids) - 1
            num_used += len(ids) - 1
            target += len(ids)
            sequence += 1
    return prefix, num_used, target


def _segment(
    cells: dict[str, np.ndarray], slot: int, ids: Sequence[int], group: int, position: int
) -> None:
    here = slice(slot, slot + len(ids))
    cells["tokens"][here] = ids
    cells["positions"][here] = range(position, position + len(ids))
    cells["group"][here] = group
    cells["start"][here] = slot


def _coarsest(num_slots: int) -> int:
    return prefix_align(_round_up(num_slots, BLOCK))


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
