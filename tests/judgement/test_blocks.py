"""Which answer blocks of a text are its verdict."""

from __future__ import annotations

import pytest

from jlrm.judgement.blocks import answer_blocks, last_pair, split_tags, without_pair


def block(score: object) -> str:
    return f"<answer>{score}</answer>"


def test_tags_and_texts_alternate() -> None:
    tags, texts = split_tags("a<think>b</think></answer>")
    assert (tags, texts) == (["<think>", "</think>", "</answer>"], ["a", "b", "", ""])


def test_blocks_know_what_stands_before_them() -> None:
    found = answer_blocks(f"x <answer><answer>1</answer> then {block(2)} end")
    assert [tuple(each) for each in found] == [("1", "x "), ("2", " then ")]
    assert answer_blocks("</answer>1<answer>") == []


@pytest.mark.parametrize(("number", "status"), [(0, "no_answer"), (1, "one_answer")])
def test_what_lacks_is_named(number: int, status: str) -> None:
    assert without_pair(number) == status
    assert without_pair(number + 2) == "not_a_number"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (block(8) + block(7), (8, 7)),
        (f"{block(8)} and Answer 2's score: {block(7)}", (8, 7)),
        (f"{block(1)}{block(9)} No: {block(8)}{block(7)}", (8, 7)),  # taken back
        (f"It says {block(10)}. I give {block(8)}{block(7)}", (8, 7)),  # quoted
        (f"{block(8)}{block(7)}, which is not {block(10)}", (8, 7)),  # a remark behind
        (f"{block('8, 7')}", (8, 7)),
        (f"{block('7,5')}{block('6')}", (7.5, 6)),
        (f"{block('8/10')}{block('**7**')}", (8, 7)),
        ("<ANSWER>8</ANSWER><Answer>7</Answer>", (8, 7)),
        # What is spelt otherwise does not overrule a plain verdict.
        (f"{block(8)}{block(7)} <ANSWER>1</ANSWER><ANSWER>9</ANSWER>", (8, 7)),
        ('{"score_1": 8, "score_2": 7}', (8, 7)),
        (block("score of Answer 1") + block("score of Answer 2"), "not_a_number"),
        (block(8), "one_answer"),
        ("8 and 7", "no_answer"),
        (block("7-8") + block("6"), "not_a_number"),
    ],
)
def test_the_last_complete_pair_is_the_verdict(text: str, wanted: object) -> None:
    assert last_pair(text, 10) == wanted


def test_blocks_without_a_number_are_placeholders_wherever_they_stand() -> None:
    named = block("score of Answer 1") + block("score of Answer 2")
    assert last_pair(f"{named} so {block(8)}{block(3)}", 10) == (8.0, 3.0)
    assert last_pair(f"{block(8)}{block(3)} as in {named}", 10) == (8.0, 3.0)
    assert last_pair(f"{block(8)}{block('so')}{block(3)}", 10) == (8.0, 3.0)


@pytest.mark.parametrize("gap", [", ", "`", " - ", "|"])
def test_of_three_blocks_close_together_the_closest_two_are_the_pair(gap: str) -> None:
    assert last_pair(f"{block(8)}{block(3)}{gap}{block(5)}", 10) == (8.0, 3.0)
    assert last_pair(f"{block(5)}{gap}{block(8)}{block(3)}", 10) == (8.0, 3.0)


def test_two_numbers_beside_a_score_are_no_score_of_answer_2() -> None:
    text = f"{block(5)} but in the end {block(8)}{block('7 6')}"
    assert last_pair(text, 10) == "not_a_number"
