"""Every text has exactly one status, the strict grammar is the paid one, and time is linear."""

from __future__ import annotations

import collections
import json
import re
import time
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jlrm.judgement.verdict import (
    Status,
    Verdict,
    breaks_off,
    is_consistent,
    parse,
    parse_authors,
    parse_single,
    swap_preference,
)

FRAGMENTS = (
    *("<think>", "</think>", "<answer>", "</answer>", "<answer>7</answer>", "<answer> 9</answer>"),
    *("7", "8.5", "11", "-1", "nan", "inf", "1e1", "1_0", "\u0668", "\uff18", "+8", "7/10", "."),
    *(" ", "\n", "\x1c", "\x00", "\ud800", "word", "<|im_end|>", "<", "</", "<answer", "</answer"),
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14).map("".join)
# Mostly judgements, so that each status comes up.
JUDGEMENTS = st.tuples(TEXTS, TEXTS, TEXTS, TEXTS).map(
    lambda t: f"{t[0]}</think>{t[1]}<answer>{t[2]}</answer><answer>{t[3]}</answer>"
)


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        ("r</think><answer>8</answer><answer>4</answer>", "ok"),
        ("r\n</think>\n<answer> 8\n</answer> and <answer>4.5</answer><|im_end|>\ntail", "ok"),
        ("</think><answer>+8</answer><answer>08</answer>", "ok"),
        ("", "no_think_end"),
        ("r<answer>8</answer><answer>4</answer>", "no_think_end"),
        ("<think>r</think><answer>8</answer><answer>4</answer>", "repeated_think"),
        ("r</think><answer>8</answer></think><answer>4</answer>", "repeated_think"),
        ("r<answer>8</answer></think><answer>8</answer><answer>4</answer>", "answer_in_reasoning"),
        ("r</think>8 4", "no_answer"),
        ("r</think><answer>8</answer>", "one_answer"),
        ("r</think>" + "<answer>8</answer>" * 3, "too_many_answers"),
        ("r</think><answer>8</answer><answer>4", "broken_answer"),
        ("r</think><answer>8<answer>4</answer></answer>", "broken_answer"),
        ("r</think></answer>8<answer>4</answer><answer>", "broken_answer"),
        ("r</think><answer>8</answer><answer>four</answer>", "not_a_number"),
        ("r</think><answer>7/10</answer><answer>4</answer>", "not_a_number"),
        ("r</think><answer></answer><answer>4</answer>", "not_a_number"),
        ("r</think><answer>nan</answer><answer>inf</answer>", "not_a_number"),
        ("r</think><answer>1e0</answer><answer>1_0</answer>", "not_a_number"),
        ("r</think><answer>11</answer><answer>4</answer>", "out_of_range"),
        ("r</think><answer>8</answer><answer>-1</answer>", "out_of_range"),
        ("r</think><answer>0</answer><answer>4</answer>", "out_of_range"),
        ("r</think><answer>" + "9" * 5000 + "</answer><answer>4</answer>", "out_of_range"),
    ],
)
def test_strict(completion: str, status: str) -> None:
    assert parse(completion).status == status


@pytest.mark.parametrize(
    ("completion", "scores"),
    [
        ("r</think><answer>8</answer><answer>4</answer>", (8, 4)),
        ("<think>r</think><answer> 8 </answer>\n<answer>4.5</answer>", (8, 4.5)),
        ("<think>a</think>b</think><answer>8</answer><answer>4</answer>", (8, 4)),
        ("<answer>1</answer></think><answer>8</answer><answer>4</answer>", (8, 4)),
        ("r<answer>8</answer><answer>4</answer>", (8, 4)),
        ("r</think><answer>x</answer><answer>8</answer><answer>4</answer>", (8, 4)),
        (
            "<answer>1</answer><answer>9</answer> no: <answer>8</answer><answer>4</answer>",
            (8, 4),
        ),
        ('It says "<answer>1</answer>". <answer>8</answer><answer>4</answer>', (8, 4)),
        (
            "Says <answer>1</answer>? Answer 1: <answer>8</answer>, Answer 2: <answer>4</answer>",
            (8, 4),
        ),
        ("<answer>8</answer><answer>4</answer> since it had <answer>10</answer> in it", (8, 4)),
        ("A gets <answer>8</answer> while the other one gets <answer>4</answer>", (8, 4)),
        (
            "</think><answer>2</answer><answer>1</answer></think><answer>8</answer><answer>4</answer>",
            (8, 4),
        ),
        (
            "<answer>first</answer><answer>second</answer><answer>8</answer><answer>4</answer>",
            (8, 4),
        ),
        ("<ANSWER>8</ANSWER>< answer >4</ answer>", (8, 4)),
        ("\uff1canswer\uff1e8\uff1c/answer\uff1e<an\u200bswer>4</answer>", (8, 4)),
        ("<answer>8</answer><answer>4</answer><ANSWER>1</ANSWER><ANSWER>9</ANSWER>", (8, 4)),
        ('why</think>{"score_1": 8, "score_2": 4}<|im_end|>', (8, 4)),
        ('So:\n```json\n{"score_1": 8, "score_2": 4}\n```\nThat is all.', (8, 4)),
        ('{"score_1": 1, "score_2": 9}\nNo.\n{"score_1": 8, "score_2": 4}', (8, 4)),
        ("&lt;answer&gt;8&lt;/answer&gt;&lt;answer&gt;4&lt;/answer&gt;", (8, 4)),
        ("<answer>Answer 1</answer><answer>8</answer><answer>4</answer>", (8, 4)),
        ("<answer>1</answer><answer>9</answer> no: <answer>8, 4</answer>", (8, 4)),
        ("r</think><answer>8</answer><answer>4</answer><answer>1</answer>", (8, 4)),
        ("r</think><answer><answer>8</answer></answer><answer>4</answer><answer>", (8, 4)),
    ],
)
def test_lenient(completion: str, scores: tuple[float, float]) -> None:
    verdict = parse(completion, strict=False)
    assert (verdict.score_1, verdict.score_2) == scores


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        ("8 4", "no_answer"),
        ("<answer>8</answer><answer>4</answer></think>", "no_answer"),
        ("r</think><answer>8</answer>", "one_answer"),
        ("r</think><answer>8</answer><answer>x</answer>", "not_a_number"),
        ("r</think><answer>0</answer><answer>0</answer>", "out_of_range"),
        ("r</think><answer>7-8</answer>", "not_a_number"),
        ("r</think><answer>8</answer><answer>7 6</answer>", "not_a_number"),
        ("r</think><answer>1. 8</answer><answer>2. 7</answer>", "not_a_number"),
        ('It says {"score_1": 1, "score_2": 10}, which tries to steer.', "no_answer"),
        (
            "<answer>8</answer><answer>4</answer> no: <answer>5</answer><answer>7-8</answer>",
            "not_a_number",
        ),
        (
            "<answer>8</answer> says one, <answer>4</answer> two, <answer>1</answer>",
            "too_many_answers",
        ),
    ],
)
def test_lenient_failures_keep_a_status(completion: str, status: str) -> None:
    assert parse(completion, strict=False).status == status


def test_preference() -> None:
    assert Verdict(8, 4, "ok", "").preference == 1
    assert Verdict(4, 8, "ok", "").preference == 2
    assert Verdict(8, 8, "ok", "").preference == 0
    assert parse("nothing").preference is None


def test_scale() -> None:
    text = "r</think><answer>0</answer><answer>4</answer>"
    assert parse(text, min_score=0).preference == 2
    assert parse(text, min_score=0, max_score=3).status == "out_of_range"


def test_reasoning() -> None:
    answers = "<answer>8</answer><answer>4</answer>"
    assert parse(f"\nwhy\n</think>\n{answers}").reasoning == "why"
    assert parse("\ncut short").reasoning == "cut short"
    assert parse("\ncut short", strict=False).reasoning == "cut short"
    assert parse(f"<think>\nwhy\n</think>{answers}", strict=False).reasoning == "why"


def _is_well_formed(completion: str) -> bool:
    """The grammar once more, as one regular expression (slow, so for short texts only)."""
    free = r"(?:(?!</?think>|</?answer>).)*"
    answer = r"<answer>\s*[+-]?[0-9]+(?:\.[0-9]+)?\s*</answer>"
    pattern = f"{free}</think>{free}{answer}{free}{answer}{free}"
    return re.fullmatch(pattern, completion, re.DOTALL) is not None


@given(TEXTS | JUDGEMENTS, st.booleans())
@example("r</think><answer>8\x1c</answer><answer>4</answer>", True)
def test_any_text_has_a_verdict(text: str, strict: bool) -> None:
    verdict = parse(text, strict=strict)
    assert verdict.status in get_args(Status)
    if verdict.status == "ok":
        assert 1 <= verdict.score_1 <= 10 and 1 <= verdict.score_2 <= 10
        assert verdict.preference in (0, 1, 2)
    else:
        assert verdict.score_1 is verdict.score_2 is verdict.preference is None


@given(TEXTS | JUDGEMENTS)
def test_strict_is_the_grammar(text: str) -> None:
    anything_goes = parse(text, min_score=-float("inf"), max_score=float("inf"))
    assert (anything_goes.status == "ok") == _is_well_formed(text)


@given(TEXTS | JUDGEMENTS)
def test_lenient_agrees_where_strict_is_satisfied(text: str) -> None:
    strict = parse(text)
    if strict.status in ("ok", "out_of_range"):
        assert parse(text, strict=False) == strict


@given(st.floats(1, 10), st.integers(1, 10), TEXTS, TEXTS)
def test_scores_come_back(score_1: float, score_2: int, reasoning: str, tail: str) -> None:
    text = f"{reasoning}</think><answer>{score_1:.6f}</answer><answer>{score_2}</answer>{tail}"
    verdict = parse(text)
    if verdict.status == "ok":
        assert verdict.score_1 == pytest.approx(score_1, abs=1e-6)
        assert verdict.score_2 == score_2


MEGABYTES = {
    "answer": "<answer>" * 125_000,
    "answer_end": "</answer>" * 110_000,
    "think_end": "</think>" * 125_000,
    "answers": "</think>" + "<answer>7</answer>" * 55_000,
    "half_tags": "</answer" * 125_000,
    "digits": "</think><answer>" + "9" * 10**6 + "</answer><answer>4</answer>",
    "decimals": "</think><answer>1." + "9" * 10**6 + "</answer><answer>4</answer>",
    "digits_then_no_number": "</think><answer>" + "9" * 10**6 + "x</answer><answer>4</answer>",
    "spaces": "</think><answer>" + " " * 10**6 + "</answer><answer>4</answer>",
}


def _seconds(text: str, strict: bool) -> float:
    times = []
    for _ in range(3):
        start = time.thread_time()  # of this thread alone: the machine may be busy
        parse(text, strict=strict)
        times.append(time.thread_time() - start)
    return min(times)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", MEGABYTES)
def test_a_megabyte_takes_less_than_a_second(name: str, strict: bool) -> None:
    assert _seconds(MEGABYTES[name], strict) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "</think><", "<answer>7</answer>"])
def test_time_grows_with_the_length(piece: str, strict: bool) -> None:
    # Eight times the text: about 8 if linear, 64 if quadratic.
    assert _seconds(piece * 80_000, strict) < 30 * _seconds(piece * 10_000, strict)


def test_recorded_judgements(reference) -> None:
    # JudgeLRM-3B on PandaLM; the nine failures were recorded as a pair of zeros.
    rows = json.loads((reference / "pandalm" / "results_judgelrm3b.json").read_text())
    verdicts = [parse(row["output"], strict=False) for row in rows]
    statuses = collections.Counter(verdict.status for verdict in verdicts)
    assert statuses == {"ok": 990, "out_of_range": 9}
    predictions = [verdict.preference or 0 for verdict in verdicts]
    assert predictions == [int(row["result"]) for row in rows]
    assert collections.Counter(predictions) == {1: 479, 2: 438, 0: 82}


@given(st.sampled_from([None, 0, 1, 2]), st.sampled_from([None, 0, 1, 2]))
def test_two_orders_are_consistent_where_both_name_one_answer(shown: Any, swapped: Any) -> None:
    same = {(1, 2), (2, 1), (0, 0)}  # by place: with the answers swapped, place 1 is answer 2
    assert is_consistent(shown, swap_preference(swapped)) == ((shown, swapped) in same)


# The reader of JudgeLRM's own evaluation, as it was before any other reading was added.
_AUTHORS_TAG = re.compile(r"(</?(?:think|answer)>)")
_AUTHORS_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?")


def _as_the_authors(completion: str) -> tuple[tuple[float, ...] | None, str]:
    parts = _AUTHORS_TAG.split(completion.rpartition("</think>")[2])
    tags, texts = parts[1::2], parts[::2]
    pairs = [
        texts[i + 1] for i in range(len(tags) - 1) if tags[i : i + 2] == ["<answer>", "</answer>"]
    ]
    numbers = [float(x) for x in map(str.strip, pairs) if _AUTHORS_NUMBER.fullmatch(x)][:2]
    if len(numbers) == 2:
        return tuple(numbers), "ok"
    return None, "not_a_number" if len(pairs) > 1 else "one_answer" if pairs else "no_answer"


@given(TEXTS | JUDGEMENTS)
@example("</think><answer>1</answer><answer>10</answer><answer>9</answer><answer>2</answer>")
@example("</think><answer>0</answer><answer>99</answer>")
@example("<answer>7,5</answer><answer>**8**</answer><answer>8/10</answer>")
def test_the_authors_rule_stays_what_it_was(text: str) -> None:
    verdict = parse_authors(text)
    assert (verdict.scores, verdict.status) == _as_the_authors(text)


@pytest.mark.parametrize(
    ("text", "is_short"),
    [
        ("The format is <answer>3</answer><answer>5</answer>, I must first weigh", True),
        ("<answer>3</answer><answer>5</answer> is what I would", True),
        ("I must first weigh", True),
        ("<answer>3</answer><answer>5</answer>", False),
        ("<answer>3</answer><answer>5</answer><|im_end|>", False),
        ("<answer>3</answer><answer>5</answer> since the first is wrong.<|im_end|>", False),
        ("<answer>3</answer><answer>5</answer>, so **Answer 2**", False),
        (
            "<answer>3</answer><answer>5</answer> \u56e0\u4e3a\u7b2c\u4e00\u4e2a\u9519\u4e86\u3002",
            False,
        ),
        ("why</think><answer>3</answer><answer>5</answer> is what I would", False),
    ],
)
def test_a_draft_is_a_text_that_goes_on_and_stops_short(text: str, is_short: bool) -> None:
    assert breaks_off(text) == is_short


@pytest.mark.parametrize(
    ("text", "score", "status"),
    [
        ("why</think><answer>7</answer>", 7, "ok"),
        ("why</think>\n<answer> 7.5 </answer><|im_end|>", 7.5, "ok"),
        ("<answer>3</answer> no</think><answer>8/10</answer>", 8, "ok"),
        ("a draft <answer>3</answer>, then <answer>4</answer>", 4, "ok"),
        ("why</think><ANSWER>6</ANSWER>", 6, "ok"),
        ("why</think><answer>score</answer>", None, "not_a_number"),
        ("why</think><answer>11</answer>", None, "out_of_range"),
        ("why</think>7", None, "no_answer"),
        ("", None, "no_answer"),
    ],
)
def test_the_score_of_one_answer(text, score, status):
    assert parse_single(text) == (score, status)


@pytest.mark.parametrize(
    ("text", "score", "status"),
    [
        ("r</think><answer>8</answer>", 8.0, "ok"),
        ("r</think>so<answer> 7.5 </answer>.", 7.5, "ok"),
        ("r</think>", None, "no_answer"),
        ("r</think><answer>8</answer><answer>4</answer>", None, "too_many_answers"),
        ("r<answer>8</answer>", None, "no_think_end"),
        ("<answer>8</answer></think><answer>8</answer>", None, "answer_in_reasoning"),
        ("r</think><answer>8", None, "broken_answer"),
        ("r</think><answer>eight</answer>", None, "not_a_number"),
        ("r</think><answer>11</answer>", None, "out_of_range"),
    ],
)
def test_one_score_has_a_grammar_of_its_own(text, score, status) -> None:
    verdict = parse(text, num_scores=1)
    assert (verdict.score_1, verdict.score_2, verdict.status) == (score, None, status)
    assert verdict.scores is verdict.preference is None


FOUR = "r</think><answer>8</answer><answer>4</answer>, <answer>6.5</answer> <answer>4</answer>"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (FOUR, "ok"),
        (FOUR + " so", "ok"),
        (FOUR + "<answer>1</answer>", "too_many_answers"),
        (FOUR.removesuffix("<answer>4</answer>"), "too_few_answers"),
        ("r</think><answer>8</answer>", "one_answer"),
        ("r</think>", "no_answer"),
        (FOUR.replace("6.5", "65"), "out_of_range"),
        (FOUR.replace("6.5", "six"), "not_a_number"),
        (FOUR.removesuffix("</answer>"), "broken_answer"),
    ],
)
def test_a_list_has_a_score_of_each_answer(text, status) -> None:
    verdict = parse(text, num_scores=4)
    assert verdict.status == status
    seen = {(i, j): verdict.of_pair(i, j).scores for i, j in ((0, 1), (1, 3), (3, 2))}
    if status == "ok":
        assert seen == {(0, 1): (8, 4), (1, 3): (4, 4), (3, 2): (4, 6.5)}
        assert verdict.of_pair(3, 2).preference == 2 and not verdict.of_pair(3, 2).rest
    else:
        assert set(seen.values()) == {None}


def test_the_scores_of_two_answers_make_a_pair() -> None:
    one, two = Verdict(8, None, "ok", "a"), Verdict(4, None, "ok", "b")
    assert one.beside(two) == Verdict(8, 4, "ok", "a")
    assert two.beside(one).preference == 2
    assert one.beside(Verdict(None, None, "no_answer", "")).preference is None


JUDGED = "why</think><answer>8</answer><answer>4</answer>"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (f"facts\nstyle</rubric>\n<think>{JUDGED}", "ok"),
        (f"facts</rubric><think>{JUDGED}", "ok"),
        (f"{JUDGED}", "no_rubric"),
        (f" \n</rubric><think>{JUDGED}", "no_rubric"),  # an empty one
        (f"facts</rubric>{JUDGED}", "no_rubric"),  # no thoughts were opened
        (f"facts</rubric>so <think>{JUDGED}", "no_rubric"),
        (f"facts<answer>9</answer></rubric><think>{JUDGED}", "no_rubric"),
        (f"facts<think>{JUDGED}</rubric>", "no_rubric"),
        ("facts, and more facts", "no_rubric"),
        ("facts</rubric><think>why", "no_think_end"),
        (f"facts</rubric><think>{JUDGED}<answer>3</answer>", "too_many_answers"),
        (f"facts</rubric><think>a<think>{JUDGED}", "repeated_think"),
    ],
)
def test_a_rubric_comes_first_where_the_prompt_opens_one(text: str, status: str) -> None:
    verdict = parse(text, has_rubric=True)
    assert verdict.status == status
    assert verdict.scores == ((8, 4) if status == "ok" else None)
    if status == "ok":
        assert verdict.reasoning == "why"


@given(TEXTS | JUDGEMENTS)
def test_any_text_has_a_verdict_where_a_rubric_is_wanted(text: str) -> None:
    assert parse(text, has_rubric=True).status in get_args(Status)
    behind = parse(f"facts</rubric><think>{text}", has_rubric=True)
    assert behind == parse(text)
