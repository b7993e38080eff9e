"""The engine of many machines: the steps of local.py as an Apache Beam pipeline, the same files.

What the order of rows decides there, the place of a row decides here: the number of its input, then
of its file and line. Of duplicates the lowest place stays; a shard holds its rows sorted by place;
and shards end after the same rows, which takes a count of rows by stretches of places. A worker
holds the records of one shard at a time, and no process something of every row.

Workers need jlrm with its extra `beam`, and must reach inputs, benchmarks, tokenizer and output by
the names that were given.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import pathlib
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam  # pyright: ignore[reportMissingImports]
from apache_beam.pvalue import AsList, AsSingleton, TaggedOutput  # pyright: ignore

from jlrm.config import UsageError
from jlrm.data import readers
from jlrm.data.batches import ENCODE_ROWS
from jlrm.data.comparisons import Comparison, Dropped, dropped_line
from jlrm.data.dataset import NAME, Shard, record, shard_ends, shard_name, write_shard
from jlrm.preparation.curation import (
    EXAMPLES,
    OPPOSITE,
    Counts,
    facts,
    in_both_orders,
    keys,
    num_heldout,
)
from jlrm.preparation.recipe import Checks, Recipe, fingerprint, stored_rows
from jlrm.runtime.storage import open_place

# The number of the input, of the row in it (with its file's), and 1 for a row that is swapped.
Position = tuple[int, int, int]
Placed = tuple[Position, tuple[bytes, bytes, int, bytes], Comparison]  # a row with its `keys`
Firsts = dict[int, Position]  # of a pair, by label
STRETCH = 10_000  # rows of a file whose places are sorted at a time
PREFIX = 2  # bytes of the hashes by which questions are counted
DROPPED_CHARACTERS = 200  # of a line, for the size of files of dropped rows
RESULT = f"{NAME}-result"


class Said(NamedTuple):
    """What was learned while a piece of an input was read."""

    source: int
    piece: int
    seen: readers.Seen
    fingerprint: int
    error: str


class Result(NamedTuple):
    """What comes back from the workers."""

    said: list[Said]
    counts: Counts
    num_questions: int
    shards: list[tuple[str, int, Shard]]
    examples: list[Firsts]  # of each the first row of every label
    rows: list[tuple[Position, Comparison]]  # that stand in the examples


class ShardPlan(NamedTuple):
    """Which rows a shard begins with, by split: how many shards, and the places of these rows."""

    num_shards: Mapping[str, int]
    firsts: Mapping[str, Sequence[Position]]


def build(pipeline: Any, recipe: Recipe, units: list[Any], target: str) -> None:
    """Add every step to a pipeline, in the order of `jlrm.prepare`."""
    start = pipeline | "start" >> beam.Create([None])
    read = (
        pipeline
        | "pieces" >> beam.Create(units)
        | "apart" >> beam.Reshuffle()
        | "read" >> beam.ParDo(_Read(recipe)).with_outputs("said", "dropped", main="rows")
    )
    first = (
        read.rows
        | "same" >> beam.Map(lambda placed: (placed[1][0], placed))
        | "by same" >> beam.GroupByKey()
        | "first" >> beam.ParDo(_FirstWins()).with_outputs("dropped", main="rows")
    )
    kept = (
        first.rows
        | "batch" >> beam.BatchElements(min_batch_size=ENCODE_ROWS, max_batch_size=ENCODE_ROWS)
        | "check" >> beam.ParDo(_Check(recipe)).with_outputs("dropped", "facts", main="rows")
    )
    num_questions, highest = _last_heldout(start, kept.rows, recipe.validation)
    splits = kept.rows | "split" >> beam.FlatMap(_split, recipe, AsSingleton(highest))
    dropped = (read.dropped, first.dropped, kept.dropped) | "dropped" >> beam.Flatten()

    pairs = (
        kept.rows
        | "pair" >> beam.Map(lambda placed: (placed[1][1], (placed[1][2], placed[0])))
        | "labels" >> beam.CombinePerKey(_FirstOfLabels())
        | "differing" >> beam.FlatMap(lambda pair: [pair[1]] if len(pair[1]) > 1 else [])
    )
    examples = pairs | "examples" >> beam.combiners.Top.Of(EXAMPLES, key=_by_kind, reverse=True)
    shown = kept.rows | "shown" >> beam.FlatMap(
        lambda placed, examples: [
            (placed[0], placed[2]) for each in examples if placed[0] in each.values()
        ],
        AsSingleton(examples),
    )

    counts = (
        kept.facts,
        splits | "facts" >> beam.Map(lambda row: list(facts(row[0], row[2]))),
        dropped | "reasons" >> beam.Map(_facts_of_dropped),
        pairs | "kinds" >> beam.Map(_facts_of_pair),
    ) | "all facts" >> beam.Flatten()
    counts = counts | "count" >> beam.CombineGlobally(_CountFacts())

    records = (
        splits | "record" >> beam.Map(lambda row: (row[0], row[1], record(row[2]))),
        dropped
        | "line" >> beam.Map(lambda row: ("dropped", row[0], dropped_line(row[1]).encode())),
    ) | "records" >> beam.Flatten()
    plan = _plan(start, records, counts)
    shards = (
        records
        | "shard" >> beam.Map(_to_shard, AsSingleton(plan))
        | "by shard" >> beam.GroupByKey()
        | "write" >> beam.Map(_write, target, AsSingleton(plan))
    )
    _ = start | "result" >> beam.Map(
        _report,
        target,
        *(AsList(read.said), AsSingleton(counts), AsSingleton(num_questions)),
        *(AsList(shards), AsSingleton(examples), AsList(shown)),
    )


class _Read(beam.DoFn):
    """Yields the rows of a piece; a row that stops the reading is said, not raised."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def process(self, unit: tuple[int, readers.Portion, bool]) -> Iterator[Any]:
        number, piece, is_remote = unit
        source, seen = self._recipe.input[number], self._recipe.nothing_seen()
        total, error = 0, ""
        try:
            for row in stored_rows(self._recipe, source, seen, piece):
                place = (number, row.where.order, 0)
                if isinstance(row, Dropped):
                    yield TaggedOutput("dropped", (place, row, ""))
                    continue
                total += fingerprint(row) if is_remote else 0
                said, pair, label, question = keys(row)
                yield place, (said, pair, label, question.to_bytes(8)), row
        except UsageError as wrong:
            error = str(wrong)
        yield TaggedOutput("said", Said(number, piece.number, seen, total, error))


class _FirstWins(beam.DoFn):
    """Yields of rows that say the same the first one; the others are dropped."""

    def process(self, group: tuple[bytes, Iterable[Placed]]) -> Iterator[Any]:
        _, same = group
        first: Placed | None = None
        for each in same:
            if first is None:
                first = each
                continue
            first, again = sorted((first, each), key=lambda placed: placed[0])
            yield TaggedOutput("dropped", (again[0], Dropped.of(again[2], "duplicate"), ""))
        yield first


class _Check(beam.DoFn):
    """Yields the rows of a batch that pass the checks; each worker reads the benchmarks itself."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def setup(self) -> None:
        self._checks = Checks.of(self._recipe)

    def process(self, batch: list[Placed]) -> Iterator[Any]:
        checked = self._checks([row for _, _, row in batch])
        for placed, (reason, benchmark, num_tokens) in zip(batch, checked, strict=True):
            if reason:
                dropped = Dropped.of(placed[2], reason)
                yield TaggedOutput("dropped", (placed[0], dropped, benchmark))
            else:
                yield placed
                yield TaggedOutput("facts", [("kept", "tokens", num_tokens)])


def _split(
    placed: Placed, recipe: Recipe, highest: bytes
) -> Iterator[tuple[str, Position, Comparison]]:
    """Yield a row with its split, of the training split with `swap` in both orders."""
    place, (_, _, _, question), row = placed
    if question <= highest:
        yield "validation", place, row
    elif recipe.swap:
        for twin, each in enumerate(in_both_orders(row)):
            yield "train", (*place[:2], twin), each
    else:
        yield "train", place, row


def _last_heldout(start: Any, rows: Any, share: float) -> tuple[Any, Any]:
    """Return the number of questions, and the highest key of those that are held out.

    The keys are counted by their first bytes, and those of one such count are sorted.
    """
    questions = (
        rows | "question" >> beam.Map(lambda placed: placed[1][3]) | "once" >> beam.Distinct()
    )
    sizes = (
        questions
        | "prefix" >> beam.Map(lambda key: key[:PREFIX])
        | "per prefix" >> beam.combiners.Count.PerElement()
    )

    def find(_: None, sizes: list[tuple[bytes, int]]) -> tuple[int, bytes, int]:
        num = sum(count for _, count in sizes)
        rest = num_heldout(num, share)
        for prefix, count in sorted(sizes):
            if rest and rest <= count:
                return num, prefix, rest
            rest -= min(rest, count)
        return num, b"", 0

    found = start | "find prefix" >> beam.Map(find, AsList(sizes))
    near = questions | "near" >> beam.Filter(
        lambda key, found: bool(found[2]) and key[:PREFIX] == found[1], AsSingleton(found)
    )
    highest = start | "highest" >> beam.Map(
        lambda _, found, near: sorted(near)[found[2] - 1] if found[2] else b"",
        *(AsSingleton(found), AsList(near)),
    )
    return found | "questions" >> beam.Map(lambda found: found[0]), highest


class _FirstOfLabels(beam.CombineFn):
    """The first place of every label of a pair."""

    def create_accumulator(self, *_: Any) -> Firsts:
        return {}

    def add_input(self, first: Firsts, claim: tuple[int, Position]) -> Firsts:
        label, place = claim
        first[label] = min(place, first.get(label, place))
        return first

    def merge_accumulators(self, accumulators: Iterable[Firsts]) -> Firsts:
        claims = itertools.chain.from_iterable(each.items() for each in accumulators)
        return functools.reduce(self.add_input, claims, {})

    def extract_output(self, first: Firsts) -> Firsts:
        return first


def _by_kind(pair: Firsts) -> tuple[bool, Position]:
    """Order pairs as examples: opposite labels first, then by place."""
    return not pair.keys() >= OPPOSITE, min(pair.values())


def _line(row: tuple[Position, Dropped, str]) -> tuple[str, Position, bytes]:
    return "dropped", row[0], dropped_line(row[1]).encode()


def _facts_of_pair(pair: Firsts) -> list[tuple[str, str, Any]]:
    kinds = ("all", "opposite") if pair.keys() >= OPPOSITE else ("all",)
    return [("pairs", kind, "") for kind in kinds]


def _facts_of_dropped(row: tuple[Position, Dropped, str]) -> list[tuple[str, str, Any]]:
    _, dropped, benchmark = row
    reason = [("dropped", "reason", dropped.reason)]
    return [*reason, ("dropped", "benchmark", benchmark)] if benchmark else reason


class _CountFacts(beam.CombineFn):
    """The number of every fact."""

    def create_accumulator(self, *_: Any) -> Counts:
        return Counts()

    def add_input(self, counts: Counts, some: Any) -> Counts:
        counts.update(some)  # of a list every fact once, of counts as often as they say
        return counts

    def merge_accumulators(self, accumulators: Iterable[Counts]) -> Counts:
        return functools.reduce(self.add_input, accumulators, Counts())

    def extract_output(self, counts: Counts) -> Counts:
        return counts


# ------------------------------------------------------------------------------------------ writing


def _plan(start: Any, records: Any, counts: Any) -> Any:
    """Find the places of the rows that shards begin with, where the local engine begins them."""
    stretches = (
        records
        | "stretch" >> beam.Map(lambda row: ((row[0], row[1][0], row[1][1] // STRETCH), row[1]))
        | "by stretch" >> beam.GroupByKey()
        | "in order" >> beam.Map(lambda group: (group[0], sorted(group[1])))
    )
    sizes = stretches | "size" >> beam.Map(lambda group: (group[0], len(group[1])))
    firsts = start | "firsts" >> beam.Map(_first_ranks, AsList(sizes), AsSingleton(counts))
    places = stretches | "places" >> beam.FlatMap(
        lambda group, firsts: [
            (group[0][0], group[1][rank]) for rank in firsts[1].get(group[0], ())
        ],
        AsSingleton(firsts),
    )

    def gather(_: None, firsts: Any, places: list[tuple[str, Position]]) -> ShardPlan:
        begin = {split: sorted(at for mine, at in places if mine == split) for split in firsts[0]}
        return ShardPlan(firsts[0], begin)

    return start | "plan" >> beam.Map(gather, AsSingleton(firsts), AsList(places))


def _first_ranks(
    _: None, sizes: list[tuple[Any, int]], counts: Counts
) -> tuple[dict[str, int], dict[Any, list[int]]]:
    """Return how many shards a split has, and which rows of stretches begin one but the first."""
    num_shards: dict[str, int] = {}
    ranks: dict[Any, list[int]] = {}
    for split, mine in itertools.groupby(sorted(sizes), key=lambda size: size[0][0]):
        stretches = list(mine)
        ends = list(itertools.accumulate(size for _, size in stretches))
        total = DROPPED_CHARACTERS * ends[-1]
        if split != "dropped":
            of_split = (item for item in counts.items() if item[0][:2] == (split, "characters"))
            total = sum(key[2] * number for key, number in of_split)
        *firsts, _last = shard_ends(ends[-1], total)
        num_shards[split] = len(firsts) + 1
        for first in firsts:
            at = bisect.bisect_right(ends, first)
            stretch, size = stretches[at]
            ranks.setdefault(stretch, []).append(first - (ends[at] - size))
    return num_shards, ranks


def _to_shard(
    row: tuple[str, Position, bytes], plan: ShardPlan
) -> tuple[Any, tuple[Position, bytes]]:
    split, place, content = row
    return (split, bisect.bisect_right(plan.firsts[split], place)), (place, content)


def _write(
    group: tuple[tuple[str, int], Iterable[tuple[Position, bytes]]], target: str, plan: ShardPlan
) -> tuple[str, int, Shard]:
    """Write a shard. It is the same file again if a runner does this twice."""
    (split, number), rows = group
    contents = [content for _, content in sorted(rows)]
    name = file_name(split, number, plan.num_shards[split])
    with tempfile.TemporaryDirectory(prefix="jlrm-") as holder:
        path = pathlib.Path(holder) / name
        if split == "dropped":
            path.write_bytes(b"".join(contents))
            shard = Shard(len(contents), path.stat().st_size)
        else:
            shard = write_shard(path, contents)
        _put(path, target)
    return split, number, shard


def file_name(split: str, number: int, num_shards: int) -> str:
    return (
        f"{NAME}-dropped-{number}" if split == "dropped" else shard_name(split, number, num_shards)
    )


def _report(_: None, target: str, *found: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="jlrm-") as holder:
        path = pathlib.Path(holder) / RESULT
        path.write_bytes(pickle.dumps(Result(*found)))
        _put(path, target)


def _put(path: pathlib.Path, target: str) -> None:
    place = open_place(target)
    place.system.makedirs(place.root, exist_ok=True)
    place.system.put_file(str(path), f"{place.root}/{path.name}")
