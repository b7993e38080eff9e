"""Rows to train from that verdicts make: preferences for DPO, judgements for SFT.

A preference names the better and the worse of two answers. A judgement is kept by rejection
sampling: of what a judge wrote of a labelled pair, in either order, the first that gave the label.
With `votes` it has several tries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jlrm.evaluation.games import Game, Response
from jlrm.evaluation.reading import Reader
from jlrm.serving.lists import ListRow
from jlrm.serving.results import POINTS, JudgedPair, Ranking, judged_game, reasoning
from jlrm.serving.rows import Row


def preferences(rows: Sequence[Row], judged: Sequence[JudgedPair]) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair with a winner in which the orders, if both, agree."""
    for row, pair in zip(rows, judged, strict=True):
        if pair.winner and pair.is_consistent is not False:
            answers, best = (row.answer_1, row.answer_2), pair.winner - 1
            yield _row(row.question, answers, best, 1 - best, pair.scores)


def preferences_of_lists(
    rows: Sequence[ListRow], rankings: Sequence[Ranking | None]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each list in which answers won other shares of their games, all of some."""
    for row, ranking in zip(rows, rankings, strict=True):
        shares = _shares(ranking, len(row.answers)) if ranking else []
        if shares:
            yield from preference(row.question, row.answers, shares)


def preference(
    question: Any, answers: Sequence[str], shares: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Yield a row of the answer that won the largest share of its games, and the least; or none."""
    best, worst = shares.index(max(shares)), shares.index(min(shares))
    if shares[best] > shares[worst]:
        yield _row(question, answers, best, worst, shares)


def judgements(
    rows: Sequence[Row],
    games: Mapping[int, Sequence[Game]],
    responses: Mapping[str, Response],
    read: Reader,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each game of a labelled pair in which the judge gave the label.

    The answers stand in the order that was judged. `reasoning` and `judged`, the two scores, are
    what SFT imitates.
    """
    for number, own in games.items():
        row = rows[number]
        for game in own if row.label is not None else ():
            response = responses.get(game.id)
            for text, ending in _votes(response):
                assert response
                one = dataclasses.replace(response, texts=(text,), endings=(ending,), expected=None)
                verdict = judged_game(game, one, read)
                if verdict.winner != row.label or verdict.scores is None or not reasoning(text):
                    continue
                places = [place - 1 for place in verdict.order]
                answers, better = (row.answer_1, row.answer_2), row.label
                yield {
                    "id": f"{row.id}:{'-'.join(map(str, verdict.order))}",
                    "question": row.question,
                    "answer_1": answers[places[0]],
                    "answer_2": answers[places[1]],
                    "preference": verdict.order.index(better) + 1 if better else 0,
                    "reasoning": reasoning(text),
                    "judged": [verdict.scores[place] for place in places],
                }
                break


def _votes(response: Response | None) -> Iterator[tuple[str, Any]]:
    texts = response.texts if response and response.texts else ()
    endings = (response.endings if response else None) or (None,) * len(texts)
    return zip(texts, endings, strict=True)


def _row(
    question: Any,
    answers: Sequence[str],
    best: int,
    worst: int,
    scores: Sequence[float] | None,
) -> dict[str, Any]:
    row = {"prompt": question, "chosen": answers[best], "rejected": answers[worst]}
    if scores is None:
        return row
    return {**row, "score_chosen": scores[best], "score_rejected": scores[worst]}


def _shares(ranking: Ranking, num_answers: int) -> list[float]:
    """Return the share of its games that each answer won; empty if one has none."""
    points: list[list[float]] = [[] for _ in range(num_answers)]
    for pair in ranking.pairs:
        places = [int(number) - 1 for number in pair.id.split("-")]
        for winner in (game.winner for game in pair.games):
            if winner is not None:
                points[places[0]].append(POINTS[winner])
                points[places[1]].append(1 - POINTS[winner])
    return [sum(own) / len(own) for own in points] if all(points) else []
