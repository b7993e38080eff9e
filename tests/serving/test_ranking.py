"""Strengths against closed forms and against logistic regression's own solution."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jlrm.serving.ranking import NORMAL, Outcome, strengths


def test_two_answers_have_the_odds_of_their_wins():
    outcomes = [Outcome(0, 1, 1)] * 6 + [Outcome(0, 1, 2)] * 2
    values, intervals = strengths(outcomes, 2, prior=math.inf)
    assert values[0] - values[1] == pytest.approx(math.log(3), abs=1e-5)
    half = NORMAL * math.sqrt(1 / 6 + 1 / 2) / 2  # of half the log-odds
    assert intervals[0][1] - values[0] == pytest.approx(half, rel=1e-3)


def test_ties_between_two_answers_leave_the_odds_of_the_rest():
    """Davidson's model of two answers has as many parameters as there are outcomes."""
    outcomes = [Outcome(0, 1, 1)] * 6 + [Outcome(1, 0, 1)] * 2 + [Outcome(0, 1, 0)] * 5
    values, _ = strengths(outcomes, 2, prior=math.inf)
    assert values[0] - values[1] == pytest.approx(math.log(3), abs=1e-4)


def test_several_answers_fulfil_the_equations_of_maximum_likelihood():
    """Each answer has as many wins as its strength expects."""
    rng = np.random.default_rng(0)
    true = np.array([1.0, 0.3, -0.4, -0.9])
    outcomes = []
    for _ in range(600):
        i, j = rng.choice(4, 2, replace=False)
        is_first = rng.random() < 1 / (1 + math.exp(true[j] - true[i]))
        outcomes.append(Outcome(int(i), int(j), 1 if is_first else 2))
    values, intervals = strengths(outcomes, 4, prior=math.inf)
    for answer in range(4):
        games = [each for each in outcomes if answer in each[:2]]
        won = sum((each.winner == 1) == (each.first == answer) for each in games)
        expected = sum(
            1 / (1 + math.exp(values[each.first + each.second - answer] - values[answer]))
            for each in games
        )
        assert won == pytest.approx(expected, abs=1e-3)
    inside = [
        low < value < high for value, (low, high) in zip(true - true.mean(), intervals, strict=True)
    ]
    assert all(inside)


def test_an_answer_that_always_wins_has_a_finite_strength():
    values, intervals = strengths([Outcome(0, 1, 1)] * 4, 2)
    assert 0 < values[0] < 10 and all(map(math.isfinite, intervals[0]))


def test_without_any_outcome_nothing_is_known():
    values, intervals = strengths([], 3)
    assert values == (0, 0, 0) and all(low < -3 < 3 < high for low, high in intervals)


def test_answers_that_nothing_tells_apart_are_equal_to_the_last_bit():
    """Else the minimiser's noise would rank them."""
    outcomes = [Outcome(i, j, 0) for i in range(4) for j in range(i)]
    assert strengths(outcomes, 4).values == (0, 0, 0, 0)
    equal = strengths([Outcome(0, 1, 1), Outcome(0, 2, 1), Outcome(1, 2, 0)], 3).values
    assert equal[0] > equal[1] == equal[2]
