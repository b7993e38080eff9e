"""Gold scores on another scale are counted and said, and a setting maps them."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlrm.config import UsageError
from jlrm.data.comparisons import Comparison
from jlrm.data.scales import describe_off_scale, rescaled
from jlrm.data.sharded import deal
from jlrm.data.worlds import toy
from jlrm.judgement.verdict import preferred

SCALE = (1, 10)


def scored(*pairs: tuple[float, float]) -> list[Comparison]:
    return [Comparison(str(i), "q", "a", "b", *pair) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize(
    ("pairs", "points", "mapped"),
    [
        ([(90, 30), (0, 100)], {"0": 1, "100": 10}, [(9.1, 3.7), (1, 10)]),
        ([(0.9, 0.3), (1, 0)], {"0": 1, "1": 10}, [(9.1, 3.7), (10, 1)]),
    ],
)
def test_scores_of_another_scale_are_counted_and_the_advice_mends_them(pairs, points, mapped):
    rows = deal([*scored((5, 6), *pairs), Comparison("p", "q", "a", "b", preference=1)][1:])
    said = describe_off_scale(rows, SCALE, "x.jsonl")
    assert said.startswith("x.jsonl: 2 of 2 rows with scores")
    left, right = (f"{key}: {value}" for key, value in points.items())
    assert f"data.rescale={{{left}, {right}}}" in said and "reward.max_score" in said
    after = rescaled(rows, points)
    assert [row.scores for row in after.mine] == [*mapped, None]
    assert describe_off_scale(after, SCALE, "x.jsonl") == ""


def test_scores_on_the_scale_are_left_alone_and_nothing_is_said():
    rows = deal([*toy.comparisons(seed=1, num_rows=20), *scored((1, 10))])
    assert describe_off_scale(rows, SCALE, "x") == "" and rescaled(rows, {}) is rows
    assert "1 of 21 rows" in describe_off_scale(
        deal([*rows.mine[:20], *scored((0, 5))]), SCALE, "x"
    )
    assert describe_off_scale(deal([]), SCALE, "x") == ""


@pytest.mark.parametrize(
    "points",
    [
        *({"0": 1}, {"0": 1, "x": 2}, {"0": 1, "1": 1}, {"0": 2, "1": 1}, {"0": 1, "0.0": 2}),
        *({"0": 1, "inf": 2}, {"0": 1, "1": float("nan")}, {"0": 1, "1": 2, "2": 3}),
    ],
)
def test_what_is_no_rising_line_is_refused(points):
    with pytest.raises(UsageError, match=r"data\.rescale=.* is no rising line"):
        rescaled(deal(scored((1, 2))), points)


def test_scores_of_a_written_judgement_go_along():
    (row,) = toy.comparisons(seed=1, num_rows=1)
    row = dataclasses.replace(row, meta={**row.meta, "judged": [2.0, 4.0]})
    (after,) = rescaled(deal([row]), {"0": 0, "10": 100}).mine
    assert after.meta == {**row.meta, "judged": [20.0, 40.0]}


def test_a_written_judgement_goes_along_where_the_row_has_a_preference_alone():
    (row,) = toy.comparisons(seed=1, num_rows=1)
    meta = {"reasoning": "So.", "judged": [90.0, 40.0]}
    row = dataclasses.replace(row, score_1=None, score_2=None, preference=1, meta=meta)
    (after,) = rescaled(deal([row]), {"0": 1, "100": 10}).mine
    assert after.scores is None and after.judgement == ("So.", (9.1, 4.6))


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 5), st.floats(10, 1e6))
def test_the_better_answer_stays_the_better_one(one, two, low, high):
    (row,) = rescaled(deal(scored((one, two))), {"0": low, "1": high}).mine
    assert row.scores and preferred(*row.scores) in (preferred(one, two), 0)
    if abs(one - two) > 1e-3:
        assert preferred(*row.scores) == preferred(one, two)
