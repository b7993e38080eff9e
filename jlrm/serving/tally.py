"""What the verdicts on a file of pairs come to: wins, leans, agreement with labels, cost."""

from __future__ import annotations

import math
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jlrm.evaluation.games import Game, Item, Response
from jlrm.evaluation.reading import Reader, judged_items
from jlrm.evaluation.statistics import diagnostics
from jlrm.evaluation.statistics.clusters import cluster_items
from jlrm.reports import contracts
from jlrm.reports.results_file import Interval, ItemRate
from jlrm.serving.lists import ListRow
from jlrm.serving.results import POINTS, JudgedPair, Ranking, ScoredAnswer
from jlrm.serving.rows import Row

VERSION = 1


@dataclass(frozen=True)
class JudgingSummary:
    """The content of `summary.json`. Intervals are of 95 %, rows of one question drawn together.

    wins: of answer 1, of answer 2, and ties; of `rows`. unread: of `games`. errors: rows without a
    verdict because a game was not judged or the row can't be. first: verdicts that name the answer
    shown first; longer: the longer one. agreement: rows whose verdict is their label; a row without
    a verdict has another one. judge, pairs: names of who judged, and of the file.
    """

    rows: int
    games: int
    wins_1: int
    wins_2: int
    ties: int
    unread: int
    errors: int
    share_1: ItemRate | None  # of the wins, a tie counting a half
    consistency: ItemRate | None
    first: ItemRate | None
    longer: ItemRate | None
    agreement: ItemRate | None
    tokens: int
    seconds: float
    judge: str = ""
    pairs: str = ""
    version: int = VERSION


def summary(
    names: tuple[str, str],
    rows: Sequence[Row],
    judged: Sequence[JudgedPair],
    games: Sequence[Sequence[Game]],
    responses: Mapping[str, Response],
    read: Reader,
) -> JudgingSummary:
    """Return what the verdicts on `rows` come to; `games` are those of the rows that have any.

    names: of the judge, and of the file of pairs.
    """
    flat = [game for own in games for game in own]
    items, _ = judged_items(flat, responses, read)
    about = diagnostics.summary(
        items, responses, clusters=cluster_items([each.item for each in items])
    )
    named = [each.winner for each in judged]
    won = [(row.question, POINTS[w]) for row, w in zip(rows, named, strict=True) if w is not None]
    right = [
        (row.question, float(winner == row.label))
        for row, winner in zip(rows, named, strict=True)
        if row.label is not None
    ]
    return JudgingSummary(
        rows=len(rows),
        games=len(flat),
        wins_1=named.count(1),
        wins_2=named.count(2),
        ties=named.count(0),
        unread=sum(g.winner is None and g.status != "unjudged" for e in judged for g in e.games),
        errors=sum(each.winner is None and each.error is not None for each in judged),
        share_1=rate_by_question(*_columns(won)),
        consistency=about.consistency,
        first=about.first,
        longer=rate_by_question(*_columns(_for_longer(rows, judged))),
        agreement=rate_by_question(*_columns(right)),
        **_spent(responses),
        judge=names[0],
        pairs=names[1],
    )


def _spent(responses: Mapping[str, Response]) -> dict[str, Any]:
    """Return the tokens that were written, and the seconds that they took."""
    given = [each for each in responses.values() if each.texts is not None]
    return {
        "tokens": sum(each.num_tokens or 0 for each in given),
        "seconds": round(sum(each.seconds or 0.0 for each in given), 3),
    }


def _for_longer(rows: Sequence[Row], judged: Sequence[JudgedPair]) -> list[tuple[str, float]]:
    """Return of each verdict on answers of two lengths whether it names the longer one."""
    lengths = [(len(row.answer_1), len(row.answer_2)) for row in rows]
    return [
        (row.question, float((game.winner == 1) == (first > second)))
        for row, (first, second), each in zip(rows, lengths, judged, strict=True)
        for game in each.games
        if game.winner and first != second
    ]


def _columns(pairs: Sequence[tuple[str, float]]) -> tuple[list[str], list[float]]:
    return [question for question, _ in pairs], [value for _, value in pairs]


def rate_by_question(questions: Sequence[str], values: Sequence[float]) -> ItemRate | None:
    """Return the mean of values in percent, with an interval by question; None of none."""
    if not values:
        return None
    clusters = cluster_items([Item("", question, ()) for question in questions])
    return diagnostics.item_rate(values, [1] * len(values), clusters, len(values))


@dataclass(frozen=True)
class ScoringSummary:
    """The content of `summary.json` where single answers were scored.

    unread: judgements without a score, of `games`. errors: rows without one because they were not
    judged or can't be. mean: of the scores. counts: answers by their score, rounded.
    """

    rows: int
    games: int
    unread: int
    errors: int
    mean: float | None
    counts: dict[str, int]
    tokens: int
    seconds: float
    version: int = VERSION


def scoring_summary(
    scored: Sequence[ScoredAnswer], responses: Mapping[str, Response]
) -> ScoringSummary:
    """Return what the scores come to."""
    scores = sorted(each.score for each in scored if each.score is not None)
    rounded = [str(math.floor(score + 0.5)) for score in scores]
    return ScoringSummary(
        rows=len(scored),
        games=len(responses),
        unread=sum(each.score is None and each.error is None for each in scored),
        errors=sum(each.error is not None for each in scored),
        mean=sum(scores) / len(scores) if scores else None,
        counts=dict(Counter(rounded)),
        **_spent(responses),
    )


@dataclass(frozen=True)
class RankingSummary:
    """The content of `summary.json` where answers were ranked.

    unread: games without a verdict, of `games`. errors: rows with a game that was not judged, or
    that can't be. first: verdicts that name the answer shown first.
    """

    rows: int
    games: int
    unread: int
    errors: int
    consistency: ItemRate | None
    first: ItemRate | None
    tokens: int
    seconds: float
    version: int = VERSION


def ranking_summary(
    rows: Sequence[ListRow], rankings: Sequence[Ranking | None], responses: Mapping[str, Response]
) -> RankingSummary:
    """Return what the rankings come to."""
    pairs = [
        (row.question, pair)
        for row, ranking in zip(rows, rankings, strict=True)
        for pair in (ranking.pairs if ranking else ())
    ]
    games = [game for ranking in rankings if ranking for game in ranking.games]
    agree = [(q, float(p.is_consistent)) for q, p in pairs if p.is_consistent is not None]
    first = [
        (question, float(game.winner == game.order[0]))
        for question, pair in pairs
        for game in pair.games
        if game.winner
    ]
    return RankingSummary(
        rows=len(rows),
        games=len(games),
        unread=sum(game.status != "ok" for game in games),
        errors=sum(
            ranking is None or any(game.error for game in ranking.games) for ranking in rankings
        ),
        consistency=rate_by_question(*_columns(agree)),
        first=rate_by_question(*_columns(first)),
        **_spent(responses),
    )


def doubt(name: str, num_unread: int, num_games: int) -> str:
    """Return what to say of a judge most of whose responses hold no verdict."""
    return (
        f"{name} wrote no verdict in {num_unread} of {num_games} games. It may not be a judge of "
        "this prompt: name the prompt that it was trained with, allow longer judgements "
        "(max_new_tokens), or train it (jlrm train)."
    )


AnySummary = JudgingSummary | ScoringSummary | RankingSummary


def write(path: pathlib.Path, found: AnySummary) -> None:
    """Write `summary.json`."""
    contracts.write(path, found)


def read(path: pathlib.Path) -> JudgingSummary:
    """Read the `summary.json` of judged pairs.

    Raises:
      UsageError: it is none.
    """
    content = contracts.read(path, VERSION, "Run jlrm judge again.")
    return contracts.decode(JudgingSummary, {**content, "version": VERSION}, str(path))


def as_json(found: AnySummary) -> dict[str, Any]:
    """Return a summary as what `--json` prints."""
    return contracts.encode(found)


def lines(found: AnySummary) -> Iterator[str]:
    """Yield a summary as text."""
    if isinstance(found, ScoringSummary):
        mean = "none" if found.mean is None else f"{found.mean:.2f}"
        yield f"{found.rows} answers: mean score {mean}, without a score {found.unread}"
        for score, number in found.counts.items():
            yield f"  {score:>4}  {number}"
        return
    if isinstance(found, RankingSummary):
        yield f"{found.rows} rankings by {found.games} games"
        yield from _rates(found)
        return
    silent = found.rows - found.wins_1 - found.wins_2 - found.ties
    yield (
        f"{found.rows} pairs: answer 1 wins {found.wins_1}, answer 2 wins {found.wins_2}, "
        f"ties {found.ties}, without a verdict {silent}"
    )
    yield from _rates(found)


def _rates(found: JudgingSummary | RankingSummary) -> Iterator[str]:
    for name, label in (
        ("share_1", "answer 1 wins, a tie counting a half"),
        ("consistency", "both orders agree"),
        ("first", "verdicts for the answer shown first"),
        ("longer", "verdicts for the longer answer"),
        ("agreement", "agreement with the labels"),
    ):
        rate = getattr(found, name, None)
        if rate is not None and rate.percent is not None:
            yield f"  {label:38}{rate.percent:5.1f} %{_interval(rate.interval)} of {rate.n}"
    if found.unread:
        yield f"  {'games without a readable verdict':38}{found.unread} of {found.games}"


def _interval(ends: Interval | None) -> str:
    return f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else ""
