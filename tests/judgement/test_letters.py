"""A named answer is read in the forms that judges are asked for; mentions of them are not."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlrm.judgement.letters import named, preference

VERDICTS = {
    1: (
        *("Both are fine, the first is more exact. [[A]]", "[[A>>B]]", "[[A > B]]", "[[B<A]]"),
        *("[[Assistant A]]", "\uff3b\uff3b\uff21\uff3d\uff3d", "So. [RESULT] A", "[RESULT] (A)"),
        *("Answer 1", "A>B", "Response 1 > Response 2", "<answer>A</answer>", "\\boxed{A}"),
        *('{"winner": "A"}', '{"why": "[[B]] is short", "winner": "model_a"}', "Output (a)"),
        *("Verdict: Assistant A is better", "A is better than B", "The first answer is better."),
        *(
            "The better response is Response 1, because it is exact.",
            "Answer: 1",
            "A",
            "[[A]][[A]]",
        ),
        *(
            "1\n\n### Reason: it is right.\n### Reference: none at all",
            "He says [[B]], but no. [[A]]",
        ),
        *("r [[B]]</think>It is [[A]]", "[[A]]. The format was [[A]] or [[B]].", "[[\u200bA]]"),
    ),
    2: (
        *("[[B]]", "[[B>A]]", "[RESULT] B\n", "Feedback: ok. [RESULT] [B]", "Response 2", "**B**"),
        *("Verdict: B", "**Verdict:** **B**", "### Verdict\nB", "My final verdict is: [[B]]"),
        *("Verdict: 2 (Response 2 is more accurate)", "Winner: Answer 2", "\\boxed{\\text{B}}"),
        *(
            "The better answer is B.",
            "Overall, Response 2 is better.",
            "I prefer Response 2.",
            "B wins",
        ),
    ),
    0: (
        *(
            "Equal. [[C]]",
            "[[Tie]]",
            "[[A=B]]",
            "My final verdict is tie: [[A=B]]",
            "Verdict: a tie",
        ),
        *("Final decision: Tie", "Tie\nBoth are right, so nothing more is said", "[RESULT] tie"),
        *("Both are equally good.", "<answer>C</answer>", "Verdict: no preference"),
    ),
}
NONE = {
    "no_answer": (
        *(
            "",
            "It depends.",
            "[[8]]",
            "[[D]]",
            "A good answer",
            "C",
            "Answer 1 is wrong.",
        ),
        *(
            "r [[A]]</think>nothing",
            "Verdict: not A",
            "Verdict: A, B are equal",
            "Answer 3",
            "[[A>A]]",
        ),
        'Say "[[A]]" if assistant A is better, "[[B]]" if assistant B is, and "[[C]]" for a tie.',
        *(
            "Answer 1 is better in style but worse in facts",
            "<answer>8</answer><answer>2</answer>",
            "[RESULT] 2",
            "[[1]]",
            "\\boxed{2}",
        ),
    ),
    "ambiguous": ("[[A]] or [[B]]", "[[A]]\n\n[[B]]", '"[[A]]", "[[B]]" or "[[C]]"', "[[A]]/[[B]]"),
}


@pytest.mark.parametrize(("wanted", "text"), [(w, t) for w, ts in VERDICTS.items() for t in ts])
def test_a_named_answer(wanted, text):
    assert preference(text) == wanted


@pytest.mark.parametrize(("wanted", "text"), [(w, t) for w, ts in NONE.items() for t in ts])
def test_what_names_none(wanted, text):
    assert preference(text) == wanted


OTHERS_FORMS = {
    1: (
        *("[[A\u226bB]]", "\\[\\[A\\]\\]", "\u3010A\u3011", "[A]", "- A", "[RESULT] A<|im_end|>"),
        *('{"winner": "A", "reason": "x"}', '{"better_answer": 1}', '{"preferred": "Answer 1"}'),
        *("<verdict>A</verdict>", "<winner>1</winner>", "\\boxed{\\textbf{A}}", "More helpful: A"),
        *(
            "Preferred: <A>",
            "My vote: A",
            "\u7b54\u6848\uff1aA",
            "\u56de\u7b541\u66f4\u597d",
            "[[A]]</s>",
        ),
        *(
            "Assistant A\u2019s answer is better.",
            "Based on the above, Answer 1 is better.",
            "[[A]]\0",
        ),
        *(
            "Response 1 is better than Response 2 because Response 2 is wrong.",
            "A gave the better one",
        ),
    ),
    0: (
        *("Neither answer is better.", "Overall, it is a tie.", "The two responses are tied."),
        *("Response 1 and Response 2 are equally good.", "tie (bothbad)", "[[\u5e73\u5c40]]"),
        *("Both assistants performed equally well.", '{"winner": "tie"}', '{"preference": 0}'),
    ),
}


@pytest.mark.parametrize(("wanted", "text"), [(w, t) for w, ts in OTHERS_FORMS.items() for t in ts])
def test_forms_of_the_field(wanted, text):
    assert preference(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("[[A]], not [[B]].", "I output [[A]] rather than [[B]].", "[[A]] and not [[B>A]]"),
        *('[[A]]\n\nNote that Response B says "[[B]]".', "[[B]]? No, [[A]]", "[[A]] over [[B]]"),
        '"[[A]]"',
        'Answer B ends with "[[B]]", which is planted.\n"[[A]]"',
    ],
)
def test_a_verdict_stays_where_another_one_is_denied_or_quoted(text):
    assert preference(text) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("Neither [[A]] nor [[B]].", "If A is better, [[A]]; if B is better, write [[B]]."),
        *(
            "The answer is 2",
            "The correct answer is A",
            "Correct answer: B",
            "Answer 1 says it is 2.",
        ),
        *(
            "Answer 1 is better in style, Answer 2 in content.",
            "A is better in style, B in content",
        ),
        *(
            "If you like brevity, Answer 1 is better.",
            "Response 1 is better for some and B for others",
        ),
    ],
)
def test_what_speaks_of_answers_decides_nothing(text):
    assert preference(text) == "no_answer"


@pytest.mark.parametrize("text", ["[[A]]", "[[A>>B]]", "[RESULT] A", "Verdict: A", "A wins", "A"])
def test_the_other_letter_names_the_other_answer(text):
    assert preference(text) == 1
    assert preference(text.translate(str.maketrans("AB", "BA"))) == 2


PIECES = (
    "[[A]]",
    "[[B]]",
    "[[C]]",
    " or ",
    "verdict: ",
    "A",
    "B is better",
    "</think>",
    "\n",
    ". ",
    "tie",
)


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=10).map("".join))
def test_any_text_has_a_preference_or_a_reason(text):
    assert preference(text) in (0, 1, 2, "no_answer", "ambiguous")
    assert named(text) in (None, 0, 1, 2)
    assert preference(f"{text}</think>[[B]]") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    ["[[", "[[A]] ", "verdict: ", "verdict: A\n", "A or ", "a", " ", "the ", '"[[A]]" ', "if "],
)
def test_time_is_linear(piece):
    start = time.thread_time()
    preference(piece * (200_000 // len(piece)))
    assert time.thread_time() - start < 2.0


def test_a_quoted_mark_at_the_very_beginning_is_quoted():
    assert preference('"[[A]]" or [[B]]') == 2
    assert preference('x "[[A]]"\n[[B]]') == 2  # one letter makes it a line of other words
