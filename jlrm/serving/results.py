"""What a judge's user gets: a pair's verdict with the games behind it, and a ranking of answers.

All are frozen, print in a line, become plain dictionaries by `to_dict`, and show as a table in
notebooks, where what a judge wrote is text and never HTML.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jlrm.evaluation.games import Game, GameVerdict, Response
from jlrm.evaluation.reading import Reader, criteria_of, expected_of, read_response
from jlrm.judgement.verdict import (
    implied_probability,
    is_consistent,
    preferred,
    swap_preference,
)
from jlrm.reports import contracts
from jlrm.serving.calibration import ConfidenceMap

VERSION = 1  # of verdicts.jsonl
NAMES = {1: "answer 1", 2: "answer 2", 0: "a tie", None: "no verdict"}
POINTS = {1: 1.0, 2: 0.0, 0: 0.5}  # of answer 1, by the winner
SHOWN = 300  # characters of a reason on a notebook's page
Scores = tuple[float, float]


class Plain:
    """What becomes plain values."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain dictionaries and lists."""
        return contracts.encode(self)


@dataclass(frozen=True)
class JudgedGame(Plain):
    """One order of a pair; `winner` and `scores` are of the answers as they were given.

    order: the answer that was shown first and the one shown second, (1, 2) or (2, 1). texts: what
    the judge wrote, one for each vote. criteria, expected_scores: as of `JudgedPair`.
    """

    order: tuple[int, int]
    winner: int | None
    scores: tuple[float, float] | None
    status: str
    texts: tuple[str, ...]
    num_tokens: int | None
    error: str | None = None
    criteria: dict[str, Scores] | None = field(default=None, metadata=contracts.LEFT_OUT)
    expected_scores: Scores | None = field(default=None, metadata=contracts.LEFT_OUT)


@dataclass(frozen=True, repr=False)
class JudgedPair(Plain):
    """What a judge says of two answers.

    winner: 1 or 2, 0 for a tie, None where no game has a verdict. With both orders it is what the
      mean scores say (a tie within `tie_margin`, or what `judge check --calibrate` fitted); of
      verdicts without scores a tie, if they name different answers.
    scores: means over the games that gave some.
    confidence: the probability of the winner that the margin of the scores states, from 0.5 to 1;
      with `is_calibrated`, how often verdicts of such a margin were right where a map was fitted
      (serving/calibration.py). None without scores, or for a tie.
    is_consistent: whether both orders name the same answer; None where one order was judged.
    status: "ok", or why there is no verdict (of the games, the first that failed).
    criteria: with a rubric of criteria, the scores of both answers by each: means over the games
      that gave some, whose means by weight `scores` are.
    expected_scores: where they are wanted, the scores to be expected by the probabilities that the
      judge gave all scores where it wrote one; means over votes and games.
    """

    winner: int | None
    scores: tuple[float, float] | None
    confidence: float | None
    is_consistent: bool | None
    reason: str
    status: str
    games: tuple[JudgedGame, ...]
    num_tokens: int | None
    id: str = ""
    error: str | None = None
    is_calibrated: bool = False
    criteria: dict[str, Scores] | None = field(default=None, metadata=contracts.LEFT_OUT)
    expected_scores: Scores | None = field(default=None, metadata=contracts.LEFT_OUT)

    def __repr__(self) -> str:
        parts = [NAMES[self.winner]]
        if self.scores:
            parts.append(f"scores {self.scores[0]:g} and {self.scores[1]:g}")
        if self.confidence is not None:
            parts.append(f"confidence {self.confidence:.2f}")
        if self.is_consistent is not None:
            parts.append("both orders agree" if self.is_consistent else "the orders disagree")
        if self.error or self.status != "ok":
            parts.append(self.error or self.status)
        return f"<{', '.join(parts)}>"

    def _repr_html_(self) -> str:
        games = [
            (f"shown {game.order[0]}, {game.order[1]}", NAMES[game.winner]) for game in self.games
        ]
        scored = [
            (name, f"{one:g} and {two:g}") for name, (one, two) in (self.criteria or {}).items()
        ]
        if self.expected_scores:
            expected = "{:.2f} and {:.2f}".format(*self.expected_scores)
            scored.append(("expected scores", expected))
        return _table(
            [("verdict", repr(self)[1:-1]), *games, *scored, ("reason", self.reason[:SHOWN])]
        )


@dataclass(frozen=True, repr=False)
class ScoredAnswer(Plain):
    """What a judge says of one answer.

    score: the mean of the votes that give one; None where none does. status: "ok", or why there is
    no score. texts: what the judge wrote, one for each vote. criteria: the scores by each criterion
    of a rubric. expected_score: as the expected scores of a `JudgedPair`.
    """

    score: float | None
    reason: str
    status: str
    texts: tuple[str, ...]
    num_tokens: int | None
    id: str = ""
    error: str | None = None
    criteria: dict[str, float] | None = field(default=None, metadata=contracts.LEFT_OUT)
    expected_score: float | None = field(default=None, metadata=contracts.LEFT_OUT)

    def __repr__(self) -> str:
        return (
            f"<{f'score {self.score:g}' if self.score is not None else self.error or self.status}>"
        )

    def _repr_html_(self) -> str:
        return _table([("score", repr(self)[1:-1]), ("reason", self.reason[:SHOWN])])


@dataclass(frozen=True, repr=False)
class VerdictLine(JudgedPair):
    """A line of `verdicts.jsonl`: a verdict with its pair and label, all that an audit needs."""

    question: str = ""
    answer_1: str = ""
    answer_2: str = ""
    label: int | None = None
    version: int = VERSION
    reference: str | None = field(default=None, metadata=contracts.LEFT_OUT)


@dataclass(frozen=True, repr=False)
class ScoreLine(ScoredAnswer):
    """A line of `verdicts.jsonl` where single answers were scored."""

    question: str = ""
    answer: str = ""
    version: int = VERSION
    reference: str | None = field(default=None, metadata=contracts.LEFT_OUT)


@dataclass(frozen=True)
class JudgedList(Plain):
    """One judgement of several answers; `scores` are of the answers as they were given.

    order: the answers by their numbers, counted from 1, as they were shown. texts: what the judge
    wrote, one for each vote. Of a judge of single answers: what it wrote of each, one by one.
    criteria: with a rubric of criteria, the scores of the answers by each, whose means by weight
    `scores` are. expected_scores: as of a `JudgedPair`.
    """

    order: tuple[int, ...]
    scores: tuple[float | None, ...]  # of an answer without one None
    status: str
    texts: tuple[str, ...]
    num_tokens: int | None
    error: str | None = None
    criteria: dict[str, tuple[float | None, ...]] | None = field(
        default=None, metadata=contracts.LEFT_OUT
    )
    expected_scores: tuple[float | None, ...] | None = field(
        default=None, metadata=contracts.LEFT_OUT
    )


@dataclass(frozen=True, repr=False)
class Ranking(Plain):
    """Answers from the best to the worst.

    order: the numbers of the answers, counted from 1. strengths: of each answer, the logarithm of
    its odds against an average one (serving/ranking.py); intervals: of 95 %.

    Where answers are judged at once (or each by itself) `judgements` holds what was said, and
    `scores` the mean of each answer, by which they are ordered, and where these are equal by
    `expected_scores`, if they are wanted. There are no strengths: pairs that one judgement decides
    say nothing of how sure it is. `pairs` are read off the scores. Answers without a score are left
    out of the order.
    """

    order: tuple[int, ...]
    strengths: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    wins: tuple[float, ...]  # of each answer, a tie counting a half
    pairs: tuple[JudgedPair, ...]
    scores: tuple[float | None, ...] | None = field(default=None, metadata=contracts.LEFT_OUT)
    judgements: tuple[JudgedList, ...] | None = field(default=None, metadata=contracts.LEFT_OUT)
    expected_scores: tuple[float | None, ...] | None = field(
        default=None, metadata=contracts.LEFT_OUT
    )

    @property
    def games(self) -> tuple[JudgedGame | JudgedList, ...]:
        """What was asked of the judge."""
        return self.judgements or tuple(game for pair in self.pairs for game in pair.games)

    @property
    def consistency(self) -> float | None:
        """The share of the pairs of which both orders say the same; None without both orders."""
        said = [pair.is_consistent for pair in self.pairs if pair.is_consistent is not None]
        return sum(said) / len(said) if said else None

    def __repr__(self) -> str:
        if self.scores is not None:
            return f"<{self._by_scores()}>"
        listed = " > ".join(f"{i} ({self.strengths[i - 1]:+.2f})" for i in self.order)
        return f"<ranking {listed}>"

    def _by_scores(self) -> str:
        scores = self.scores or ()
        listed = " > ".join(f"{i} ({scores[i - 1]:g})" for i in self.order)
        if not listed:
            return f"no ranking, {self.games[0].error or self.games[0].status}"
        agree = self.consistency
        told = "" if agree is None else f", the orders agree on {100 * agree:.0f} % of the pairs"
        return f"ranking {listed}{told}"

    def _repr_html_(self) -> str:
        if self.scores is not None:
            return _table([("ranking", self._by_scores())])
        return _table(
            [
                (
                    f"answer {i}",
                    f"{self.strengths[i - 1]:+.2f} [{self.intervals[i - 1][0]:+.2f}, "
                    f"{self.intervals[i - 1][1]:+.2f}], {self.wins[i - 1]:g} wins",
                )
                for i in self.order
            ]
        )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows
    )
    return f"<table>{cells}</table>"


def judged_pair(
    identity: str,
    games: Sequence[Game],
    responses: Sequence[Response | None],
    read: Reader,
    calibrated: ConfidenceMap | None = None,
) -> JudgedPair:
    """Put the games of one pair together.

    calibrated: maps the confidence that scores state, and says below which the pair is a tie.
    """
    played = [judged_game(*each, read) for each in zip(games, responses, strict=True)]
    return put_together(identity, played, read, calibrated)


def put_together(
    identity: str,
    played: Sequence[JudgedGame],
    read: Reader,
    calibrated: ConfidenceMap | None = None,
) -> JudgedPair:
    """Return the verdict of games of one pair that were read; as `judged_pair`."""
    scored = [game.scores for game in played if game.scores]
    named = [game.winner for game in played if game.winner is not None]
    failed = next((game for game in played if game.winner is None), None)
    winner = confidence = None
    if scores := _mean(scored):
        first, second = scores
        winner = preferred(first, second)
        span = read.scale[1] - read.scale[0]
        probability = implied_probability(first, second, span)
        stated = max(probability, 1 - probability)
        is_close = abs(first - second) <= read.tie_margin
        if is_close or (calibrated is not None and stated <= calibrated.tie_below):
            winner = 0
        if winner:
            confidence = calibrated(stated) if calibrated else stated
    elif named:
        winner = named[0] if len(set(named)) == 1 else 0
    counts = [game.num_tokens for game in played if game.num_tokens is not None]
    return JudgedPair(
        winner=winner,
        scores=scores,
        confidence=confidence,
        is_consistent=is_consistent(*(game.winner for game in played))
        if len(played) == 2
        else None,
        reason=next((reasoning(text) for game in played for text in game.texts), ""),
        status=failed.status if failed else "ok",
        games=tuple(played),
        num_tokens=sum(counts) if counts else None,
        id=identity,
        error=next((game.error for game in played if game.error), None),
        is_calibrated=calibrated is not None and confidence is not None,
        criteria=_mean_criteria([game.criteria for game in played if game.criteria]),
        expected_scores=_mean([game.expected_scores for game in played if game.expected_scores]),
    )


def _mean(scores: Sequence[Scores]) -> Scores | None:
    if not scores:
        return None
    one, two = (sum(column) / len(scores) for column in zip(*scores, strict=True))
    return one, two


def _mean_criteria(games: Sequence[dict[str, Scores]]) -> dict[str, Scores] | None:
    names = games[0] if games else ()
    return {name: _mean([game[name] for game in games]) or (0.0, 0.0) for name in names} or None


def judged_game(game: Game, response: Response | None, read: Reader) -> JudgedGame:
    """Read one game, and turn its verdict to the answers as they were given."""
    order = game.first + 1, game.second + 1
    if response is None or response.error is not None:
        error = response.error if response else "it was not judged"
        return JudgedGame(order, None, None, "unjudged", (), None, error)
    verdict: GameVerdict = read_response(game, response, read)
    is_swapped = game.first > game.second

    def as_given(scores: Any) -> Any:
        return (scores[1], scores[0]) if scores is not None and is_swapped else scores

    criteria = criteria_of(game, response, read)
    return JudgedGame(
        order,
        winner=swap_preference(verdict.preference) if is_swapped else verdict.preference,
        scores=as_given(verdict.scores),
        status=verdict.status,
        texts=response.texts or (),
        num_tokens=response.num_tokens,
        error=response.refused,
        criteria=criteria and {name: as_given(each) for name, each in criteria.items()},
        expected_scores=as_given(expected_of(game, response, read)),
    )


def scored_answer(
    identity: str, game: Game, response: Response | None, read: Reader
) -> ScoredAnswer:
    """Read what was said of one answer."""
    if response is None or response.error is not None:
        error = response.error if response else "it was not judged"
        return ScoredAnswer(None, "", "unjudged", (), None, identity, error)
    if response.refused is not None:
        return ScoredAnswer(None, "", "refused", (), None, identity, response.refused)
    texts = response.texts or ()
    endings = response.endings or (None,) * len(texts)
    votes = [read.read_one(*each, game.item.rubric) for each in zip(texts, endings, strict=True)]
    (expected,) = expected_of(game, response, read) or (None,)
    scores = [score for score, _ in votes if score is not None]
    return ScoredAnswer(
        score=sum(scores) / len(scores) if scores else None,
        reason=next(map(reasoning, texts), ""),
        status="ok" if scores else next((status for _, status in votes), "no_answer"),
        texts=texts,
        num_tokens=response.num_tokens,
        id=identity,
        criteria=criteria_of(game, response, read),
        expected_score=expected,
    )


def reasoning(text: str) -> str:
    """Return what a judge wrote before its verdict."""
    return text.rpartition("</think>")[0].strip() or text.partition("<answer>")[0].strip()
