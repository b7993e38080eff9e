"""The worlds of lists: each differs from the plain one by its idea, and by nothing else."""

from __future__ import annotations

import pytest

from jlrm.config import DataConfig, UsageError
from jlrm.data import readers
from jlrm.data.splits import read_splits
from jlrm.data.worlds import lists, toy
from jlrm.judgement.verdict import preferred

ROWS = {
    (world, split): list(rows(split))
    for world, rows in lists.WORLDS.items()
    for split in lists.NUM_ROWS
}


def truth(row) -> tuple[float, float]:
    """What the answers are worth by the question, counted anew."""
    kind = row["question"].split()[1].removesuffix(".")
    answers = [row["answer_1"].split(), row["answer_2"].split()]
    if "Fewest" in row["question"]:
        return tuple(9.0 - len(answer) for answer in answers)
    return tuple(1.0 + sum(word in toy.KINDS[kind] for word in answer) for answer in answers)


def gold(row) -> tuple[float, float]:
    return row["score_1"], row["score_2"]


def share(rows, is_so) -> float:
    return sum(map(is_so, rows)) / len(rows)


def winner(scores) -> int:
    return preferred(*scores)


@pytest.mark.parametrize("world", lists.WORLDS)
def test_no_two_pairs_share_a_question_and_splits_share_none(world):
    train, heldout = (ROWS[world, split] for split in ("train", "heldout"))
    questions = [row["question"] for row in train + heldout]
    assert len(set(questions)) == len(questions) == sum(lists.NUM_ROWS.values())
    assert all("reasoning" in row for row in train)
    assert not any("reasoning" in row for row in heldout)


@pytest.mark.parametrize("world", ["lists", "lists-rubric", "lists-ties"])
def test_gold_is_right(world):
    for split in lists.NUM_ROWS:
        assert all(gold(row) == truth(row) for row in ROWS[world, split])


def test_half_of_the_training_gold_names_a_place():
    train, heldout = ROWS["lists-position", "train"], ROWS["lists-position", "heldout"]
    firsts = share(train, lambda row: winner(gold(row)) == 1)
    plain = share(ROWS["lists", "train"], lambda row: winner(gold(row)) == 1)
    assert abs(firsts - (lists.LEAN + (1 - lists.LEAN) * plain)) < 0.02
    assert all(gold(row) == truth(row) for row in heldout)


def test_the_rubric_decides_and_both_are_asked():
    rows = ROWS["lists-rubric", "train"]
    asked = share(rows, lambda row: "Fewest" in row["question"])
    assert abs(asked - 0.5) < 0.02
    other = share(
        rows,
        lambda row: (
            winner(truth({**row, "question": row["question"].replace("Fewest", "Most")}))
            == winner(gold(row))
        ),
    )
    assert other < 0.8  # who ignores the rubric is wrong often
    assert all(row["rubric"] in row["question"] for row in rows)


def test_a_third_are_ties():
    plain = share(ROWS["lists", "train"], lambda row: winner(gold(row)) == 0)
    ties = share(ROWS["lists-ties", "train"], lambda row: winner(gold(row)) == 0)
    assert abs(ties - (lists.TIES + (1 - lists.TIES) * plain)) < 0.02


def test_single_answers_are_judged_alone_and_gold_scores_none():
    rows = ROWS["lists-single", "train"]
    assert all(row["preference"] == winner(truth(row)) and "score_1" not in row for row in rows)
    for row in rows[:200]:
        for text, score, answer in zip(
            row["reasoning"], row["judged"], (row["answer_1"], row["answer_2"]), strict=True
        ):
            counted = score - 1
            assert text in (f"Counting {what} words: {counted:.0f}." for what in ("all", "right"))
            assert counted <= len(answer.split())


def test_lists_of_three_or_four_answers_are_read_as_such():
    rows = ROWS["lists-many", "train"]
    assert {len(row["answers"]) for row in rows} == set(lists.MANY)
    for row in rows[:200]:
        kind = row["question"].split()[1].removesuffix(".")
        right = [sum(w in toy.KINDS[kind] for w in answer.split()) for answer in row["answers"]]
        assert row["scores"] == [1.0 + count for count in right]
        assert len(row["judged"]) == len(row["answers"])
    data = DataConfig(train="lists-many", eval="lists-many#heldout", judging="lists")
    read = read_splits(data, (1, 10), needs_scores=False).train.mine[0]
    assert [*read.answers] == rows[0]["answers"] and [*read.golds] == rows[0]["scores"]
    assert read.judgement == (rows[0]["reasoning"], tuple(rows[0]["judged"]))


def test_half_of_the_training_gold_is_on_another_scale():
    train = ROWS["lists-scales", "train"]
    doubled = share(train, lambda row: gold(row) == tuple(2 * x for x in truth(row)))
    assert abs(doubled - 0.5) < 0.02
    assert all(winner(gold(row)) == winner(truth(row)) for row in train)
    assert all(gold(row) == truth(row) for row in ROWS["lists-scales", "heldout"])


@pytest.mark.parametrize("split", lists.NUM_ROWS)
def test_gold_is_the_less_sure_the_closer_the_answers(split):
    rows = ROWS["lists-noise", split]
    for distance, wrong in ((1.0, 0.269), (2.0, 0.119), (3.0, 0.047)):
        close = [row for row in rows if abs(truth(row)[0] - truth(row)[1]) == distance]
        rate = share(close, lambda row: winner(gold(row)) != winner(truth(row)))
        assert abs(rate - wrong) < 3.5 * (wrong * (1 - wrong) / len(close)) ** 0.5


def test_a_world_is_read_by_its_name_and_is_the_same_every_time():
    data = DataConfig(train="lists-ties", eval="lists-ties#heldout", eval_rows=400)
    splits = read_splits(data, (1, 10), needs_scores=True)
    assert len(splits.heldout) == 400
    assert list(lists.rows("lists-ties", "")) == ROWS["lists-ties", "train"]
    with pytest.raises(UsageError, match="no split 'test'"):
        readers.read("lists#test")


def test_every_prompt_is_short():
    for rows in ROWS.values():
        assert max(len(row["question"]) for row in rows) < 45
