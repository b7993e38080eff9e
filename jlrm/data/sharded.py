"""Comparisons that are shared out over processes: no host reads or keeps all of them.

Row n goes to process n mod N as it is read. To decide alike, all processes need a few numbers about
every row (a key of its question, its length). These are exchanged once. A row itself is sent to the
others when a batch needs it. A single process holds all rows, and uses the same functions.

Left out: reading (readers.py), prompts and batches (batches.py).
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt64

from jlrm.data import readers
from jlrm.data.comparisons import Comparison, Dropped, question_key
from jlrm.runtime import hosts

Made = TypeVar("Made")
Places = Sequence[int] | Int[np.ndarray, " n"]


@dataclass(frozen=True)
class ShardedRows:
    """Rows in an order that all processes know, each in the memory of one of them.

    What is told to all (`table`, `collect`) is asked for by all processes, in the same order.
    """

    mine: list[Comparison]  # of this process, in order
    owners: Int[np.ndarray, " N"]  # the process that has each row

    def __len__(self) -> int:
        return len(self.owners)

    def table(self, what: str, mine: Shaped[np.ndarray, "M *D"]) -> Shaped[np.ndarray, "N *D"]:
        """Return numbers of every row, each process bringing those of its own M rows, in order."""
        whole = np.empty((len(self), *mine.shape[1:]), mine.dtype)
        for process, part in enumerate(hosts.gather(what, mine)):
            whole[self.owners == process] = part
        return whole

    def flags(self, what: str, is_so: Callable[[Comparison], bool]) -> Bool[np.ndarray, " N"]:
        """Return for every row whether it is so."""
        return self.table(what, np.fromiter(map(is_so, self.mine), bool, len(self.mine)))

    def questions(self, folding: str) -> UInt64[np.ndarray, " N"]:
        """Return the key of every row's question, by the folding of that name."""
        keys = (question_key(row.question, folding) for row in self.mine)
        return self.table("questions", np.fromiter(keys, np.uint64, len(self.mine)))

    def collect(
        self, what: str, rows: Places, make: Callable[[list[Comparison]], Iterable[Made]]
    ) -> list[Made]:
        """Return what `make` makes of some rows, one thing of each, in the order of `rows`.

        Each process makes those of its own.
        """
        rows = np.asarray(rows, int)
        made = hosts.gather(what, list(make(self._of_mine(rows))))
        parts = [iter(part) for part in made]
        return [next(parts[owner]) for owner in self.owners[rows]]

    def left_out(self, rows: Places, reason: str) -> list[Dropped]:
        """Return some rows as those that are left out for a reason."""
        return self.collect(reason, rows, lambda mine: [Dropped.of(row, reason) for row in mine])

    def select(self, rows: Places) -> ShardedRows:
        """Return some of the rows, in this order."""
        rows = np.asarray(rows, int)
        return ShardedRows(self._of_mine(rows), self.owners[rows])

    def in_both_orders(self) -> ShardedRows:
        """Return the rows with row i as row 2i, and in the other order as row 2i+1."""
        both = [order for row in self.mine for order in (row, row.swapped())]
        return ShardedRows(both, np.repeat(self.owners, 2))

    def _of_mine(self, rows: Int[np.ndarray, " n"]) -> list[Comparison]:
        is_mine = self.owners == hosts.index()
        places = np.cumsum(is_mine) - 1
        return [self.mine[place] for place in places[rows[is_mine[rows]]].tolist()]


def deal(rows: Sequence[Comparison]) -> ShardedRows:
    """Deal out rows that every process has made alike."""
    return ShardedRows(
        list(rows[hosts.index() :: hosts.count()]), np.arange(len(rows)) % hosts.count()
    )


def read(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    values: Mapping[Any, Any] | None = None,
    scores: str = "score",
    is_listed: bool = False,
    needs_label: bool = True,
) -> tuple[ShardedRows, list[Dropped]]:
    """Read a source as `readers.read` does, each process its share; return rows and dropped ones.

    `is_listed` and `needs_label` are those of `readers.read_part`.

    Raises:
      UsageError: as `readers.read`, in the process that has the row; or the source is not the same
        on every host, by the names and sizes of its files.
    """
    hosts.agree(f"files of {source}", _sizes(source))
    every = slice(hosts.index(), None, hosts.count())
    part, seen = readers.read_part(
        source,
        columns=columns,
        values=values,
        scores=scores,
        every=every,
        is_listed=is_listed,
        needs_label=needs_label,
    )
    mine = ([row.where.order for row in part.rows], part.dropped, seen)
    orders, left_out, parts = zip(*hosts.gather(f"rows of {source}", mine), strict=True)
    dropped = sorted((row for each in left_out for row in each), key=lambda row: row.where.order)
    owners = np.repeat(np.arange(len(orders)), [len(each) for each in orders])
    owners = owners[np.argsort(np.concatenate(orders))]
    readers.check_whole(source, parts)
    return ShardedRows(part.rows, owners), dropped


def _sizes(source: str) -> list[tuple[str, int]]:
    """Return what of a local source's files tells two versions apart without reading them."""
    path = pathlib.Path(readers.without_split(source)[0]).expanduser()
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    is_hidden = re.compile(r"/\.").search  # .git, .cache: differ from clone to clone
    return [
        (file.name, file.stat().st_size)
        for file in files
        if file.is_file() and not is_hidden(str(file)[len(str(path)) :])
    ]
