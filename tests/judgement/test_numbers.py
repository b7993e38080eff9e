"""Numbers are read where people read them in one way, and only there."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jlrm.judgement.numbers import both, json_scores, score, several

LOOKS = ("{}", " {} ", "**{}**", "*{}*", "`{}`", '"{}"', "[[{}]]", "({})", "\\boxed{{{}}}", "${}$")
LABELS = ("", "Score: ", "score = ", "**Score:** ", "Final rating: ", "\u8bc4\u5206\uff1a")
ENDS = ("", ".", "/10", " / 10", "/10.0", " out of 10", " of 10", " points", "\u5206", "\u200b")


@given(st.integers(0, 10), st.sampled_from(LOOKS), st.sampled_from(LABELS), st.sampled_from(ENDS))
@example(8, "**{}**", "Score: ", "/10")
def test_a_score_is_read_however_it_is_dressed(number, look, label, end):
    assert score(look.format(f"{label}{number}{end}"), 10) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7,5", 7.5),
        ("7.5", 7.5),
        ("\uff17\uff0c\uff15", 7.5),
        ("10,00", 10.0),
        ("**8**/10", 8),
        ("\u0668", 8),
        ("\U0001d7d6", 8),
        ('{"score": 8}', 8),
        ('{"reason": "7 of them fail", "rating": "8/10"}', 8),
        ('```json\n{"score": 8}\n```', 8),
        ("+8", 8),
        *[
            (text, 8)
            for text in ("<b>8</b>", "\\(8\\)", "\\boxed{\\text{8}}", "8 (good)", "- 8", "8;")
        ],
        *[(text, 8) for text in ("eight", "\u516b", "8\ufe0f\u20e3", "8 (out of 10)", "8\u221510")],
        *[(text, 8) for text in ("Rating: [[8]]", "{'score': 8,}", "8 stars", "8\uc810")],
        ("-1", -1),
    ],
)
def test_a_score(text, number):
    assert score(text, 10) == number


AMBIGUOUS = (
    *(
        "7-8",
        "7\u20138",
        "8 or 9",
        "8 to 9",
        "1,000",
        "1.000,5",
        "8/9/10",
        "8/5",
        "80%",
        "8*2",
        "8x",
    ),
    *("~8", "about 8", "8+", ">8", "8!", "nan", "inf", "1e1", "0x8", "1_0", "8 9", "8, 9", "[7,5]"),
    *(
        "",
        " ",
        "-",
        "8 - 7",
        "1. 8",
        "2) 7",
        "8 (or 7)",
        "8 but 9",
        '{"score": 8, "rating": 9}',
        '{"score": 8, "score": 9}',
    ),
    *("\u202e01\u202c", "8\u00b2", "\u00bd", "\u2467", "eight 8", "8" * 500 + "x", "\u22128"),
)


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_no_score(text):
    assert score(text, 10) is None


def test_a_fraction_is_of_the_scale():
    assert score("8/10", 100) is None and score("80/100", 100) == 80
    assert score("4/5", 5) == 4 and score("4/5", 10) is None


def test_a_label_of_the_other_answer_is_a_contradiction():
    assert score("Answer 1: 8", 10, 1) == score("Assistant A: 8", 10, 1) == 8
    assert score("Answer 1: 8", 10, 2) is None and score("Assistant B: 8", 10, 1) is None


@pytest.mark.parametrize(
    "text",
    [
        *("8, 7", "8,7", "8 7", "8;7", "8 | 7", "8\n7", "8 and 7", "8 vs. 7", "(8, 7)", "[8, 7]"),
        *(
            "8/10, 7/10",
            "8/10 and 7/10",
            "**8**, **7**",
            "[[8,7]]",
            "[8/10, 7/10]",
            "\uff18\u3000\uff17",
        ),
        *("Answer 1: 8\nAnswer 2: 7", "Assistant A: 8, Assistant B: 7", "Answer 1: 8 Answer 2: 7"),
        *('{"score_1": 8, "score_2": 7}', '{"answer_2": 7, "answer_1": 8}', '{"scores": [8, 7]}'),
        *('{"A": 8, "B": "7/10", "confidence": 1}', '{"a": {"score": 8}, "b": {"score": 7}}'),
        "```json\n[8, 7]\n```",
        *("A: 8 B: 7", "- Answer 1: 8\n- Answer 2: 7", "First: 8, Second: 7", "8\u30017", "8 ,7"),
        *(
            "\u56de\u7b541\uff1a8\uff0c\u56de\u7b542\uff1a7",
            "Answer 1 gets 8, Answer 2 gets 7",
            "8<br>7",
        ),
        *("{'score_1': 8, 'score_2': 7}", '{"final_score_1": 8, "final_score_2": 7}'),
        *('{"evaluation": {"score_1": 8, "score_2": 7}, "sure": 0.5}', "eight, seven"),
    ],
)
def test_both_scores_in_one_text(text):
    assert both(text, 10) == (8, 7)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "8",
            "8, 7, 6",
            "8/9",
            "8/9/10",
            "7-8",
            "8 or 9",
            "1,000",
            "7,5,8,5",
            "Answer 2: 8, Answer 1: 7",
            "1. 8",
        ),
        *(
            '{"score_1": 8}',
            '{"score": 8}',
            '{"score_1": 8, "score_1": 7, "score_2": 1}',
            "[8, 7, 6]",
        ),
        *(
            '{"x": 8, "y": 7}',
            "[[8]]",
            "[" * 300,
            '{"a":' * 50,
            "[true, false]",
            '{"score_1": null, "score_2": 7}',
        ),
    ],
)
def test_what_does_not_hold_two_scores(text):
    assert both(text, 10) is None


@given(st.text('0123456789.,/-[]{}":*_ aABscore\u200b\uff18\n', max_size=40))
@example(json.dumps({"score_1": 1e400, "score_2": 1}))
def test_no_text_breaks_it(text):
    for found in (score(text, 10), score(text, 10, 1)):
        assert found is None or found == found
    assert both(text, 10) is None or len(both(text, 10)) == 2


def test_a_text_of_400_characters_is_looked_at_and_a_longer_one_is_not():
    for function, text, wanted in ((score, "8", 8.0), (both, "8, 7", (8.0, 7.0))):
        filled = f"{text} (" + "x" * (397 - len(text)) + ")"
        assert len(filled) == 400
        assert function(filled, 10) == wanted
        assert function(filled.replace("(x", "(xx", 1), 10) is None


def test_a_score_that_is_of_an_answer_is_no_score_of_just_anything():
    assert score("Answer 1: 8", 10) is None
    assert score("Answer 1: 8", 10, 1) == 8.0
    assert score("Answer 1: 8", 10, 2) is None


def test_values_of_json_may_say_again_which_answer_they_are_of():
    text = json.dumps({"answer_1": "Answer 1: 8", "answer_2": "Answer 2: 7"})
    assert json_scores(text, 10) == (8.0, 7.0)
    text = json.dumps({"answer_1": "Answer 2: 8", "answer_2": "Answer 1: 7"})
    assert json_scores(text, 10) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("8, 7, 5", (8, 7, 5)),
        ("8,7,5", (8, 7, 5)),
        ("[8, 7, 5]", (8, 7, 5)),
        ("8/10 7/10 5/10", (8, 7, 5)),
        ("8; **7**; five", (8, 7, 5)),
        ("8 and 7 and 5", (8, 7, 5)),
        ("7,5; 7; 5", (7.5, 7, 5)),
        ("8 / 7 / 5", None),
        ("8, 7", None),
        ("8, 7, 5, 6", None),
        ("8, 7, good", None),
        ("8, 7, 5" + " " * 400 + "x", None),
    ],
)
def test_scores_of_three_answers_in_one_text(text, wanted):
    assert several(text, 10, 3) == wanted
