"""What the verdicts on a file of pairs come to: wins, leans, agreement with labels, cost."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jlrm.evaluation.games import Game, Response
from jlrm.evaluation.reading import Reader, judged_items
from jlrm.evaluation.statistics import diagnostics
from jlrm.evaluation.statistics.clusters import cluster_items
from jlrm.evaluation.statistics.intervals import of_share
from jlrm.reports import contracts
from jlrm.reports.results_file import ItemRate, Rate
from jlrm.serving.results import JudgedPair
from jlrm.serving.rows import Row

VERSION = 1


@dataclass(frozen=True)
class JudgingSummary:
    """The content of `summary.json`. Intervals are of 95 %, rows of one question drawn together.

    wins: of answer 1, of answer 2, and ties; of `rows`. unread: of `games`. errors: rows without a
    verdict because a game was not judged or the row can't be. first: verdicts that name the answer
    shown first; longer: the longer one. agreement: rows whose verdict is their label.
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
    longer: Rate | None
    agreement: ItemRate | None
    tokens: int
    seconds: float
    version: int = VERSION


def summary(
    rows: Sequence[Row],
    judged: Sequence[JudgedPair],
    games: Sequence[Sequence[Game]],
    responses: Mapping[str, Response],
    read: Reader,
) -> JudgingSummary:
    """Return what the verdicts on `rows` come to; `games` are those of the rows that have any."""
    flat = [game for own in games for game in own]
    items, _ = judged_items(flat, responses, read)
    about = diagnostics.summary(
        items, responses, clusters=cluster_items([each.item for each in items])
    )
    named = [each.winner for each in judged]
    read_pairs = [number for number, winner in enumerate(named) if winner is not None]
    credit = [{1: 1.0, 2: 0.0, 0: 0.5}[named[number] or 0] for number in read_pairs]
    labelled = [number for number in read_pairs if rows[number].label is not None]
    right = [float(named[number] == rows[number].label) for number in labelled]
    given = [each for each in responses.values() if each.texts is not None]
    return JudgingSummary(
        rows=len(rows),
        games=len(flat),
        wins_1=named.count(1),
        wins_2=named.count(2),
        ties=named.count(0),
        unread=sum(g.winner is None and g.status != "unjudged" for e in judged for g in e.games),
        errors=sum(each.winner is None and each.error is not None for each in judged),
        share_1=_rate(rows, read_pairs, credit),
        consistency=about.consistency,
        first=about.first,
        longer=about.length.verdicts if about.length else None,
        agreement=_rate(rows, labelled, right),
        tokens=sum(each.num_tokens or 0 for each in given),
        seconds=round(sum(each.seconds or 0.0 for each in given), 3),
    )


def _rate(rows: Sequence[Row], numbers: Sequence[int], values: Sequence[float]) -> ItemRate | None:
    """Return the mean of values that some rows have, in percent, with an interval by question."""
    if not numbers:
        return None
    names: dict[str, int] = {}
    clusters = np.array([names.setdefault(rows[n].question, len(names)) for n in numbers])
    sizes = np.bincount(clusters).astype(float)
    interval = of_share(np.bincount(clusters, values), sizes, len(numbers))
    return ItemRate(100 * float(np.mean(values)), len(numbers), interval)


def write(path: pathlib.Path, found: JudgingSummary) -> None:
    """Write `summary.json`."""
    contracts.write(path, found)


def as_json(found: JudgingSummary) -> dict[str, Any]:
    """Return a summary as what `--json` prints."""
    return contracts.encode(found)


def lines(found: JudgingSummary) -> Iterator[str]:
    """Yield a summary as text."""
    silent = found.rows - found.wins_1 - found.wins_2 - found.ties
    yield (
        f"{found.rows} pairs: answer 1 wins {found.wins_1}, answer 2 wins {found.wins_2}, "
        f"ties {found.ties}, without a verdict {silent}"
    )
    for label, rate in (
        ("answer 1 wins, a tie counting a half", found.share_1),
        ("both orders agree", found.consistency),
        ("verdicts for the answer shown first", found.first),
        ("verdicts for the longer answer", found.longer),
        ("agreement with the labels", found.agreement),
    ):
        if rate is not None and rate.percent is not None:
            yield f"  {label:38}{rate.percent:5.1f} %{_interval(rate)} of {rate.n}"
    if found.unread:
        yield f"  {'games without a readable verdict':38}{found.unread} of {found.games}"


def _interval(rate: Rate) -> str:
    interval = rate.interval if isinstance(rate, ItemRate) else None
    return f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""
