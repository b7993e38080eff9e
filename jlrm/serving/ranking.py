"""Strengths of answers from comparisons of two: Bradley and Terry's model, with Davidson's ties.

Answer i beats j with probability p_i / (p_i + p_j + v * sqrt(p_i p_j)), and ties with the last term
over the same sum (Davidson 1970). The logarithms of p are estimated by maximum likelihood with a
weak normal prior, without which an answer that always wins has no finite strength.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from jlrm.serving.results import POINTS, JudgedPair, Ranking

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
    outcomes, wins = [], [0.0] * num_answers
    for pair in judged:
        first, second = (int(number) - 1 for number in pair.id.split("-"))
        for game in pair.games:
            if game.winner is None:
                continue
            outcomes.append(Outcome(first, second, game.winner))
            wins[first] += POINTS[game.winner]
            wins[second] += 1 - POINTS[game.winner]
    found = strengths(outcomes, num_answers)
    order = sorted(range(num_answers), key=lambda i: (-found.values[i], i))
    return Ranking(
        tuple(i + 1 for i in order), found.values, found.intervals, tuple(wins), tuple(judged)
    )
