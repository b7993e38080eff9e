"""What the page of a run says of a judgement."""

from __future__ import annotations

from jlrm.reports import run_page


def test_an_answer_beside_which_the_other_was_not_read_is_shown():
    row = {"verdict": [4.0], "label": 1}
    assert run_page._outcome({**row, "is_right": False}) == "wrong"
    assert run_page._outcome({**row, "verdict": [4.0, 2.0]}) == "right"
    assert run_page._outcome({**row, "verdict": None, "is_right": False}) == "unparsed"
    assert run_page._outcome({"verdict": [4.0, 2.0], "label": None, "is_right": None}) == (
        "unlabelled"
    )
