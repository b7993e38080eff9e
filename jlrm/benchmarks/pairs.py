"""Your own comparisons, in any form and from any source that training reads (data/readers.py).

Files, prepared datasets (`DIR#validation`), hf:ORG/NAME and the like. `overall` is the mean credit;
a label "tie" is met by a verdict "tie" alone. Subsets are the rows' sources.
"""

from __future__ import annotations

import logging

from jlrm.benchmarks import sources
from jlrm.benchmarks.benchmark import Benchmark
from jlrm.benchmarks.games import Item
from jlrm.benchmarks.scoring import micro_total, pair_games, pair_mark
from jlrm.config import UsageError
from jlrm.data import readers
from jlrm.data.comparisons import describe_dropped

HOW_TO_GET = (
    "Name your comparisons, e.g. --data pairs=FILE.jsonl with question, answer_1, answer_2 and "
    "preference (1, 2, 0) in each line."
)


def read(source: str) -> list[Item]:
    """Read comparisons; rows that the reader can't use are left out, and said to be."""
    if not source:
        raise UsageError(f"There is no data to read. {HOW_TO_GET}")
    found = readers.read(source)
    if found.dropped:
        logging.getLogger(__name__).warning(
            "%s: left out %s", source, describe_dropped(found.dropped)
        )
    items = [
        Item(row.id, row.question, (row.answer_1, row.answer_2), row.label, subset=row.source)
        for row in found.rows
    ]
    return sources.finished(items, source)


BENCHMARK = Benchmark(
    name="pairs",
    read=read,
    games=pair_games,
    mark=pair_mark,
    total=micro_total,
    how_to_get=HOW_TO_GET,
)
