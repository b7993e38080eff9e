"""Your own lists of answers, in the rows that training reads with `data.judging=lists`.

A row has a `question`, 2 to 8 `answers`, and `scores` or a `ranking`. What counts is each pair of
answers that gold says something of. How a judge is asked about it is another matter: by pairs, each
answer alone (`--single`) or all at once (`--at-once`), and the metrics are the same.

agreement: of the pairs, those ordered as gold orders them, an equal pair by equal scores alone.
consistency: of the pairs, those that are ordered the same in both orders. same_best: of the lists,
those in which both orders put the same answer first. parse_rate: of the pairs' verdicts, those that
can be read. `first_order` counts the order given alone, as training does on its held-out lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from jlrm.data.comparisons import AnswerList
from jlrm.evaluation import sources
from jlrm.evaluation.benchmark import Benchmark, Credit
from jlrm.evaluation.games import Game, GameVerdict, Item, ItemVerdicts, whole
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.scoring import game_credit, label_of, ordered, percent
from jlrm.judgement.verdict import is_consistent

HOW_TO_GET = (
    "Name your lists, e.g. --data lists=FILE.jsonl with question, answers, and scores or a ranking "
    "in each line."
)


class PairCounts(NamedTuple):
    """What a list's verdicts come to."""

    credits: tuple[float, ...]  # of the games that count
    agree: tuple[bool, ...]  # of the pairs in both orders
    is_same_best: bool | None  # None where one order was judged
    read: tuple[bool, ...]  # of all games


def read(
    source: str,
    columns: Mapping[str, str] | None = None,
    values: Mapping[str, str] | None = None,
    scores: str = "score",
) -> list[Item]:
    """Read lists as training does; rows that can't be used are left out, and told."""
    told: dict[str, Any] = {"columns": columns, "values": values, "scores": scores}
    items = [
        Item(row.id, row.question, row.answers, subset=row.source, golds=row.golds)
        for row in sources.own_rows(source, HOW_TO_GET, **told, is_listed=True)
        if isinstance(row, AnswerList)
    ]
    return sources.finished(items, source)


def games(items: Sequence[Item], policy: Policy, seed: int) -> list[Game]:
    """Return the games of the pairs of each list that gold says something of."""
    found = []
    for item in items:
        for shown in (game.shown for game in ordered(whole(item), policy.order, seed)):
            pairs = combinations(shown, 2)
            found += [Game(item, i, j) for i, j in pairs if item.gold_label(i, j) is not None]
    return found


def _credit(judged: ItemVerdicts, policy: Policy) -> Credit:
    item, verdicts = judged
    given = {(v.first, v.second): v for v in verdicts if v.first < v.second}
    swapped = {(v.second, v.first): v for v in verdicts if v.first > v.second}
    counts = list(given.values()) if policy.aggregation == "first_order" else list(verdicts)
    credits = tuple(_worth(item, verdict, policy) for verdict in counts or verdicts)
    both = [(given[pair], swapped[pair]) for pair in given if pair in swapped]
    agree = tuple(is_consistent(one.in_order, two.in_order) for one, two in both)
    best = [_best(own.values()) for own in (given, swapped)] if both else []
    is_same = best[0] is not None and best[0] == best[1] if best else None
    is_read = tuple(verdict.preference is not None for verdict in verdicts)
    counted = PairCounts(credits, agree, is_same, is_read)
    said = tuple(verdict.in_order for verdict in verdicts)
    return Credit(item, sum(credits) / len(credits), said, counted)


def _worth(item: Item, verdict: GameVerdict, policy: Policy) -> float:
    label = item.gold_label(*sorted((verdict.first, verdict.second)))
    assert label is not None, f"a game of {item.id} has no gold"
    return game_credit(label_of(verdict, policy), label, policy)


def _best(verdicts: Collection[GameVerdict]) -> frozenset[int] | None:
    """Return the answers that win most of their pairs in one order; None where a verdict lacks."""
    points: Counter[int] = Counter()
    for verdict in verdicts:
        if verdict.preference is None:
            return None
        points[verdict.first] += {1: 2, 0: 1, 2: 0}[verdict.preference]
        points[verdict.second] += {1: 0, 0: 1, 2: 2}[verdict.preference]
    most = max(points.values())
    return frozenset(answer for answer, own in points.items() if own == most)


def _total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    counts: list[PairCounts] = [credit.detail for credit in credits]
    found = {"agreement": percent(each for own in counts for each in own.credits)}
    if agree := [each for own in counts for each in own.agree]:
        same = [own.is_same_best for own in counts if own.is_same_best is not None]
        found |= {"consistency": percent(agree), "same_best": percent(same)}
    return found | {"parse_rate": percent(each for own in counts for each in own.read)}


BENCHMARK = Benchmark(
    name="lists",
    policies=(
        Policy("mean", "both", 0.0, 0.0),
        Policy("first_order", "both", 0.0, 0.0),  # as training's held-out set
    ),
    read=read,
    games=games,
    credit=_credit,
    total=_total,
    is_own=True,
    is_listed=True,
)
