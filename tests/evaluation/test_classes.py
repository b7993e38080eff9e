"""Three classes of verdicts: ratios by hand, also where a class has no case or no right one."""

from __future__ import annotations

import pytest

from jlrm.evaluation.classes import classification


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
