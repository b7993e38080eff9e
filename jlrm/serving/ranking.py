"""Strengths of answers from comparisons of two: Bradley and Terry's model, with Davidson's ties.

Answer i beats j with probability p_i / (p_i + p_j + v * sqrt(p_i p_j)), and ties with the last term
over the same sum (Davidson 1970). The logarithms of p are estimated by maximum likelihood with a
weak normal prior, without which an answer that always wins has no finite strength.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from jlrm.evaluation.games import Game, Response
from jlrm.evaluation.reading import Reader, criteria_of, expected_of, read_list
from jlrm.judgement.verdict import preferred
from jlrm.serving.calibration import ConfidenceMap
from jlrm.serving.results import (
    POINTS,
    JudgedGame,
    JudgedList,
    JudgedPair,
    Ranking,
    ScoredAnswer,
    put_together,
)

DECIMALS = 6  # of strengths: what is left below is the minimiser's noise
PRIOR = 3.0  # standard deviation of the strengths before anything is known
NORMAL = 1.959963984540054  # standard errors of a 95 % interval


class Outcome(NamedTuple):
    """One comparison: `winner` is 1 (the first), 2 or 0 (a tie)."""

    first: int  # counted from 0
    second: int
    winner: int


class Strengths(NamedTuple):
    """Log-strengths, which sum to zero, and their 95 % intervals."""

    values: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]


def strengths(outcomes: Sequence[Outcome], num_answers: int, prior: float = PRIOR) -> Strengths:
    """Return the strength of each answer.

    Args:
      prior: standard deviation of the normal prior; `inf` for plain maximum likelihood.
    """
    table = np.array(outcomes, int).reshape(-1, 3)
    first, second, winner = table.T
    has_ties = bool((winner == 0).any())

    def loss(theta: np.ndarray) -> float:
        strength, tie = theta[:num_answers], theta[num_answers]
        one, two = strength[first], strength[second]
        drawn = tie + (one + two) / 2 if has_ties else np.full(len(one), -np.inf)
        total = np.logaddexp(np.logaddexp(one, two), drawn)
        chosen = np.choose(winner, [drawn, one, two])
        return float((total - chosen).sum()) + float((strength**2).sum()) / (2 * prior**2)

    start = np.zeros(num_answers + 1)
    found = optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-9})
    values = found.x[:num_answers] - found.x[:num_answers].mean()
    values = np.round(values, DECIMALS) + 0.0  # a tie is one, and no -0.0
    errors = _standard_errors(loss, found.x, num_answers, has_ties)
    intervals = [
        (float(value - NORMAL * error), float(value + NORMAL * error))
        for value, error in zip(values, errors, strict=True)
    ]
    return Strengths(tuple(map(float, values)), tuple(intervals))


def _standard_errors(
    loss: Callable[[np.ndarray], float], at: np.ndarray, num_answers: int, has_ties: bool
) -> np.ndarray:
    """Return the standard errors of the strengths less their mean, by the observed information."""
    size = num_answers + has_ties
    step, information = 1e-3, np.empty((size, size))
    for i in range(size):
        for j in range(size):
            shifts = np.zeros((2, len(at)))
            shifts[0, i] += step
            shifts[1, j] += step
            a, b = shifts
            information[i, j] = (
                loss(at + a + b) - loss(at + a - b) - loss(at - a + b) + loss(at - a - b)
            ) / (4 * step**2)
    covariance = np.linalg.pinv(information)[:num_answers, :num_answers]
    centre = np.eye(num_answers) - 1 / num_answers
    return np.sqrt(np.clip(np.diag(centre @ covariance @ centre), 0, None))


def ranked(judged: Sequence[JudgedPair], num_answers: int) -> Ranking:
    """Return the ranking that the pairs of `asked.each_beside_each` come to, once judged.

    Every game counts: two orders that disagree are a win for each.
    """
    outcomes = _outcomes(judged)
    found = strengths(outcomes, num_answers)
    order = sorted(range(num_answers), key=lambda i: (-found.values[i], i))
    wins = _wins(outcomes, num_answers)
    return Ranking(tuple(i + 1 for i in order), found.values, found.intervals, wins, tuple(judged))


def ranked_at_once(
    judged: Sequence[JudgedList], read: Reader, calibrated: ConfidenceMap | None = None
) -> Ranking:
    """Return the ranking by the mean scores of answers in judgements of all of them.

    Of answers with the same mean the one with the higher expected score is before the other.
    """
    means = _means([each.scores for each in judged])
    expected = _means([each.expected_scores for each in judged if each.expected_scores]) or None
    more = [-(score or 0) for score in expected or [0] * len(means)]
    known = [(-mean, more[i], i + 1) for i, mean in enumerate(means) if mean is not None]
    pairs = tuple(
        put_together(f"{i + 1}-{j + 1}", [_game(each, i, j) for each in judged], read, calibrated)
        for i, j in itertools.combinations(range(len(means)), 2)
    )
    order, wins = tuple(i for *_, i in sorted(known)), _wins(_outcomes(pairs), len(means))
    return Ranking(order, (), (), wins, pairs, means, tuple(judged), expected)


def _means(scores: Sequence[Sequence[float | None]]) -> tuple[float | None, ...]:
    """Return the mean score of each answer over judgements; None where none gives it one."""
    columns = ([score for score in own if score is not None] for own in zip(*scores, strict=True))
    return tuple(statistics.fmean(own) if own else None for own in columns)


def judged_list(game: Game, response: Response | None, read: Reader) -> JudgedList:
    """Read what was said of answers that were judged at once."""
    order, none = tuple(place + 1 for place in game.shown), (None,) * len(game.shown)
    if response is None or response.error is not None:
        error = response.error if response else "it was not judged"
        return JudgedList(order, none, "unjudged", (), None, error)
    if response.refused is not None:
        return JudgedList(order, none, "refused", (), None, response.refused)
    scores, status = read_list(game, response, read)

    def as_given(shown: Sequence[float | None]) -> tuple[float | None, ...]:
        return tuple(score for _, score in sorted(zip(game.shown, shown, strict=True)))

    criteria = criteria_of(game, response, read) or {}
    expected = expected_of(game, response, read)
    return JudgedList(
        order,
        as_given(scores or none),
        status,
        response.texts or (),
        response.num_tokens,
        criteria={name: as_given(each) for name, each in criteria.items()} or None,
        expected_scores=as_given(expected) if expected else None,
    )


def one_by_one(scored: Sequence[ScoredAnswer]) -> JudgedList:
    """Return the scores of answers that were judged each by itself as one judgement."""
    failed = next((each for each in scored if each.score is None), None)
    counts = [each.num_tokens for each in scored if each.num_tokens is not None]
    expected = tuple(each.expected_score for each in scored)
    return JudgedList(
        tuple(range(1, len(scored) + 1)),
        tuple(each.score for each in scored),
        failed.status if failed else "ok",
        tuple(text for each in scored for text in each.texts),
        sum(counts) if counts else None,
        failed.error if failed else None,
        expected_scores=expected if any(each is not None for each in expected) else None,
    )


def _game(judged: JudgedList, i: int, j: int) -> JudgedGame:
    """Return what a judgement says of two of its answers; its texts stand there alone."""
    one, two = judged.scores[i], judged.scores[j]
    scores = None if one is None or two is None else (one, two)
    is_swapped = judged.order.index(i + 1) > judged.order.index(j + 1)
    status = "ok" if scores else judged.status
    winner = preferred(*scores) if scores else None
    order = (2, 1) if is_swapped else (1, 2)
    return JudgedGame(order, winner, scores, status, (), None, None if scores else judged.error)


def _outcomes(judged: Sequence[JudgedPair]) -> list[Outcome]:
    return [
        Outcome(first, second, game.winner)
        for pair in judged
        for first, second in [[int(number) - 1 for number in pair.id.split("-")]]
        for game in pair.games
        if game.winner is not None
    ]


def _wins(outcomes: Sequence[Outcome], num_answers: int) -> tuple[float, ...]:
    wins = [0.0] * num_answers
    for first, second, winner in outcomes:
        wins[first] += POINTS[winner]
        wins[second] += 1 - POINTS[winner]
    return tuple(wins)
