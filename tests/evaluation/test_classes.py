"""Three classes of verdicts: ratios by hand, also where a class has no case or no right one."""

from __future__ import annotations

import pytest

from jlrm.evaluation.benchmark import Credit
from jlrm.evaluation.classes import classification, swap_metrics
from jlrm.evaluation.games import Item


def test_a_class_that_is_never_said_rightly_has_no_precision_recall_or_f1():
    """Label 0 occurs once and is called 1; label 2 never occurs and is said once."""
    metrics = classification({(1, 1): 3, (1, 2): 1, (0, 1): 1})
    assert metrics == pytest.approx(
        {
            "accuracy": 60.0,
            "precision": 100 * (0 + 3 / 4 + 0) / 3,
            "recall": 100 * (0 + 3 / 4 + 0) / 3,
            "f1": 100 * (0 + 2 * 3 / 8 + 0) / 3,
        }
    )


def test_a_missing_verdict_is_wrong_and_no_class_of_its_own():
    metrics = classification({(1, 1): 1, (1, None): 1})
    assert metrics == pytest.approx(
        {"accuracy": 50.0, "precision": 100.0, "recall": 50.0, "f1": 100 * 2 / 3}
    )


def test_a_pair_with_a_missing_verdict_leans_to_no_place():
    """Of four pairs one names the place shown first twice, one the second; two lack a verdict."""
    item = Item("a", "?", ("x", "y"), label=1)
    verdicts = [(1, 2), (2, 1), (None, 1), (1, None)]  # of the answers, as given and swapped
    metrics = swap_metrics([Credit(item, 0.0, said) for said in verdicts])
    assert metrics["prefer_before_rate"] == metrics["prefer_after_rate"] == 25.0
    assert metrics["delta_bias"] == 0.0 and metrics["total_bias"] == 50.0
    assert metrics["consistency"] == 0.0


def test_pairs_that_were_judged_once_say_nothing_of_order():
    item = Item("a", "?", ("x", "y"), label=1)
    twice = [Credit(item, 0.0, said) for said in ((1, 1), (1, 2))]
    once = [Credit(item, 0.0, said) for said in ((1,), (2,), ())]
    assert swap_metrics([*twice, *once]) == swap_metrics(twice)
    assert swap_metrics(once) == {}
