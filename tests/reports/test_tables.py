"""Tables and times as text."""

from __future__ import annotations

import pytest

from jlrm.reports.tables import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (435, "7 min 15 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (3700, "1 h 2 min"),
    ],
)
def test_a_time_is_said_once_in_one_way(seconds, text):
    assert duration(seconds) == text
