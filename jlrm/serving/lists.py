"""Several answers to a question: rows of them, their games, and the line written of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jlrm.config import UsageError
from jlrm.data import forms
from jlrm.evaluation.games import Game, Response
from jlrm.evaluation.reading import Reader
from jlrm.judgement.prompts import MOST_LISTED
from jlrm.reports import contracts
from jlrm.serving import rows
from jlrm.serving.asked import (
    Listed,
    Orders,
    as_text,
    each_beside_each,
    games_at_once,
    games_of,
)
from jlrm.serving.calibration import ConfidenceMap
from jlrm.serving.ranking import judged_list, ranked, ranked_at_once
from jlrm.serving.results import VERSION, Ranking, judged_pair

SPELLINGS = {
    "question": forms.QUESTIONS,
    "answers": ("answers", "responses", "outputs", "completions", "candidates"),
    "id": forms.IDS,
}
MOST_ANSWERS = 32  # of a list: with both orders they play 992 games
AT_ONCE = ""  # where a pair's id would stand, of games in which all answers are judged at once


class ListRow(NamedTuple):
    """A line of the input with several answers. error: why it can't be judged; "" if it can."""

    id: str
    question: str
    answers: tuple[str, ...]
    error: str = ""
    reference: str | None = None


@dataclass(frozen=True, repr=False)
class RankLine(Ranking):
    """A line of `verdicts.jsonl` where answers were ranked."""

    id: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    error: str | None = None
    version: int = VERSION
    reference: str | None = field(default=None, metadata=contracts.LEFT_OUT)


def read(
    source: str, columns: Mapping[str, str], reference: str = "", at_once: bool = False
) -> list[ListRow]:
    """Return every row of a source that holds a question and a list of answers, as `rows.read`.

    Raises:
      UsageError: no such source, no row, or no row that can be judged (the first one's reason).
    """

    def row(identity: str, given: Mapping[str, Any], error: str) -> ListRow:
        if error:
            return ListRow(identity, "", (), error)
        answers = given["answers"]
        most = MOST_LISTED if at_once else MOST_ANSWERS
        if not isinstance(answers, list) or not 2 <= len(answers) <= most:
            what = f"{len(answers)}" if isinstance(answers, list) else "no list"
            told = " where they are judged at once (--no-at-once takes more)" if at_once else ""
            raise UsageError(f"answers must be a list of 2 to {most}{told}, got {what}.")
        texts = tuple(as_text(each, "an answer") for each in answers)
        return ListRow(identity, as_text(given["question"], "question"), texts)

    return rows.read_form(source, columns, SPELLINGS, "--rank", row, reference)


def games(
    number: int, row: ListRow, orders: Orders, seed: int, told: Sequence[Any], at_once: bool
) -> dict[str, list[Game]]:
    """Return the games of a list, by the pairs' ids or at once; `told` as of `each_beside_each`."""
    if at_once:
        asked = Listed(row.question, row.answers, row.reference, *told)
        return {AT_ONCE: games_at_once(number, asked, orders, seed)}
    pairs = each_beside_each(row.question, row.answers, row.reference, *told)
    return {pair.id: games_of(f"{number}.{pair.id}", pair, orders, seed) for pair in pairs}


def ranking(
    own: Mapping[str, Sequence[Game]],
    responses: Mapping[str, Response],
    num_answers: int,
    read: Reader,
    calibrated: ConfidenceMap | None,
) -> Ranking:
    """Return what the responses to the games of a list come to."""

    def said(pair: Sequence[Game]) -> list[Response | None]:
        return [responses.get(game.id) for game in pair]

    if AT_ONCE in own:
        at_once = zip(own[AT_ONCE], said(own[AT_ONCE]), strict=True)
        return ranked_at_once([judged_list(*each, read) for each in at_once], read, calibrated)
    judged = [judged_pair(name, pair, said(pair), read, calibrated) for name, pair in own.items()]
    return ranked(judged, num_answers)


def line(row: ListRow, ranking: Ranking | None) -> RankLine:
    """Return what is written of a row; without a ranking, its reason."""
    of_row = {**row._asdict(), "error": row.error or None}
    if ranking is None:
        return RankLine((), (), (), (), (), **of_row)
    return RankLine(**vars(ranking), **of_row)
