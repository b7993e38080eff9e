"""Several answers to a question: rows of them, their games, and the line written of each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jlrm.config import UsageError, nearest
from jlrm.data import forms
from jlrm.data.comparisons import Where
from jlrm.evaluation.games import Game
from jlrm.reports import contracts
from jlrm.serving import rows
from jlrm.serving.asked import Orders, Pair, as_text, games_of
from jlrm.serving.results import VERSION, Ranking

FIELDS = ("question", "answers", "id")
SPELLINGS = {
    "question": forms.QUESTIONS,
    "answers": ("answers", "responses", "outputs", "completions", "candidates"),
    "id": forms.IDS,
}
MOST_ANSWERS = 32  # of a list: with both orders they play 992 games


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


def read(source: str, columns: Mapping[str, str], reference: str = "") -> list[ListRow]:
    """Return every row of a source that holds a question and a list of answers, as `rows.read`.

    Raises:
      UsageError: no such source, no row, or no row that can be judged (the first one's reason).
    """
    if unknown := sorted(columns.keys() - set(FIELDS)):
        raise UsageError(
            f"--columns: there is no field '{unknown[0]}' with --rank. "
            f"{nearest(unknown[0], FIELDS)}"
        )
    return rows.read_rows(source, columns, lambda raw, place: _row(raw, place, columns), reference)


def places(row: ListRow) -> list[tuple[int, int]]:
    """Return which answers are compared, counted from 0: each with each."""
    return list(itertools.combinations(range(len(row.answers)), 2))


def games(
    number: int, row: ListRow, orders: Orders, seed: int, told: Sequence[Any]
) -> list[list[Game]]:
    """Return the games of each comparison of a list; `told` are a rubric and what a `Pair` has."""
    return [
        games_of(
            f"{number}.{i + 1}-{j + 1}",
            Pair(row.question, row.answers[i], row.answers[j], "", row.reference, *told),
            orders,
            seed,
        )
        for i, j in places(row)
    ]


def line(row: ListRow, ranking: Ranking | None) -> RankLine:
    """Return what is written of a row; without a ranking, its reason."""
    of_row = {**row._asdict(), "error": row.error or None}
    if ranking is None:
        return RankLine((), (), (), (), (), **of_row)
    return RankLine(**vars(ranking), **of_row)


def _row(raw: object, place: Where, columns: Mapping[str, str]) -> ListRow:
    found = rows.found(raw, columns, SPELLINGS)
    if found is None:
        return ListRow(place.name, "", (), f"{place} must be an object.")
    identity = place.name if found["id"] is None else str(found["id"])
    where, answers = place._replace(source=""), found["answers"]
    try:
        if not isinstance(answers, list) or not 2 <= len(answers) <= MOST_ANSWERS:
            what = f"{len(answers)}" if isinstance(answers, list) else "no list"
            raise UsageError(f"answers must be a list of 2 to {MOST_ANSWERS}, got {what}.")
        texts = tuple(as_text(each, "an answer") for each in answers)
        return ListRow(identity, as_text(found["question"], "question"), texts)
    except UsageError as error:
        return ListRow(identity, "", (), f"{where}: {error}")
