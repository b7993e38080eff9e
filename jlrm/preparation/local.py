"""The engine of one machine: rows go through a file, and memory holds their keys.

Of a row that is 46 bytes, and as many again while they are sorted. Rows themselves are read once
from their sources, and twice or three times from the file, `rows` in the directory that is built.
A .json file that holds one list is read whole by its reader.
"""

from __future__ import annotations

import array
import itertools
import pathlib
import pickle
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from jaxtyping import Bool, Int, UInt64
from tqdm import tqdm

from jlrm.data import readers
from jlrm.data.batches import ENCODE_ROWS
from jlrm.data.comparisons import Comparison, Dropped, dropped_line
from jlrm.data.contamination import warn_of_benchmark
from jlrm.data.dataset import Shard, num_characters, write_split
from jlrm.preparation.curation import (
    EXAMPLES,
    OPPOSITE,
    Counts,
    Differing,
    Prepared,
    check_any,
    check_heldout,
    facts,
    in_both_orders,
    keys,
    num_heldout,
)
from jlrm.preparation.recipe import Checks, Recipe, fingerprint, is_local, stored_rows

Places = Int[np.ndarray, " n"]  # of rows among all that were read
LABELS = (0, 1, 2)
# By the sum of 1 << label over the rows of a pair.
IS_DIFFERING = np.array([bits.bit_count() > 1 for bits in range(8)])
IS_OPPOSITE = np.array([all(bits >> label & 1 for label in OPPOSITE) for bits in range(8)])


class Spool:
    """Rows in a file, those that are left out too: written once, then read any number of times."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._num = file, 0

    def append(self, row: Comparison | Dropped) -> None:
        """Add a row."""
        pickle.dump(row, self._file, pickle.HIGHEST_PROTOCOL)
        self._num += 1

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Comparison | Dropped]:
        self._file.seek(0)
        for _ in range(self._num):
            yield pickle.load(self._file)


class KeyTable:
    """The keys of all rows that were read, in their order; zeros for those that were left out."""

    def __init__(self) -> None:
        self._hashes = bytearray()
        self._questions, self._characters = array.array("Q"), array.array("I")
        self._labels = bytearray()
        self._is_kept = bytearray()

    def append(self, row: Comparison | Dropped) -> None:
        """Add the keys of a row."""
        is_row = isinstance(row, Comparison)
        said, pair, label, question = keys(row) if is_row else (bytes(16), bytes(16), 0, 0)
        self._hashes += said + pair
        self._labels.append(label)
        self._questions.append(question)
        self._characters.append(num_characters(row) if is_row else 0)
        self._is_kept.append(is_row)

    def finish(self) -> None:
        """Turn into arrays what has been added."""
        hashes = np.frombuffer(self._hashes, np.uint64).reshape(-1, 2, 2)
        self.said, self.pair = hashes[:, 0], hashes[:, 1]  # "N 2"
        self.question = np.frombuffer(self._questions, np.uint64)
        self.characters = np.frombuffer(self._characters, np.uint32)
        self.label = np.frombuffer(self._labels, np.uint8)
        self.is_kept = np.frombuffer(self._is_kept, bool)


def run(recipe: Recipe, checks: Checks, directory: pathlib.Path) -> Prepared:
    """Write the splits of a recipe and the rows that it drops into a directory.

    Raises:
      UsageError: an input that can't be used, or one that leaves nothing.
      OSError: the file system refuses.
    """
    path = directory / "rows"
    with open(path, "w+b") as file:
        path.unlink()  # gone however this ends
        spool, table = Spool(file), KeyTable()
        fingerprints = _read(recipe, spool, table)
        table.finish()
        counts: Counts = Counts()
        with open(directory / "dropped.jsonl", "w", encoding="utf-8") as lines:
            for row in _drop(spool, table, checks, counts):
                lines.write(dropped_line(row))
        check_any(counts)
        kept = np.flatnonzero(table.is_kept)
        num_pairs, num_opposite, examples = _differing(table, kept)
        wanted = set(itertools.chain.from_iterable(examples))
        shards, found = _write(recipe, spool, table, directory, counts, wanted)
    rows = [[found[place] for place in places] for places in examples]
    return Prepared(counts, shards, Differing(num_pairs, num_opposite, rows), fingerprints)


def _read(recipe: Recipe, spool: Spool, table: KeyTable) -> dict[str, int]:
    """Read every input; return the fingerprints of those that are not local."""
    fingerprints: dict[str, int] = {}
    for source in recipe.input:
        warn_of_benchmark(source)
        seen, is_remote = recipe.nothing_seen(), not is_local(source)
        for row in readers.with_progress(stored_rows(recipe, source, seen), source):
            spool.append(row)
            table.append(row)
            if is_remote and isinstance(row, Comparison):
                fingerprints[source] = fingerprints.get(source, 0) + fingerprint(row)
        readers.check_whole(source, [seen])
    return fingerprints


def _drop(spool: Spool, table: KeyTable, checks: Checks, counts: Counts) -> Iterator[Dropped]:
    """Yield the rows that are left out, in their order, and count them and the others."""
    is_again = np.zeros(len(spool), bool)
    order, starts = _equal(table.said, np.flatnonzero(table.is_kept))
    is_again[order] = True
    is_again[order[starts]] = False
    rows = zip(itertools.count(), spool, is_again, strict=False)
    bar = iter(tqdm(rows, total=len(spool), desc="check", delay=1, disable=checks.is_idle))
    while batch := list(itertools.islice(bar, ENCODE_ROWS)):
        clean = [row for _, row, again in batch if isinstance(row, Comparison) and not again]
        checked = iter(checks(clean))
        for place, row, again in batch:
            if isinstance(row, Comparison):
                what = None if again else next(checked)
                reason = "duplicate" if what is None else what.reason
                if what is not None and not reason:
                    counts["kept", "tokens", what.num_tokens] += 1
                    continue
                table.is_kept[place] = False
                if what is not None and what.benchmark:
                    counts["dropped", "benchmark", what.benchmark] += 1
                row = Dropped.of(row, reason)
            counts["dropped", "reason", row.reason] += 1
            yield row


def _equal(
    hashes: UInt64[np.ndarray, "N 2"], places: Places
) -> tuple[Places, Int[np.ndarray, " groups"]]:
    """Return places with those of equal hashes together, in their order, and where each begins."""
    order = places[np.lexsort((hashes[places, 1], hashes[places, 0]))]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
    return order, np.flatnonzero(is_first)


def _differing(table: KeyTable, kept: Places) -> tuple[int, int, list[list[int]]]:
    """Count pairs of differing labels, and opposite ones; of some, the first row of each label."""
    order, starts = _equal(table.pair, kept)
    bits = np.bitwise_or.reduceat(np.left_shift(1, table.label[order]), starts)
    chosen = np.flatnonzero(IS_DIFFERING[bits])
    by_kind = np.lexsort((order[starts[chosen]], ~IS_OPPOSITE[bits[chosen]]))
    ends, examples = np.append(starts[1:], len(order)), []
    for group in chosen[by_kind[:EXAMPLES]]:
        places = order[starts[group] : ends[group]].tolist()
        first = {int(table.label[place]): place for place in reversed(places)}
        examples.append(sorted(first.values()))
    return len(chosen), int(IS_OPPOSITE[bits].sum()), examples


def _write(
    recipe: Recipe,
    spool: Spool,
    table: KeyTable,
    directory: pathlib.Path,
    counts: Counts,
    wanted: set[int],
) -> tuple[dict[str, list[Shard]], dict[int, Comparison]]:
    """Write the splits and count what they hold; return the rows of some places too."""
    questions = np.unique(table.question[table.is_kept])
    check_heldout(len(questions), recipe.validation)
    num = num_heldout(len(questions), recipe.validation)
    is_heldout = np.zeros(len(spool), bool)
    if num:
        is_heldout = table.question <= questions[num - 1]
    shards: dict[str, list[Shard]] = {}
    found: dict[int, Comparison] = {}
    for split in recipe.splits():
        is_mine = table.is_kept & (is_heldout == (split == "validation"))
        is_twice = recipe.swap and split == "train"

        def rows(is_mine: Bool[np.ndarray, " N"] = is_mine, is_twice: bool = is_twice, split=split):
            for place, row in itertools.compress(enumerate(spool), is_mine):
                assert isinstance(row, Comparison)
                if place in wanted:
                    found[place] = row
                for each in in_both_orders(row) if is_twice else (row,):
                    counts.update(facts(split, each))
                    yield each

        times = 2 if is_twice else 1
        num_rows, characters = (
            times * int(total) for total in (is_mine.sum(), table.characters[is_mine].sum())
        )
        shards[split] = write_split(directory, split, rows(), num_rows, characters)
    return shards, found
