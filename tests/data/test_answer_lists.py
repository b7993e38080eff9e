"""Rows that hold a list of answers: how they are read, and what their gold says pair by pair."""

from __future__ import annotations

import json

import pytest

from jlrm.config import DataConfig, UsageError
from jlrm.data import readers
from jlrm.data.comparisons import AnswerList, write_comparisons
from jlrm.data.splits import read_splits

ROW = {"question": "q", "answers": ["a", "b", "c", "d"]}


def read(tmp_path, *rows, is_listed: bool = True, **columns):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{i}", **r}) + "\n" for i, r in enumerate(rows)))
    part, seen = readers.read_part(str(path), columns=columns, is_listed=is_listed)
    readers.check_whole(str(path), [seen])
    return part


def test_scores_and_rankings_are_gold_pair_by_pair(tmp_path):
    scored, ranked = read(
        tmp_path, {**ROW, "scores": [5, 2, 5, "7.5"]}, {**ROW, "ranking": [2, 3, 2, 1], "extra": 1}
    ).rows
    assert isinstance(scored, AnswerList) and scored.answers == ("a", "b", "c", "d")
    assert scored.golds == scored.scores == (5, 2, 5, 7.5) and scored.label == ranked.label == 4
    assert ranked.scores is None and ranked.is_ranked and ranked.meta == {"extra": 1}
    for row in (scored, ranked):
        pairs = row.pairs()
        assert {places: pair.label for places, pair in pairs.items()} == {
            (0, 1): 1,
            (0, 2): 0,
            (0, 3): 2,
            (1, 2): 2,
            (1, 3): 2,
            (2, 3): 2,
        }
        assert (pairs[1, 3].answer_1, pairs[1, 3].answer_2) == ("b", "d")
        assert len({pair.id for pair in pairs.values()}) == 6
    assert scored.pairs()[0, 3].scores == (5, 7.5) and ranked.pairs()[0, 3].scores is None
    assert ranked.gold((1, 9)) == (5, 1, 5, 9) and scored.gold((1, 9)) == (5, 2, 5, 7.5)


def test_a_list_is_written_as_it_was_read(tmp_path):
    given = [{**ROW, "scores": [5, None, 5, 7.5]}, {**ROW, "ranking": [2, 3, 2, 1]}]
    rows = read(tmp_path, *given).rows
    write_comparisons(rows, tmp_path / "again.jsonl")
    part, _ = readers.read_part(str(tmp_path / "again.jsonl"), is_listed=True)
    assert [each.record() for each in part.rows] == [each.record() for each in rows]
    assert part.rows[0] == rows[0]
    assert part.rows[1].pairs() == rows[1].pairs()


def test_what_is_not_known_makes_no_pair(tmp_path):
    (row,) = read(tmp_path, {**ROW, "scores": [None, 2, None, 3]}).rows
    assert list(row.pairs()) == [(1, 3)] and row.scores == (2, 3) and row.label == 4
    assert row.gold((1, 10)) == ()
    part = read(tmp_path, {**ROW, "scores": [1, 2, 3, 4]}, {**ROW, "scores": [None, 2, None, None]})
    assert [each.reason for each in part.dropped] == ["no_label"]


def test_the_other_order_is_the_reverse(tmp_path):
    (row,) = read(tmp_path, {**ROW, "scores": [4, 3, 2, 1], "reasoning": "Why.", "note": "n"}).rows
    assert row.judgement == ("Why.", (4, 3, 2, 1))
    back = row.swapped()
    assert back.answers == ("d", "c", "b", "a") and back.golds == (1, 2, 3, 4)
    assert back.is_swapped and back.meta == {"note": "n"} and back.judgement is None
    assert back.swapped().golds == row.golds and not back.swapped().is_swapped


def test_columns_may_have_other_names(tmp_path):
    (row,) = read(
        tmp_path,
        {"question": "q", "responses": ["a", "b"], "ranks": [1, 2]},
        answers="responses",
        ranking="ranks",
    ).rows
    assert row.answers == ("a", "b") and row.label == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": ["a"]}, r"line 1: data\.judging=lists reads 'answers', 2 to 8 texts, got 1"),
        ({"answers": ["a"] * 9}, "2 to 8 texts, got 9"),
        ({"answers": "a"}, "2 to 8 texts, got 'a'"),
        ({"answers": None}, "2 to 8 texts, got None"),
        ({"answers": ["a", 2, "c", "d"]}, "'answers' must be text, got 2"),
        ({"scores": None}, "needs 'scores' or 'ranking', got neither"),
        ({"ranking": [1, 2, 3, 4]}, "needs 'scores' or 'ranking', got both"),
        ({"scores": [1, 2, 3]}, "'scores' must be 4 numbers, one an answer"),
        ({"scores": [1, 2, 3, "good"]}, "'scores' must be 4 numbers"),
        ({"scores": [1, 2, 3, True]}, "'scores' must be 4 numbers"),
        ({"scores": 4}, "'scores' must be 4 numbers"),
        ({"scores": None, "ranking": [3, 0, 1, 2]}, "the place of each answer, 1 for the best"),
        ({"question": 3}, "'question' must be text"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, change, said):
    with pytest.raises(UsageError, match=said):
        read(tmp_path, {**ROW, "scores": [1, 2, 3, 4], **change})


def test_lists_and_pairs_are_not_mixed(tmp_path):
    with pytest.raises(UsageError, match=r"line 1 has a list of answers, which data\.judging=list"):
        read(tmp_path, {**ROW, "scores": [1, 2, 3, 4]}, is_listed=False)
    pair = {"question": "q", "answer_1": "a", "answer_2": "b", "preference": 1}
    with pytest.raises(UsageError, match=r"line 2: data\.judging=lists reads 'answers'"):
        read(tmp_path, {**ROW, "scores": [1, 2, 3, 4]}, pair)
    with pytest.raises(UsageError, match=r"data\.train=toy has pairs"):
        read_splits(DataConfig(train="toy", judging="lists"), (1, 10), needs_scores=False)


def test_scores_outside_the_scale_rank_and_scores_may_be_mapped(tmp_path, caplog):
    rows = [{**ROW, "question": f"q{i}", "scores": [10, 90, 40, i]} for i in range(5)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{i}", **r}) + "\n" for i, r in enumerate(rows)))
    data = {"train": str(path), "judging": "lists"}
    splits = read_splits(DataConfig(**data), (1, 10), needs_scores=False)
    assert "5 of 5 rows with scores have one outside the scale" in caplog.text
    assert all(row.is_ranked and row.label == 2 for row in splits.train.mine)
    points = {"0": 1.0, "100": 11.0}
    splits = read_splits(DataConfig(**data, rescale=points), (1, 11), needs_scores=False)
    assert all(row.golds[:3] == (2, 10, 5) for row in splits.train.mine)
