"""Rubrics: how they are given, and what is read of the scores of criteria."""

from __future__ import annotations

import json

import pytest

from jlrm.config import UsageError
from jlrm.evaluation import rubrics
from jlrm.evaluation.reading import Reader, check_rubric, reader
from jlrm.evaluation.rubrics import Criterion, rubric

TWO = rubric({"accuracy": "Facts.", "Clear: style": {"description": "Plain.", "weight": 3}})
TOTALS = "<answer>8</answer><answer>5</answer>"


def says(*lines: str, totals: str = TOTALS) -> str:
    return "\n".join(["accuracy: 1, 1 is a draft", "</think>", *lines, totals])


def read(text: str, ending="stop", asked=TWO):
    return Reader().read(text, ending, asked)


def test_criteria_are_read_and_totals_are_their_means_by_weight():
    text = says("accuracy: 8, 4", "Clear: style: 4, 6")
    found = read(text)
    assert Reader().criteria(text, TWO, 2) == [(8.0, 4.0), (4.0, 6.0)] and found.status == "ok"
    assert found.scores == (5.0, 5.5) and found.preference == 2  # and not the totals of the text
    assert found == read(
        says("- **Accuracy**: 8/10, 4/10", "2. clear style: Answer 1: 4, Answer 2: 6")
    )
    assert found == read(says("accuracy: 8, 4", "accuracy: 8, 4", "Clear: style = 4 and 6"))


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (says(), "no_criteria"),
        (says("accuracy: 8, 4"), "no_criteria"),
        (says("accuracy: 8, 4", "Clear: style: good"), "no_criteria"),
        (says("accuracy: 8", "Clear: style: 4, 6"), "no_criteria"),
        (says("accuracy: 8, 4", "accuracy: 7, 4", "Clear: style: 4, 6"), "no_criteria"),
        (says("accuracy: 8, 11", "Clear: style: 4, 6"), "out_of_range"),
        (says("accuracy: 8, 4", "Clear: style: 4, 6", totals=""), "no_answer"),
        ("accuracy: 8, 4\nClear: style: 4, 6\n</think>" + TOTALS, "no_criteria"),  # only thought
    ],
)
def test_a_text_without_the_scores_of_all_criteria_is_unread(text, status):
    found = read(text)
    assert (found.scores, found.preference, found.status) == (None, None, status)
    assert Reader().places(text, "stop", TWO) is None


def test_a_text_that_was_cut_is_cut():
    assert read(says("accuracy: 8, 4", totals=""), "length").status == "cut"


def test_one_answer():
    text = "</think>\naccuracy: 8\nClear: style: 4\n<answer>9</answer>"
    assert Reader().read_one(text, "stop", TWO) == (5.0, "ok")
    assert Reader().read_one(text.replace("8", "8, 3"), "stop", TWO) == (None, "no_criteria")
    assert [text[i] for i in Reader().places(text, "stop", TWO, 1) or ()] == ["8", "4"]


def test_places_are_those_of_the_criteria():
    text = says("accuracy: 8, 10", "Clear: style: **4** and 6")
    places = Reader().places(text, "stop", TWO)
    assert [text[i] for i in places or ()] == ["8", "1", "4", "6"]
    assert Reader().places(says("accuracy: 8/10, 10/10", "Clear: style: 4, 6"), "stop", TWO) is None
    drafts = "I say <answer>3</answer><answer>4</answer>"
    plain = f"{drafts}</think> <answer> 10</answer>\n<answer>7.5</answer>"
    assert [plain[i:][:2] for i in Reader().places(plain, "stop", None) or ()] == [
        "10",
        "7.",
    ]
    assert Reader().places("</think><answer>8/10</answer><answer>7</answer>", "stop", None) is None


def test_a_text_as_a_rubric_changes_nothing_of_the_reading():
    told = rubric("Look at the facts.")
    assert read(says(), asked=told) == read(says(), asked=None)
    assert told is not None and (told.kind, told.text) == ("text", "Look at the facts.")


def test_names_that_hold_control_texts_are_read_as_the_prompt_has_them():
    told = rubric({"<answer>9</answer> facts": "x"})
    assert read(says("[answer]9[/answer] facts: 8, 4"), asked=told).scores == (8.0, 4.0)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("", "rubric is empty"),
        ({}, "rubric is empty"),
        (3, "wanted a text, or names with their descriptions, got 3"),
        ({"a": 3}, "description of 'a' is no text"),
        ({3: "x"}, "names of criteria are texts, got 3"),
        ({"!": "x"}, "can't be a criterion's name"),
        ({"a" * 81: "x"}, "at most 80 characters"),
        ({"a": "x", "A!": "y"}, "'a' and 'A!' have the same letters"),
        ({"a": {"description": "x", "weight": 0}}, "weight of 'a' is no number above 0"),
        ({"a": {"description": "x", "weight": float("nan")}}, "no number above 0, got nan"),
        ({"a": {"description": "x", "wieght": 1}}, "'a' has 'wieght'"),
        ({"a": {}}, "description of 'a' is no text, got None"),
        ("x" * 20_001, "at most 32 criteria and 20000 characters"),
    ],
)
def test_what_is_no_rubric_is_told_so_in_a_sentence(given, wrong):
    with pytest.raises(UsageError, match=wrong):
        rubric(given)


def test_files(tmp_path):
    def of(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    wanted = (Criterion("a", "x"), Criterion("b", "y", 2.0))
    mapping = {"a": "x", "b": {"description": "y", "weight": 2}}
    assert rubrics.read(of("r.json", json.dumps(mapping, indent="\t"))).criteria == wanted
    assert rubrics.read(of("r.yaml", "a: x\nb: {description: y, weight: 2}\n")).criteria == wanted
    assert rubrics.read(of("r.txt", "a: x\n")).said == "a: x"
    for name, content, wrong in (
        ("r.json", '{"a": "x", "a": "y"}', "the key 'a' stands twice"),
        ("r.json", "{", "is not valid JSON"),
        ("r.yaml", "a: x\na: y", "the key 'a' stands twice"),
        ("r.yaml", "", "is empty"),
        ("r.json", "", "is empty"),
        ("r.yaml", "[1]", "wanted a text, or names"),
        ("r.txt", b"\xff", "is not UTF-8 text"),
    ):
        with pytest.raises(UsageError, match=wrong):
            rubrics.read(of(name, content))
    with pytest.raises(UsageError, match=r"Cannot read the rubric .*No such file"):
        rubrics.read(str(tmp_path / "none.txt"))


def test_rules_of_others_read_no_criteria():
    for parser in ("letters", "judgelm", "judgelrm"):
        with pytest.raises(UsageError, match=f"The parser {parser} reads no scores of criteria"):
            check_rubric(reader(parser), TWO)
        check_rubric(reader(parser), rubric("a text"))


@pytest.mark.parametrize("parser", ["strict", "lenient"])
def test_what_a_judge_writes_behind_a_rubric_of_its_own_is_read(parser):
    read = Reader(parser)
    text = "facts: 9, 9\nstyle</rubric>\n<think>why</think><answer>8</answer><answer>5</answer>"
    assert read.read(text, "stop").scores == (8.0, 5.0)
    assert read.places(text, "stop", None) == (text.index("8<"), text.index("5<"))
    one = text.removesuffix("<answer>5</answer>")
    assert read.read_one(one, "stop") == (8.0, "ok")
    assert read.read(text.partition("</think>")[0], "length").status == "cut"
    drafted = "<answer>1</answer>" + one
    assert read.read_one(drafted, "stop")[0] == (None if parser == "strict" else 8.0)
