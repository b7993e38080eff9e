"""Packed rows: groups fill rows of one length, and each prompt is computed once.

A group is a prompt and its completions, which see the prompt but not each other. A row holds all
prompts of its groups first, then all completions. A group that is longer than a row is cut: each of
its rows holds some of the completions, and the prompt again. One device runs one row at a time, so
an optimiser step is a number of *passes*, each over one row per device. The number of passes is
data, not shape:

    A passes   B rows of a pass, one per device   T slots of a row   C targets of a row (= T)

The length of the rows comes from a closed set: the one that wastes least on the batch at hand. Each
length is compiled once. The last token of a completion predicts nothing, so it gets no slot.
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

# The least ratio between a row length and the one below, and the least row as a share of the
# longest. Each length is one more program to compile, and fewer lengths leave more slots empty: on
# lengths of real pairs, 1.08 keeps the empty ones below a tenth, and 1.12 does not.
GROWTH = 1.08
SHORTEST = 8
# Slots of the longest row unless the config sets them. Of 7B compiled for v5e, rows of 17,408 slots
# leave its fast memory (128 MiB), and a fused product falls from 59 to 40 % of peak by the
# compiler's estimate; 3 to 6 thousand slots fit. A CPU's caches are smaller.
AUTO_TOKENS = {"cpu": 1536}
TPU_TOKENS = 6144


class Group(NamedTuple):
    """A prompt and its completions, as token ids."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]


class Rows(NamedTuple):
    """Packed rows as the programs take them.

    A is 1 or the most passes there can be, so each length has two shapes at most.
    """

    tokens: Int[Array, "A B T"]
    positions: Int[Array, "A B T"]  # within prompt + completion
    packing: Packing  # arrays [A, B, T] and [A, B]
    sources: Int[Array, "A B C"]  # slot whose hidden state predicts the target
    targets: Int[Array, "A B C"]
    sequence: Int[Array, "A B C"]  # number of the target's completion within its row
    count: Int[Array, " A"]  # targets in the fullest row of the pass
    num_passes: Int[Array, ""]


@dataclass(frozen=True)
class Packed:
    """Rows on the host, and where each target came from."""

    rows: Rows
    completion: Int[np.ndarray, "A B C"]  # its number over all groups; -1: no target here
    offset: Int[np.ndarray, "A B C"]  # place of the target in its completion
    num_tokens: int  # slots in use

    @property
    def is_target(self) -> np.ndarray:
        """The loss mask, `[A, B, C]`: where there is a target."""
        return self.completion >= 0

    @property
    def metrics(self) -> dict[str, float]:
        """The number of passes, the slots of a row, and the share of slots that are empty."""
        _, num_rows, num_slots = self.rows.tokens.shape
        num_passes = int(self.rows.num_passes)
        padding = 1 - self.num_tokens / (num_passes * num_rows * num_slots)
        return {"perf/passes": num_passes, "perf/row_tokens": num_slots, "perf/padding": padding}

    def take(self, values: np.ndarray) -> Any:
        """Lay out values `[completions, T]` or `[completions]` as `[A, B, C]`, 0 elsewhere."""
        where = (self.completion, self.offset)[: values.ndim]
        # Cells without a target have index -1, so they take the last completion's value: masked.
        taken = values[where]
        return np.where(self.is_target, taken, np.zeros((), values.dtype))


def row_sizes(
    longest_prompt: int,
    longest_completion: int,
    most_tokens: int,
    pack_tokens: int = 0,
    platform: str = "tpu",
) -> list[int]:
    """Return the closed set of row lengths, ascending.

    Args:
      longest_prompt, longest_completion: in tokens; the longest row has room for both together.
      most_tokens: most tokens of a batch on one device; longer rows would never be full.
      pack_tokens: wanted length of the longest row; 0 chooses for `platform`.
    """
    # In a row completions begin at a multiple of `prefix_align`, which may move them up.
    aligned = _round_up(longest_prompt, _coarsest(longest_prompt + longest_completion))
    wanted = pack_tokens or min(most_tokens, AUTO_TOKENS.get(platform, TPU_TOKENS))
    size = _round_up(max(aligned + longest_completion, wanted), BLOCK)
    sizes, least = [size], max(size // SHORTEST, BLOCK)
    while size > least:
        smaller = int(size / GROWTH)
        size = max(smaller - smaller % BLOCK, BLOCK)
        sizes.append(size)
    return sizes[::-1]


def pack(
    groups: Sequence[Group],
    sizes: Sequence[int],
    num_rows: int,
    unit: int = 1,
    *,
    is_whole: bool = False,
) -> Packed:
    """Pack groups into passes of `num_rows` rows, of the size that computes the fewest slots.

    Args:
      unit: each segment begins at a multiple of so many slots.
      is_whole: no group is cut: a loss compares its completions within a row.

    Raises:
      ValueError: a completion with its prompt (a group, if it must be whole) is longer than every
        size.
    """
    best: tuple[int, int, list[list[_Piece]]] | None = None
    for size in sizes:
        bins = _first_fit(_pieces(groups, size, unit, is_whole), size)
        if bins is None:
            continue
        # A pass costs the same however few of its rows are in use.
        num_passes = -(-len(bins) // num_rows)
        if num_passes > 1 and not may_repeat(size, sizes):
            continue
        num_slots = num_passes * size
        if best is None or num_slots <= best[0]:  # equal: the longer, which takes fewer passes
            best = num_slots, size, bins
    if best is None:
        what = "group" if is_whole else "completion with its prompt"
        raise ValueError(f"A {what} is longer than {max(sizes)} slots.")
    _, size, bins = best
    num_completions = sum(len(group.completions) for group in groups)
    most = most_passes(num_completions, num_rows) if may_repeat(size, sizes) else 1
    return _lay_out(bins, size, num_rows, most, unit)


def may_repeat(size: int, sizes: Sequence[int]) -> bool:
    """Return whether rows of this length come in several passes: two shorter ones make one row."""
    return 2 * size > max(sizes)


def shapes(sizes: Sequence[int], num_completions: int, num_rows: int) -> list[tuple[int, int]]:
    """Return every (A, T) that `pack` may give to so many completions, the largest first."""
    most = most_passes(num_completions, num_rows)
    return [(most if may_repeat(size, sizes) else 1, size) for size in reversed(sizes)]


def most_passes(num_completions: int, num_rows: int) -> int:
    """Return the most passes there can be: no row is without a completion."""
    return -(-num_completions // num_rows)


def in_shape(arguments: tuple[Any, ...], num_passes: int, size: int) -> tuple[Any, ...]:
    """Return abstract arguments with rows of another (A, T); the first, weights, stays."""

    def shaped(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (num_passes, *x.shape[1:2], *[size] * (x.ndim - 2))[: x.ndim]
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    return arguments[0], *jax.tree.map(shaped, arguments[1:])


def to_devices(layout: Layout, tree: Any) -> Any:
    """Spread arrays `[A, B, ...]` over the devices by row; replicate those of fewer dimensions."""
    return jax.tree.map(lambda x: global_array(x, spread(layout, x.ndim)), tree)


def spread(layout: Layout, num_dimensions: int) -> NamedSharding:
    """Return the sharding of an array `[A, B, ...]`: by row, or replicated below two dimensions."""
    if num_dimensions < 2:
        return layout.replicated()
    return layout.activation(" ".join(["-", "B", *["-"] * (num_dimensions - 2)]))


class _Piece(NamedTuple):
    """A group, or as much of it as fits one row."""

    prompt: Sequence[int]
    completions: list[tuple[int, Sequence[int]]]  # (number over all groups, ids)
    prompt_slots: int
    num_slots: int  # of its completions
    num_targets: int


class _Room(NamedTuple):
    """How full a row is: slots of prompts, slots of completions, and targets."""

    prompts: int = 0
    slots: int = 0
    targets: int = 0

    def with_(self, prompt: int, slots: int, targets: int) -> _Room:
        return _Room(self.prompts + prompt, self.slots + slots, self.targets + targets)

    def fits(self, size: int) -> bool:
        prompts = _round_up(self.prompts, prefix_align(size))
        # Targets count too: a completion has one target more than slots, and arrays C = T cells.
        return max(prompts + self.slots, self.targets) <= size


def _pieces(groups: Sequence[Group], size: int, unit: int, is_whole: bool) -> list[_Piece]:
    """Cut groups so that each piece fits a row, unless a single completion is too long for it."""
    pieces: list[_Piece] = []
    number = 0
    for group in groups:
        completions: list[tuple[int, Sequence[int]]] = []
        room = empty = _Room(_round_up(len(group.prompt), unit))
        for ids in group.completions:
            # The last token needs no slot: nothing is predicted from it.
            needs = 0, _round_up(len(ids) - 1, unit), len(ids)
            grown = room.with_(*needs)
            if completions and not (is_whole or grown.fits(size)):
                pieces.append(_Piece(group.prompt, completions, *room))
                completions, grown = [], empty.with_(*needs)
            completions.append((number, ids))
            room = grown
            number += 1
        pieces.append(_Piece(group.prompt, completions, *room))
    return pieces


def _first_fit(pieces: list[_Piece], size: int) -> list[list[_Piece]] | None:
    """Put each piece, longest first, into the first row with room; None: one is too long."""
    bins: list[list[_Piece]] = []
    rooms: list[_Room] = []
    for piece in sorted(pieces, key=lambda p: -(p.prompt_slots + p.num_slots)):
        needs = piece.prompt_slots, piece.num_slots, piece.num_targets
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


def _lay_out(
    bins: list[list[_Piece]], size: int, num_rows: int, most_passes: int, unit: int
) -> Packed:
    """Write the rows of all passes into arrays."""
    num_passes = -(-len(bins) // num_rows)
    # Any number of passes shares one shape, so that each length of rows is one program.
    shape = (most_passes, num_rows, size)
    names = "tokens", "positions", "group", "start", "sources", "targets", "sequence", "offset"
    cells = {name: np.zeros(shape, np.int32) for name in names}
    completion = np.full(shape, -1, np.int32)
    prefix = np.zeros(shape[:2], np.int32)
    count = np.zeros(shape[:1], np.int32)
    num_tokens = 0
    for place, row in enumerate(bins):
        at = divmod(place, num_rows)
        here = {name: array[at] for name, array in cells.items()}
        prefix[at], used, num_targets = _fill(row, here, completion[at], unit)
        # The devices of a pass run the same number of chunks of targets: that of the fullest row.
        count[at[0]] = max(count[at[0]], num_targets)
        num_tokens += used
    # `_make`, since these are NumPy arrays until `to_devices`.
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
    row: list[_Piece], cells: dict[str, np.ndarray], completion: np.ndarray, unit: int
) -> tuple[int, int, int]:
    """Write one row in place; return its prefix, slots in use, and targets."""
    slot = num_used = 0
    last_slots = []
    for number, piece in enumerate(row, 1):  # group 0 is padding
        _segment(cells, slot, piece.prompt, number, 0)
        last_slots.append(slot + len(piece.prompt) - 1)
        num_used += len(piece.prompt)
        slot += piece.prompt_slots
    # The gap stays padding: Splash's mask has too few bits for an exact prefix (`prefix_align`).
    slot = prefix = _round_up(slot, prefix_align(len(completion)))
    target = sequence = 0
    for number, (piece, last) in enumerate(zip(row, last_slots, strict=True), 1):
        for index, ids in piece.completions:
            # Positions go on from the prompt, as if the completion stood right behind it.
            _segment(cells, slot, ids[:-1], number, len(piece.prompt))
            here = slice(target, target + len(ids))
            cells["targets"][here] = ids
            # The first token is predicted from the prompt's last slot, which completions share.
            cells["sources"][here] = [last, *range(slot, slot + len(ids) - 1)]
            cells["sequence"][here] = sequence
            cells["offset"][here] = range(len(ids))
            completion[here] = index
            slot += _round_up(len(ids) - 1, unit)
            num_used += len(ids) - 1
            target += len(ids)
            sequence += 1
    return prefix, num_used, target


def _segment(
    cells: dict[str, np.ndarray], slot: int, ids: Sequence[int], group: int, position: int
) -> None:
    """Write a prompt or a completion from `slot` on."""
    here = slice(slot, slot + len(ids))
    cells["tokens"][here] = ids
    cells["positions"][here] = range(position, position + len(ids))
    cells["group"][here] = group
    cells["start"][here] = slot  # a token sees keys from here on, and its prompt


def _coarsest(num_slots: int) -> int:
    """Return the alignment of prompts in a row that has just room for `num_slots`."""
    return prefix_align(_round_up(num_slots, BLOCK))


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
