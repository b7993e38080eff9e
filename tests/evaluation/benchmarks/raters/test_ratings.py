"""Ratings of single answers become pairs, from every published form of such rows."""

from __future__ import annotations

import json
import random

import pytest

from jlrm.config import UsageError
from jlrm.evaluation.benchmarks.registry import BENCHMARKS
from jlrm.evaluation.games import Response
from jlrm.evaluation.reading import Reader, judged_items


def read(tmp_path, rows, name="ratings"):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return BENCHMARKS[name].read(str(tmp_path / "rows.jsonl"))


def test_every_two_answers_with_different_ratings_make_a_pair(tmp_path, caplog):
    points = {"one": [4, 2, 4, 1.5], "two": [1], "three": [1, 5]}
    rows = [
        {"question": question, "answer": f"{question} {i}", "score": score}
        for question, scores in points.items()
        for i, score in enumerate(scores)
    ]
    random.Random(0).shuffle(rows)
    items = read(tmp_path, rows)
    rated = {row["answer"]: row["score"] for row in rows}
    for item in items:
        first, second = (rated[answer] for answer in item.answers)
        assert item.label == (1 if first > second else 2)
        assert all(answer.startswith(item.question) for answer in item.answers)
    assert len(items) == 5 + 0 + 1  # 4 and 4 are equal
    assert "1 rows are not asked" in caplog.text
    distances = sorted(item.subset for item in items)
    assert distances == ["2 apart"] * 4 + ["3 or more apart", "less than 1 apart"]
    assert {item.label for item in items} == {1, 2}  # the order is that of the file


def test_several_ratings_of_an_answer_have_their_mean(tmp_path):
    rows = [
        {"question": "?", "answer": answer, "score": score}
        for answer, score in (("a", 5), ("b", 3), ("a", [1, 2]), ("b", "4"), ("c", None))
    ]
    (item,) = read(tmp_path, rows)  # a: (5 + 1.5) / 2 = 3.25; b: 3.5
    assert (item.answers, item.label, item.subset) == (("a", "b"), 2, "less than 1 apart")


def test_means_that_are_equal_but_for_rounding_are_equal(tmp_path):
    rows = [
        {"question": "?", "answer": answer, "score": score}
        for answer, score in (("a", 0.1), ("a", 0.2), ("b", 0.15), ("c", 1))
    ]
    assert [item.answers for item in read(tmp_path, rows)] == [("a", "c"), ("b", "c")]


PROMETHEUS = [
    {
        **{"orig_instruction": "Q", "orig_criteria": "Is it kind?", "orig_score": score},
        **{"orig_response": text, "instruction": "###Task", "input": "", "output": "[RESULT]"},
    }
    for score, text in (("2", "a"), ("5", "b"))
]
BIGGEN = [
    {
        **{"input": "Q", "system_prompt": "Be a planner.", "response": text, "human_score": score},
        **{"score_rubric": {"criteria": "Is it kind?", "score1_description": "no"}},
    }
    for score, text in ((2, "a"), (5, "b"))
]
HELPSTEER = [
    {"prompt": "Q", "response": text, "helpfulness": score, "verbosity": 1}
    for score, text in ((2, "a"), (5, "b"))
]


ALPACA = [
    {"instruction": "Q", "input": "about this", "output": text, "rating": score}
    for score, text in (("2", "a"), ("5", "b"))
]


@pytest.mark.parametrize(
    ("name", "rows", "question"),
    [
        ("feedback_bench", PROMETHEUS, "Q\n\nCriterion: Is it kind?"),
        ("biggen_bench", BIGGEN, "System: Be a planner.\n\nUser: Q\n\nCriterion: Is it kind?"),
        ("ratings", HELPSTEER, "Q"),
        ("ratings", ALPACA, "Q\nabout this"),
    ],
)
def test_published_forms(tmp_path, name, rows, question):
    (item,) = read(tmp_path, rows, name)
    assert (item.question, item.answers, item.label) == (question, ("a", "b"), 2)


def test_answers_judged_by_different_criteria_are_no_pair(tmp_path):
    rows = [{**PROMETHEUS[0], "orig_criteria": "Is it short?"}, PROMETHEUS[1]]
    with pytest.raises(UsageError, match="a pair is two answers to one question"):
        read(tmp_path, rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "reply": "a"}, "has no answer: wanted one of the fields .*'reply'"),
        ({"question": "?", "answer": "a"}, "has no rating: wanted one of the fields .*score"),
        ({"answer": "a", "score": 3}, "has no question: wanted one of the fields .*prompt"),
        ({"question": "?", "answer": "a", "score": "good"}, "'score' must be a rating"),
        ({"question": "?", "answer": "a", "score": True}, "'score' must be a rating"),
        ({"question": "?", "answer": "a", "score": []}, "'score' must be a rating"),
        ({"question": "?", "answer": "a", "score": "inf"}, "a finite number"),
        ({"question": 3, "answer": "a", "score": 1}, "wanted text or a list"),
    ],
)
def test_rows_that_hold_no_rating_are_named(tmp_path, row, message):
    with pytest.raises(UsageError, match=f"line 1.*{message}"):
        read(tmp_path, [row])


def test_a_judge_that_rates_as_the_raters_did_is_right_everywhere(tmp_path):
    rng = random.Random(1)
    rows = [
        {"question": f"q{i % 5}", "answer": f"a{i}", "score": rng.randint(1, 5)} for i in range(40)
    ]
    rated = {row["answer"]: float(row["score"]) for row in rows}
    known, items = BENCHMARKS["ratings"], read(tmp_path, rows)
    games = known.games(items, known.policy, 0)
    said = {
        game.id: Response(
            game.id,
            scores=(rated[game.item.answers[game.first]], rated[game.item.answers[game.second]]),
        )
        for game in games
    }
    judged, _ = judged_items(games, said, Reader())
    assert set(known.metrics(judged, known.policy).values()) == {100.0}
