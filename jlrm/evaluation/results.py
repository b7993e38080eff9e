"""What one evaluation says: the entry of a benchmark in `results.json`, the table, a comparison.

An item counts once all of its games have a response; an evaluation that lacks some is incomplete.
Nothing here judges, reads data or writes files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jlrm.config import UsageError
from jlrm.evaluation import diagnostics, intervals, unread
from jlrm.evaluation.benchmark import Benchmark, Credit
from jlrm.evaluation.games import Game, ItemVerdicts, Response
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.reading import Reader, count, judged_items, statuses
from jlrm.evaluation.scoring import counted, percent
from jlrm.reports import tables
from jlrm.reports.results_file import (
    BenchmarkResult,
    Interval,
    PairedComparison,
    SubsetResult,
    WorstItem,
)

OVER_ALL_ITEMS = ("overall", "agreement")  # metrics that are a share of all items
NUM_WORST = 20
SHOWN_CHARACTERS = 4000  # of a text among the worst items


class Evaluation(NamedTuple):
    """A benchmark's games and what a judge said of them."""

    benchmark: Benchmark
    policy: Policy
    games: Sequence[Game]
    responses: Mapping[str, Response]  # by game
    reader: Reader

    def judged(self) -> tuple[list[ItemVerdicts], int]:
        """Return the items whose games are all answered, and the number of the others."""
        return judged_items(self.games, counted(self.responses, self.policy), self.reader)


def entry(evaluation: Evaluation, span: float | None) -> BenchmarkResult:
    """Return the entry of a benchmark in `results.json`.

    span: distance of the ends of the judge's scale; None where it is unknown.
    """
    benchmark, policy = evaluation.benchmark, evaluation.policy
    judged, num_missing = evaluation.judged()
    credits = {each.item.id: benchmark.credit(each, policy) for each in judged}
    metrics, ranges = _metrics(evaluation, judged, credits)
    return BenchmarkResult(
        metrics=metrics,
        intervals=ranges,
        n=len(judged),
        parse_failures=count(judged, None),
        ties=count(judged, 0),
        statuses=statuses(judged),
        policy=dataclasses.asdict(policy),
        subsets=_subsets(judged, credits),
        diagnostics=diagnostics.summary(judged, evaluation.responses, span=span),
        published=benchmark.published,
        incomplete=num_missing > 0,
        worst=_worst(judged, credits, evaluation.responses),
        unread=unread.examples(judged, evaluation.responses),
    )


def _metrics(
    evaluation: Evaluation, judged: Sequence[ItemVerdicts], credits: Mapping[str, Credit]
) -> tuple[dict[str, float | None], dict[str, Interval]]:
    """Return the metrics with their intervals; None for all where no game has a verdict.

    What a policy gives to games without a verdict would be all that they say.
    """

    def total(sample: Sequence[ItemVerdicts]) -> dict[str, float]:
        return evaluation.benchmark.total(
            [credits[each.item.id] for each in sample], evaluation.policy
        )

    metrics = total(judged)
    if not _has_verdicts(judged):
        return dict.fromkeys(metrics), {}
    sizes = dict.fromkeys(OVER_ALL_ITEMS, len(judged)) | Counter(e.item.subset for e in judged)
    return (
        {name: _finite(value) for name, value in metrics.items()},
        {
            name: _finite_ends(ends, sizes.get(name, 0))
            for name, ends in intervals.bootstrap(judged, total).items()
        },
    )


def _has_verdicts(judged: Sequence[ItemVerdicts]) -> bool:
    return any(each.preference is not None for item in judged for each in item.verdicts)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite_ends(interval: tuple[float, float], num_items: int) -> Interval:
    """Return an interval; num_items: that a percentage is of, 0 for what is no share of items."""
    low, high = intervals.with_width(interval, num_items) if num_items else interval
    return _finite(low), _finite(high)


def _subsets(
    judged: Sequence[ItemVerdicts], credits: Mapping[str, Credit]
) -> dict[str, SubsetResult]:
    groups: dict[str, list[ItemVerdicts]] = {}
    for each in judged:
        groups.setdefault(each.item.subset, []).append(each)

    def accuracy(sample: Sequence[ItemVerdicts]) -> dict[str, float]:
        return {"accuracy": percent(credits[each.item.id].value for each in sample)}

    def result(group: Sequence[ItemVerdicts]) -> SubsetResult:
        if not _has_verdicts(group):
            return SubsetResult(len(group), None)
        interval = intervals.bootstrap(group, accuracy)["accuracy"]
        return SubsetResult(
            len(group), accuracy(group)["accuracy"], _finite_ends(interval, len(group))
        )

    return {name: result(group) for name, group in sorted(groups.items()) if name}


def _worst(
    judged: Sequence[ItemVerdicts], credits: Mapping[str, Credit], responses: Mapping[str, Response]
) -> tuple[WorstItem, ...]:
    """Return the items with the least credit; of equal ones a choice that ids alone decide."""
    wrong = [each for each in judged if credits[each.item.id].value < 1.0]
    wrong.sort(key=lambda each: (credits[each.item.id].value, _shuffled(each.item.id)))
    return tuple(_shown(each, credits[each.item.id].value, responses) for each in wrong[:NUM_WORST])


def _shuffled(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def _shown(judged: ItemVerdicts, credit: float, responses: Mapping[str, Response]) -> WorstItem:
    item = judged.item
    own = [responses[Game(item, *verdict[:2]).id] for verdict in judged.verdicts]
    return WorstItem(
        item=item.id,
        subset=item.subset,
        question=_cut(item.question),
        answers=tuple(map(_cut, item.answers)),
        label=item.label,
        responses=tuple(_cut(text) for response in own for text in response.texts or ()),
        scores=tuple(verdict.scores for verdict in judged.verdicts),
        credit=credit,
    )


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " […]"


def comparison(mine: Evaluation, other: Evaluation, name: str) -> PairedComparison:
    """Compare two judges by their credits on the items that both have judged; name: the other's.

    Raises:
      UsageError: there is no such item.
    """
    credits = [
        {each.item.id: e.benchmark.credit(each, e.policy).value for each in e.judged()[0]}
        for e in (mine, other)
    ]
    common = [item for item in credits[0] if item in credits[1]]
    if not common:
        raise UsageError(
            f"--compare: no item of {mine.benchmark.name} is judged by both, in the same orders. "
            "Compare evaluations of the same --policy order and --seed."
        )
    paired = intervals.paired(*([one[item] for item in common] for one in credits))
    return PairedComparison(name, len(common), *paired)


def table(name: str, result: BenchmarkResult, size: int) -> Iterator[str]:
    """Return the lines that show a result; size: items of the official set, 0 if it varies."""
    policy = ", ".join(f"{key}={value}" for key, value in result.policy.items())
    of = f" of {size}" if size and result.n != size else ""
    mark = "  INCOMPLETE" if result.incomplete else ""
    yield f"{name}: {result.n}{of} items{mark}"
    yield f"  policy: {policy}"
    yield f"  without a verdict: {result.parse_failures} games, ties: {result.ties}"
    published: dict[str, list[str]] = {}
    for row in result.published:
        published.setdefault(row.metric, []).append(f"{row.judge} {row.value:.2f}")
    rows = [
        {
            "metric": metric,
            "value": value,
            "95 % interval": _range(result.intervals.get(metric)),
            "published": ", ".join(published.get(metric, [])) or None,
        }
        for metric, value in result.metrics.items()
    ]
    columns = ["metric", "value", "95 % interval", *(["published"] if published else [])]
    yield tables.table(rows, columns)
    if compared := result.comparison:
        low, high = compared.interval
        yield (
            f"  against {compared.other}: {compared.difference:+.2f} points "
            f"[{low:+.2f}, {high:+.2f}], p = {compared.p_value:.4f}, n = {compared.n}"
        )


def _range(interval: Interval | None) -> str | None:
    if interval is None or None in interval:
        return None
    return " to ".join(f"{end:.2f}" for end in interval)


def checksum(value: Any) -> str:
    """Return a short digest of anything made of what JSON holds, and of dataclasses."""
    text = json.dumps(value, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
