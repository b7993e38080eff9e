"""What one evaluation says: the entry of a benchmark in `results.json`, the table, a comparison.

An item counts once all of its games have a response; an evaluation that lacks some is incomplete.
Nothing here judges, reads data or writes files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlrm.config import UsageError
from jlrm.evaluation.benchmark import Benchmark, Credit
from jlrm.evaluation.games import Game, ItemVerdicts, Response
from jlrm.evaluation.groups import Groups
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.reading import Reader, count, judged_items, statuses
from jlrm.evaluation.scoring import counted
from jlrm.evaluation.statistics import diagnostics, intervals, metrics, unread
from jlrm.evaluation.statistics.clusters import cluster_items, design_effect
from jlrm.reports import tables
from jlrm.reports.evaluated import independence_text
from jlrm.reports.results_file import (
    BenchmarkResult,
    Interval,
    PairedComparison,
    WorstItem,
)

NUM_WORST = 20
SHOWN_CHARACTERS = 4000  # of a text among the worst items


class Evaluation(NamedTuple):
    """A benchmark's games and what a judge said of them."""

    benchmark: Benchmark
    policy: Policy
    games: Sequence[Game]
    responses: Mapping[str, Response]  # by game
    reader: Reader
    groups: Groups = Groups()  # of the user's

    def judged(self) -> tuple[list[ItemVerdicts], int]:
        """Return the items whose games are all answered, and the number of the others."""
        return judged_items(self.games, counted(self.responses, self.policy), self.reader)


def entry(evaluation: Evaluation, span: float | None) -> BenchmarkResult:
    """Return the entry of a benchmark in `results.json`.

    span: distance of the ends of the judge's scale; None where it is unknown.
    """
    benchmark, policy = evaluation.benchmark, evaluation.policy
    judged, num_missing = evaluation.judged()
    credits = [benchmark.credit(each, policy) for each in judged]
    clusters = cluster_items([each.item for each in judged], benchmark.group)
    credited = metrics.Credited(benchmark, policy, judged, credits, clusters)
    values, ranges = metrics.metrics(credited)
    responses = evaluation.responses
    return BenchmarkResult(
        metrics=values,
        intervals=ranges,
        n=len(judged),
        clusters=len(set(clusters.tolist())),
        design_effect=design_effect(credited.values, clusters),
        parse_failures=count(judged, None),
        ties=count(judged, 0),
        statuses=statuses(judged),
        policy=dataclasses.asdict(policy),
        subsets=metrics.subsets(credited),
        groups=metrics.groups(credited, evaluation.groups),
        diagnostics=diagnostics.summary(judged, responses, clusters=clusters, span=span),
        published=benchmark.published,
        incomplete=num_missing > 0,
        worst=_worst(judged, {each.item.id: each for each in credits}, responses),
        unread=unread.examples(judged, responses),
    )


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


def comparison(mine: Evaluation, other: Evaluation, name: str) -> PairedComparison | None:
    """Compare two judges by their credits on the items that both have judged; name: the other's.

    Returns None where one of the two has no verdict on any of these: the policy alone would be
    compared.

    Raises:
      UsageError: there is no such item.
    """
    judged = [{each.item.id: each for each in e.judged()[0]} for e in (mine, other)]
    common = [item for item in judged[0] if item in judged[1]]
    if not common:
        raise UsageError(
            f"--compare: no item of {mine.benchmark.name} is judged by both, in the same orders. "
            "Compare evaluations of the same --policy order and --seed."
        )
    if not all(metrics.has_verdicts([of[item] for item in common]) for of in judged):
        return None
    credits = [
        np.array([e.benchmark.credit(of[item], e.policy).value for item in common])
        for e, of in zip((mine, other), judged, strict=True)
    ]
    clusters = cluster_items([judged[0][item].item for item in common], mine.benchmark.group)
    paired = intervals.paired(*credits, clusters=clusters)
    effect = design_effect(credits[0] - credits[1], clusters)
    return PairedComparison(name, len(common), *paired, len(set(clusters.tolist())), effect)


def silence(name: str, result: BenchmarkResult) -> str:
    """Return what must be said of figures without a verdict beside others that have one."""
    if not result.silent or result.has_no_verdict:
        return ""
    return f"{name}: NO VERDICT for {', '.join(result.silent)}. These figures are left out."


def table(name: str, result: BenchmarkResult, size: int) -> Iterator[str]:
    """Return the lines that show a result; size: items of the official set, 0 if it varies."""
    policy = ", ".join(f"{key}={value}" for key, value in result.policy.items())
    of = f" of {size}" if size and result.n != size else ""
    mark = "  INCOMPLETE" if result.incomplete else ""
    yield f"{name}: {result.n}{of} items{mark}"
    yield f"  policy: {policy}"
    yield f"  intervals: {independence_text(result.n, result.clusters, result.design_effect)}"
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
    if result.groups:
        of_groups = [
            {"group": group, "items": each.n, "share %": each.share, **each.metrics}
            for group, each in result.groups.items()
        ]
        yield tables.table(of_groups, ["group", "items", "share %", *result.metrics])
    if compared := result.comparison:
        low, high = compared.interval
        yield (
            f"  against {compared.other}: {compared.difference:+.2f} points "
            f"[{low:+.2f}, {high:+.2f}], p = {compared.p_value:.4f}, n = {compared.n}"
        )
        drawn = independence_text(compared.n, compared.clusters, compared.design_effect)
        yield f"    {drawn}"


def _range(interval: Interval | None) -> str | None:
    if interval is None or None in interval:
        return None
    return " to ".join(f"{end:.2f}" for end in interval)


def checksum(value: Any) -> str:
    """Return a short digest of anything made of what JSON holds, and of dataclasses."""
    text = json.dumps(value, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
