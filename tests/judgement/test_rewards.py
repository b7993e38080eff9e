"""Mode judgelrm equals the authors' algorithm everywhere; the symmetric mode has no sides."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlrm.config import RewardConfig, UsageError
from jlrm.judgement import prompts
from jlrm.judgement.rewards import (
    JUDGELRM,
    TERMS,
    Terms,
    brier_term,
    doubts,
    pay,
    pay_beside,
    pay_list,
    read,
    total,
    withhold,
)
from jlrm.judgement.verdict import Verdict, parse, preferred, swap_preference

MAIN = JUDGELRM
BASE = dataclasses.replace(MAIN, length=0.2, limit=-1.0)
WO_SCORE = dataclasses.replace(MAIN, absolute_exact=0.0, absolute_near=0.0, confidence=0.0)
SYMMETRIC = RewardConfig()
MAX_TOKENS = 2048

# The columns of the tables below: a mode of the authors' code and the length of the response.
COLUMNS = {
    "main": (MAIN, 200),
    "base_100": (BASE, 100),
    "base_200": (BASE, 200),
    "base_2048": (BASE, 2048),
    "wo_score": (WO_SCORE, 200),
}


def score(config: RewardConfig, *, prompt: str, completion: str, **row: Any) -> Terms:
    return pay(config, read(config, prompt, completion), **row)


def _prompt(question: str = "q", answer_1: str = "a", answer_2: str = "b") -> str:
    template = prompts.PAIR_TEMPLATES["judgelrm_train"]
    return prompts.fill(template, question=question, answer_1=answer_1, answer_2=answer_2)


def _judgement(score_1: Any, score_2: Any, reasoning: str = "r") -> str:
    return f"{reasoning}</think><answer>{score_1}</answer><answer>{score_2}</answer><|im_end|>"


def _reward(
    config: RewardConfig,
    completion: str,
    gold: Any,
    prompt: str | None = None,
    num_tokens: int = 200,
    max_tokens: int = MAX_TOKENS,
) -> float:
    terms = score(
        config,
        prompt=_prompt() if prompt is None else prompt,
        completion=completion,
        gold=gold,
        num_tokens=num_tokens,
        max_tokens=max_tokens,
    )
    assert tuple(terms) == TERMS
    return total(terms)


# ---- the authors' mode: measured totals ----------------------------------------------------------

CONTENT = [
    # prediction, gold, then one total for each of COLUMNS
    ((8, 4), (8, 4), 4.2, 4.2, 4.4, 3.4, 3.0),
    ((9, 4), (8, 4), 3.8, 3.8, 4.0, 3.0, 3.0),
    ((7, 4), (8, 4), 3.6, 3.6, 3.8, 2.8, 3.0),
    ((10, 1), (8, 4), 3.2, 3.2, 3.4, 2.4, 3.0),
    ((3, 2), (8, 4), 3.0, 3.0, 3.2, 2.2, 3.0),
    ((4, 8), (8, 4), -0.5, -0.5, -0.3, -1.3, -0.5),
    ((6, 6), (8, 4), 3.0, 3.0, 3.2, 2.2, 3.0),
    ((6, 6), (4, 8), -0.5, -0.5, -0.3, -1.3, -0.5),
    ((5, 5), (5, 5), 4.2, 4.2, 4.4, 3.4, 3.0),
    ((6, 5), (5, 5), 3.8, 3.8, 4.0, 3.0, 3.0),
    ((9, 1), (5, 5), 3.2, 3.2, 3.4, 2.4, 3.0),
    ((5, 6), (5, 5), -0.5, -0.5, -0.3, -1.3, -0.5),
    ((1, 9), (5, 5), -0.5, -0.5, -0.3, -1.3, -0.5),
    ((8, 4), (8.5, 4), 3.6, 3.6, 3.8, 2.8, 3.0),
    ((8, 4), (-1, -1), 3.2, 3.2, 3.4, 2.4, 3.0),
]


@pytest.mark.parametrize("row", CONTENT, ids=lambda row: f"{row[0]}/{row[1]}")
@pytest.mark.parametrize("column", range(len(COLUMNS)), ids=COLUMNS)
def test_authors_content(row: tuple, column: int) -> None:
    config, num_tokens = list(COLUMNS.values())[column]
    reward = _reward(config, _judgement(*row[0]), row[1], num_tokens=num_tokens)
    assert reward == pytest.approx(row[2 + column])


EVERY_MODE = {
    "eleven": (_judgement(11, 4), -2.5),
    "minus_one": (_judgement(-1, 4), -2.5),
    "decimal": (_judgement("8.5", 4), -2.5),
    "fraction": (_judgement("7/10", 4), -2.5),
    "word": (_judgement("eight", 4), -2.5),
    "empty": (_judgement("", 4), -2.5),
    "missing_think_end": ("r<answer>8</answer><answer>4</answer>", -3.0),
    "second_think": ("<think>" + _judgement(8, 4), -3.0),
    "second_think_end": ("</think>" + _judgement(8, 4), -3.0),
    "one_answer": ("r</think><answer>8</answer>", -3.0),
    "three_answers": (_judgement(8, 4) + "<answer>1</answer>", -3.0),
    "answer_in_reasoning": ("<answer>8</answer></think><answer>4</answer>", -3.0),
    "nested": ("r</think><answer>8<answer>4</answer></answer>", -3.0),
    "cut_short": ("r</think><answer>8</answer><answer>4", -3.0),
    "header_in_reasoning": (_judgement(8, 4, "Assistant: 1 is better"), -3.0),
}


@pytest.mark.parametrize("name", EVERY_MODE)
@pytest.mark.parametrize("mode", COLUMNS)
def test_authors_failures(name: str, mode: str) -> None:
    config, num_tokens = COLUMNS[mode]
    completion, expected = EVERY_MODE[name]
    assert _reward(config, completion, (8, 4), num_tokens=num_tokens) == pytest.approx(expected)


ODDITIES = {
    "trailing_text": (_judgement(8, 4) + " done", (8, 4), 4.2),
    "text_between": ("r</think>a<answer>8</answer>b<answer> 4\n</answer>", (8, 4), 4.2),
    "zero": (_judgement(0, 8), (1, 8), 3.8),
    "plus": (_judgement("+8", 4), (8, 4), 4.2),
    "spaces": (_judgement(" 8 ", 4), (8, 4), 4.2),
    "underscore": (_judgement("1_0", 4), (10, 4), 4.2),
    "full_width": (_judgement("\uff18", 4), (8, 4), 4.2),
    "text_gold": (_judgement(8, 4), ["8 4\nBecause."], 4.2),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_authors_oddities(name: str) -> None:
    completion, gold, expected = ODDITIES[name]
    assert _reward(MAIN, completion, gold) == pytest.approx(expected)


@pytest.mark.parametrize("mode", COLUMNS)
@pytest.mark.parametrize(
    "gold",
    [[], [8, 4, 3], ["8.5 4"], ["8 4 3"], ["8"], [""], ["\n8 4"], [8], "8 4", "84"],
    ids=repr,
)
def test_authors_gold_failure(gold: Any, mode: str) -> None:
    config, num_tokens = COLUMNS[mode]
    for completion in (_judgement(8, 4), "nothing"):
        assert _reward(config, completion, gold, num_tokens=num_tokens) == pytest.approx(-2.0)


def test_authors_gold_as_two_texts() -> None:
    for config, num_tokens in (COLUMNS["main"], COLUMNS["base_100"]):
        reward = _reward(config, _judgement(8, 4), ["8", "4"], num_tokens=num_tokens)
        assert reward == pytest.approx(-1.0)
    # Unlike other failures, this one still meets the length term.
    assert _reward(BASE, _judgement(8, 4), ["8", "4"], num_tokens=200) == pytest.approx(-0.8)
    assert _reward(WO_SCORE, _judgement(8, 4), ["8", "4"]) == pytest.approx(3.0)
    assert _reward(MAIN, _judgement(4, 8), ["8", "4"]) == pytest.approx(-0.5)


def test_authors_header() -> None:
    good, gold = _judgement(8, 4), (8, 4)
    assert _reward(MAIN, good, gold, _prompt("Human: hi Assistant: hello")) == pytest.approx(4.2)
    assert _reward(MAIN, good, gold, _prompt(answer_2="Assistant:")) == pytest.approx(4.2)
    tagged = _prompt("Assistant:", answer_1="<answer>3</answer>")
    assert _reward(MAIN, good, gold, tagged) == pytest.approx(-3.0)
    only_tags = _prompt(answer_1="<answer>3</answer>", answer_2="</think>")
    assert _reward(MAIN, good, gold, only_tags) == pytest.approx(4.2)
    for config, num_tokens in COLUMNS.values():
        reward = _reward(config, good, gold, "<think>", num_tokens)
        assert reward == pytest.approx(-1.0)


def test_authors_limit_of_zero() -> None:
    reward = _reward(BASE, _judgement(8, 4), (8, 4), num_tokens=0, max_tokens=0)
    assert reward == pytest.approx(3.2)


def test_authors_mode_has_sides() -> None:
    # The known asymmetry: the same tied verdict, the same tied gold, seen from either side.
    assert _reward(MAIN, _judgement(6, 6), (8, 4)) == pytest.approx(3.0)
    assert _reward(MAIN, _judgement(6, 6), (4, 8)) == pytest.approx(-0.5)
    assert _reward(MAIN, _judgement(6, 5), (5, 5)) == pytest.approx(3.8)
    assert _reward(MAIN, _judgement(5, 6), (5, 5)) == pytest.approx(-0.5)


# ---- the authors' mode: the algorithm written out once more --------------------------------------


def _oracle(
    whole: str, gold: Any, ablation: str, num_tokens: int, max_tokens: int
) -> tuple[str, float]:
    """The authors' steps one by one; returns where the text ended up, and the total."""
    if len(gold) == 2:
        expected = gold
    else:
        try:
            expected = [int(word) for word in gold[0].split("\n")[0].split()]
        except (AttributeError, IndexError, ValueError):
            return "gold", -2.0
        if len(expected) != 2:
            return "gold", -2.0

    has_header = True
    if "Assistant:" in whole:
        kept = whole[whole.index("Assistant:") + len("Assistant:") :]
    elif "<|im_start|>assistant" in whole:
        kept = whole[whole.index("<|im_start|>assistant") + len("<|im_start|>assistant") :]
    else:
        kept, has_header = whole, False

    counts = [kept.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    if counts != [1, 1, 2, 2]:
        return "count", -1.0 - 2.0
    first = [kept.find(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    if not first[0] < first[1] < first[2] < first[3]:
        return "order", -1.0 - 2.0
    blocks = re.findall(r"<answer>(.*?)</answer>", kept, re.DOTALL)
    if len(blocks) != 2:
        return "blocks", -1.0 - 2.0
    try:
        s1, s2 = int(blocks[0].strip()), int(blocks[1].strip())
    except ValueError:
        return "not_int", -0.5 - 2.0
    if not (0 <= s1 <= 10 and 0 <= s2 <= 10):
        return "range", -0.5 - 2.0
    if not has_header:
        return "no_header", 1.0 - 2.0

    if (expected[0] >= expected[1]) == (s1 >= s2):
        where, content = "right", 2.0
        if ablation != "reward_wo_score":
            try:
                distance = abs(expected[0] - s1) + abs(expected[1] - s2)
                if distance == 0:
                    where, content = "exact", content + 1.0
                elif distance <= 2:
                    where, content = "near", content + 0.6
                if abs(s1 - s2) >= abs(expected[0] - expected[1]):
                    content += 0.2
            except TypeError:
                where, content = "text", -2.0
    else:
        where, content = "wrong", -1.5
    if ablation == "base_reward":
        content += 0.2 if num_tokens > 120 else 0.0
        content += -1.0 if num_tokens >= max_tokens else 0.0
    return where, 1.0 + content


ABLATIONS = {"reward_w_length": MAIN, "base_reward": BASE, "reward_wo_score": WO_SCORE}
PIECES = (
    *("<think>", "</think>", "<answer>", "</answer>", "<answer>7</answer>", "<answer>3</answer>"),
    *("Assistant:", "<|im_start|>assistant", "<|im_end|>", "Assistant", ": ", "text", "8", "\0"),
    *("<answer", "answer>", "<", ">", "</", "<ANSWER>", "<answer >", "\n", "\r\n", " ", "\x1c"),
)
NUMBERS = (
    *(str(n) for n in range(11)),
    *(str(n) for n in range(11)),
    *("11", "-1", "-0", "+8", " 8 ", "\n9\t", "1_0", "_1", "08", "8.5", "8.0", "7/10", "eight", ""),
    *("\uff18", "\u0668", "\x1c8", "8\u2003", "nan", "inf", "1e1", "0x8", "9" * 5000, "3 4", "<"),
)
GOLDS = (
    *([a, b] for a in range(1, 11) for b in range(1, 11)),
    *([a, b] for a in (7.5, 8, 8.5) for b in (7.5, 8.0, -1)),
    *([-1, -1], [0, 8], ["8", "4"], ["4", "8"], [float("nan"), 5], ["8 4\nwhy"], ["3 +9"]),
    *([], [8, 4, 3], ["8.5 4"], ["8 4 3"], [""], ["8  4"], [7], [None]),
)


def _random_row(rng: random.Random) -> tuple[str, str]:
    """A prompt and a completion: a judgement with up to a few pieces put in or taken out."""
    parts = ["\nr\n", "</think>", "\n"]
    for _ in range(2 if rng.random() < 0.9 else rng.randrange(4)):
        parts += ["<answer>", rng.choice(NUMBERS), "</answer>"]
    prompt = [_prompt()]
    if rng.random() < 0.25:
        prompt = rng.choice((["<|im_start|>assistant", "<think>"], ["<think>"]))
    if rng.random() < 0.05:
        prompt.insert(0, rng.choice(PIECES))
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 3, 8))):
        place = rng.randrange(len(parts) + 1)
        action = rng.random()
        if action < 0.5:
            parts.insert(place, rng.choice(PIECES))
        elif action < 0.7:
            del parts[place : place + 1]
        elif action < 0.9:
            parts[place : place + 1] = [rng.choice(PIECES)]
        else:
            other = rng.randrange(len(parts) + 1)
            parts[place : place + 1], parts[other : other + 1] = (
                parts[other : other + 1],
                parts[place : place + 1],
            )
    if rng.random() < 0.1:
        parts = rng.choices(PIECES, k=rng.randrange(20))
    return "".join(prompt), "".join(parts)


@pytest.mark.slow
def test_authors_algorithm_on_random_text() -> None:
    rng = random.Random(0)
    visited = collections.Counter()
    for _ in range(120_000):
        prompt, completion = _random_row(rng)
        gold = rng.choice(GOLDS)
        ablation = rng.choice(tuple(ABLATIONS))
        max_tokens = rng.choice((0, 100, 2048))
        num_tokens = rng.choice((0, 99, 100, 120, 121, 2047, 2048))
        where, expected = _oracle(prompt + completion, gold, ablation, num_tokens, max_tokens)
        terms = score(
            ABLATIONS[ablation],
            prompt=prompt,
            completion=completion,
            gold=gold,
            num_tokens=num_tokens,
            max_tokens=max_tokens,
        )
        assert total(terms) == pytest.approx(expected), (prompt, completion, gold, ablation)
        visited[where] += 1
    # Every way out of the algorithm was taken, or the equality above says little.
    structure = {"count", "order", "blocks", "not_int", "range", "no_header"}
    ways = structure | {"gold", "exact", "near", "right", "text", "wrong"}
    assert set(visited) == ways and min(visited.values()) > 50, visited


@given(st.text(), st.text(), st.sampled_from(GOLDS), st.sampled_from(sorted(ABLATIONS)))
def test_authors_algorithm_on_any_text(a: str, b: str, gold: list, ablation: str) -> None:
    completion = f"{a}</think><answer>{b}</answer><answer>4</answer>"
    _, expected = _oracle(_prompt() + completion, gold, ablation, 121, 2048)
    reward = _reward(ABLATIONS[ablation], completion, gold, num_tokens=121)
    assert reward == pytest.approx(expected)


# ---- the symmetric mode --------------------------------------------------------------------------

HALF_POINTS = st.integers(2, 20).map(lambda n: n / 2)
PAIRS = st.tuples(HALF_POINTS, HALF_POINTS)
WRITTEN = st.sampled_from([*NUMBERS, "8.5", "1.5", "10.0"])


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ((8, 4), (8, 4), 4.2),
        ((9, 4), (8, 4), 3.8),
        ((7, 4), (8, 4), 3.6),
        ((10, 1), (8, 4), 3.2),
        ((3, 2), (8, 4), 3.0),
        ((4, 8), (8, 4), -0.5),
        ((6, 6), (8, 4), -0.5),
        ((6, 6), (4, 8), -0.5),
        ((5, 5), (5, 5), 4.2),
        ((6, 6), (5, 5), 3.8),
        ((9, 9), (5, 5), 3.2),
        ((6, 5), (5, 5), -0.5),
        ((5, 6), (5, 5), -0.5),
        (("8.5", 4), (8.5, 4), 4.2),
        ((8, 4), (8.5, 4), 3.6),
    ],
)
def test_symmetric_content(prediction: tuple, gold: tuple, expected: float) -> None:
    assert _reward(SYMMETRIC, _judgement(*prediction), gold) == pytest.approx(expected)
    assert _reward(SYMMETRIC, _judgement(*prediction[::-1]), gold[::-1]) == pytest.approx(expected)


@pytest.mark.parametrize("no_verdict", [0.0, -2.0])
def test_symmetric_failures_earn_the_structure_only(no_verdict: float) -> None:
    config = dataclasses.replace(SYMMETRIC, no_verdict=no_verdict, length=0.2, limit=-1.0)
    for scores in ((11, 4), (8, 0), (8, -1), ("eight", 4), ("7/10", 4)):
        reward = _reward(config, _judgement(*scores), (8, 4), num_tokens=MAX_TOKENS)
        assert reward == pytest.approx(-0.5 + no_verdict)
    for name, (completion, authors_total) in EVERY_MODE.items():
        if authors_total == -3.0 and name != "header_in_reasoning":
            reward = _reward(config, completion, (8, 4), num_tokens=MAX_TOKENS)
            assert reward == pytest.approx(-1.0 + no_verdict), name


def test_symmetric_mode_does_not_look_for_headers() -> None:
    assert _reward(SYMMETRIC, _judgement(8, 4, "Assistant: 1 is better"), (8, 4)) == (
        pytest.approx(4.2)
    )


@given(WRITTEN, WRITTEN, PAIRS, st.text(max_size=20), st.integers(0, 3000))
def test_symmetric_mode_has_no_sides(
    first: str, second: str, gold: tuple, reasoning: str, num_tokens: int
) -> None:
    config = dataclasses.replace(SYMMETRIC, length=0.2, limit=-1.0)
    here = score(
        config,
        prompt=_prompt(answer_1="a", answer_2="b"),
        completion=_judgement(first, second, reasoning),
        gold=gold,
        num_tokens=num_tokens,
        max_tokens=MAX_TOKENS,
    )
    there = score(
        config,
        prompt=_prompt(answer_1="b", answer_2="a"),
        completion=_judgement(second, first, reasoning),
        gold=gold[::-1],
        num_tokens=num_tokens,
        max_tokens=MAX_TOKENS,
    )
    assert here == there


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), PAIRS, PAIRS)
def test_symmetric_mode_never_reads_the_prompt(text: str, scores: tuple, gold: tuple) -> None:
    completion = _judgement(*scores)
    hostile = _prompt(text, text, text)
    assert _reward(SYMMETRIC, completion, gold, hostile) == _reward(SYMMETRIC, completion, gold, "")


@given(PAIRS, PAIRS)
def test_nothing_pays_more_than_the_gold_scores(scores: tuple, gold: tuple) -> None:
    best = _reward(SYMMETRIC, _judgement(*gold), gold)
    assert best == pytest.approx(4.2)
    assert _reward(SYMMETRIC, _judgement(*scores), gold) <= best


@pytest.mark.parametrize(
    "gold", [(-1, -1), (8,), (8, 4, 3), (), (float("nan"), 4), (8, float("inf"))], ids=repr
)
def test_symmetric_mode_refuses_gold_that_is_no_pair_of_scores(gold: tuple) -> None:
    with pytest.raises(UsageError, match=re.escape(repr(gold))):
        _reward(SYMMETRIC, _judgement(8, 4), gold)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["judgelrm", "judgelrm_symmetric"])
@pytest.mark.parametrize(
    ("setting", "value", "completion", "term", "expected"),
    [
        ("format", 0.25, _judgement(8, 4), "format", 0.25),
        ("out_of_range", -0.25, _judgement(11, 4), "format", -0.25),
        ("malformed", -0.25, "r", "format", -0.25),
        ("no_verdict", -0.25, "r", "no_verdict", -0.25),
        ("relation", 0.25, _judgement(8, 4), "relation", 0.25),
        ("wrong_relation", -0.25, _judgement(4, 8), "relation", -0.25),
        ("absolute_exact", 0.25, _judgement(8, 4), "absolute", 0.25),
        ("absolute_near", 0.25, _judgement(9, 4), "absolute", 0.25),
        ("near_distance", 5.0, _judgement(10, 1), "absolute", 0.6),
        ("confidence", 0.25, _judgement(8, 4), "confidence", 0.25),
        ("length", 0.25, _judgement(8, 4), "length", 0.25),
        ("limit", -0.25, _judgement(8, 4), "length", -0.25),
        ("min_score", 5, _judgement(8, 4), "format", -0.5),
        ("max_score", 7, _judgement(8, 4), "format", -0.5),
    ],
)
def test_every_setting_has_its_term(
    mode: str, setting: str, value: float, completion: str, term: str, expected: float
) -> None:
    def terms(config: RewardConfig) -> Terms:
        return score(
            config,
            prompt=_prompt(),
            completion=completion,
            gold=(8, 4),
            num_tokens=200,
            max_tokens=200,
        )

    config = RewardConfig(mode=mode)
    changed = terms(dataclasses.replace(config, **{setting: value}))
    assert changed[term] == pytest.approx(expected)
    assert terms(config)[term] != pytest.approx(expected)


# ---- preferences, calibration, consistency -------------------------------------------------------

LABELS = st.sampled_from([0, 1, 2])


def _by_preference(config: RewardConfig, completion: str, preference: int | None) -> Terms:
    return score(
        config,
        prompt="",
        completion=completion,
        preference=preference,
        num_tokens=200,
        max_tokens=MAX_TOKENS,
    )


@given(WRITTEN, WRITTEN, LABELS, st.floats(0, 2), st.floats(0, 9))
def test_preferences_and_calibration_have_no_sides(
    first: str, second: str, label: int, brier: float, margin: float
) -> None:
    config = dataclasses.replace(SYMMETRIC, brier=brier, certain_margin=margin)
    here = _by_preference(config, _judgement(first, second), label)
    there = _by_preference(config, _judgement(second, first), swap_preference(label))
    assert here == pytest.approx(there)


def test_a_row_with_a_preference_alone_is_paid_by_it_and_by_no_scores() -> None:
    right, wrong, none = (
        _by_preference(SYMMETRIC, text, 1) for text in (_judgement(8, 4), _judgement(4, 8), "r")
    )
    assert right["preference"] == 2.0 and wrong["preference"] == -1.5 and none["preference"] == 0.0
    for terms in (right, wrong, none):
        assert terms["relation"] is terms["absolute"] is terms["confidence"] is None
    assert [total(terms) for terms in (right, wrong, none)] == [3.0, -0.5, -1.0]
    assert _by_preference(SYMMETRIC, _judgement(5, 5), 0)["preference"] == 2.0
    scored = score(
        SYMMETRIC, prompt="", completion="r", gold=(8, 4), num_tokens=1, max_tokens=MAX_TOKENS
    )
    assert scored["preference"] is None
    with pytest.raises(UsageError, match="preference=None"):
        _by_preference(SYMMETRIC, _judgement(8, 4), None)


@pytest.mark.parametrize(
    ("scores", "label", "expected"),
    [
        ((10, 1), 1, 1.0),
        ((10, 1), 2, -3.0),
        ((5, 5), 1, 0.0),
        ((5, 5), 0, 1.0),
        ((10, 1), 0, 0.0),
        ((7, 4), 1, 1 - 4 * (1 / 3) ** 2),
    ],
)
def test_brier_values(scores: tuple, label: int, expected: float) -> None:
    config = dataclasses.replace(SYMMETRIC, brier=1.0)
    assert _by_preference(config, _judgement(*scores), label)["brier"] == pytest.approx(expected)


@given(st.floats(0, 1), st.integers(0, 9))
def test_brier_is_proper(truth: float, margin: int) -> None:
    """No margin earns more in expectation than the one that states the true probability."""
    config = dataclasses.replace(SYMMETRIC, brier=1.0, min_score=0, max_score=100)

    def expected(stated: float) -> float:
        scores = (50 + 50 * (2 * stated - 1), 50 - 50 * (2 * stated - 1))
        return truth * brier_term(config, scores, 1) + (1 - truth) * brier_term(config, scores, 2)

    assert expected(truth) >= expected(margin / 9) - 1e-9


def test_certain_margin_is_where_certainty_begins() -> None:
    config = dataclasses.replace(SYMMETRIC, brier=1.0, certain_margin=2.0)
    assert _by_preference(config, _judgement(6, 4), 1)["brier"] == 1.0
    assert _by_preference(config, _judgement(9, 4), 1)["brier"] == 1.0
    assert _by_preference(config, _judgement(6, 5), 1)["brier"] == pytest.approx(0.75)


@given(WRITTEN, WRITTEN, WRITTEN, WRITTEN, PAIRS)
def test_a_verdict_that_flips_is_paid_for_its_structure_alone(
    first: str, second: str, third: str, fourth: str, gold: tuple
) -> None:
    config = dataclasses.replace(SYMMETRIC, swap_consistency=1.0)
    forward, backward = _judgement(first, second), _judgement(third, fourth)
    verdict, other = parse(forward), parse(backward)
    terms = score(
        config, prompt="", completion=forward, gold=gold, num_tokens=9, max_tokens=MAX_TOKENS
    )
    lost = withhold(config, terms, verdict, other)
    if None not in (verdict.preference, other.preference) and (
        verdict.preference == swap_preference(other.preference)
    ):
        assert lost == 0.0
    else:
        structure = (terms["format"] or 0.0) + (terms["no_verdict"] or 0.0)
        assert total(terms) + lost == pytest.approx(min(total(terms), structure))
    assert withhold(dataclasses.replace(config, swap_consistency=0.5), terms, verdict, other) == (
        pytest.approx(lost / 2)
    )


def test_a_proper_score_beside_a_bonus_for_margins_is_doubted() -> None:
    both = dataclasses.replace(SYMMETRIC, brier=0.5, confidence=0.2)
    (sentence,) = doubts(both)
    assert "reward.confidence=0 beside reward.brier" in sentence
    assert not doubts(dataclasses.replace(both, confidence=0.0))
    assert not doubts(dataclasses.replace(both, brier=0.0))


def test_the_form_is_paid_with_its_rubric_alone() -> None:
    judgement = _judgement(8, 4)
    opened = prompts.PAIR_TEMPLATES["toy_rubric"]
    told = {"gold": (8, 4), "num_tokens": 9, "max_tokens": MAX_TOKENS}
    bare, whole = (
        pay(SYMMETRIC, read(SYMMETRIC, opened, text), **told)
        for text in (judgement, f"facts</rubric><think>{judgement}")
    )
    assert whole == pay(SYMMETRIC, read(SYMMETRIC, "", judgement), **told)
    assert total(bare) == SYMMETRIC.malformed + SYMMETRIC.no_verdict
    assert bare["relation"] == 0.0


SCORES = st.one_of(st.none(), st.integers(1, 10))


@given(SCORES, st.lists(SCORES, min_size=1, max_size=5), st.sampled_from([(8, 4), (3, 9), (5, 5)]))
def test_an_answer_judged_alone_is_paid_for_the_pairs_that_its_score_makes(
    own: int | None, others: list[int | None], gold: tuple[int, int]
) -> None:
    def alone(score: int | None) -> Verdict:
        text = "r</think>" if score is None else f"r</think><answer>{score}</answer>"
        return read(SYMMETRIC, "", text, num_scores=1)

    known = {"gold": gold, "num_tokens": 9, "max_tokens": MAX_TOKENS}
    terms = pay_beside(SYMMETRIC, alone(own), [alone(each) for each in others], **known)
    seen = [each for each in others if each is not None]
    assert terms["format"] == (SYMMETRIC.malformed if own is None else SYMMETRIC.format)
    if own is None:
        assert total(terms) == SYMMETRIC.malformed + SYMMETRIC.no_verdict
    elif not seen:
        assert total(terms) == SYMMETRIC.format and terms["relation"] is None
    else:
        share = sum(np.sign(own - each) == np.sign(gold[0] - gold[1]) for each in seen) / len(seen)
        wanted = share * SYMMETRIC.relation + (1 - share) * SYMMETRIC.wrong_relation
        assert terms["relation"] == pytest.approx(wanted)
        pairs = [_reward(SYMMETRIC, _judgement(own, each), gold) for each in seen]
        assert total(terms) == pytest.approx(np.mean(pairs))


@given(
    st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=2, max_size=8),
    st.booleans(),
)
def test_a_list_is_paid_as_its_pairs_are_on_average(answers, is_ranked: bool) -> None:
    said, gold = zip(*answers, strict=True)
    text = "why</think>" + "".join(f"<answer>{score}</answer>" for score in said)
    places = list(itertools.combinations(range(len(answers)), 2))
    by_label = {(i, j): (None, preferred(gold[i], gold[j])) for i, j in places}
    golds = by_label if is_ranked else {(i, j): ((gold[i], gold[j]), None) for i, j in places}
    known = {"golds": golds, "num_tokens": 9, "max_tokens": MAX_TOKENS}
    verdict = read(SYMMETRIC, "", text, num_scores=len(answers))
    terms = pay_list(SYMMETRIC, verdict, **known)
    pairs = [
        _by_preference(SYMMETRIC, _judgement(said[i], said[j]), by_label[i, j][1])
        if is_ranked
        else score(
            SYMMETRIC,
            prompt="",
            completion=_judgement(said[i], said[j]),
            gold=(gold[i], gold[j]),
            num_tokens=9,
            max_tokens=MAX_TOKENS,
        )
        for i, j in places
    ]
    assert total(terms) == pytest.approx(np.mean([total(each) for each in pairs]))
    agreed = np.mean([np.sign(said[i] - said[j]) == np.sign(gold[i] - gold[j]) for i, j in places])
    order = "preference" if is_ranked else "relation"
    wanted = agreed * SYMMETRIC.relation + (1 - agreed) * SYMMETRIC.wrong_relation
    assert terms[order] == pytest.approx(wanted)
    assert terms["relation" if is_ranked else "preference"] is None
    cut = read(SYMMETRIC, "", text.removesuffix("</answer>"), num_scores=len(answers))
    assert total(pay_list(SYMMETRIC, cut, **known)) == SYMMETRIC.malformed + SYMMETRIC.no_verdict


def test_mode_none_pays_nothing() -> None:
    terms = _by_preference(dataclasses.replace(SYMMETRIC, mode="none"), _judgement(8, 4), 1)
    assert set(terms.values()) == {None} and total(terms) == 0.0


@pytest.mark.parametrize(
    ("num_tokens", "paid"), [(5, 0.0), (160, 0.0), (170, -0.5), (180, -1.0), (200, -2.0)]
)
@pytest.mark.parametrize("text", [_judgement(8, 4), "cut before a verdict"])
@pytest.mark.parametrize("mode", ["judgelrm", "judgelrm_symmetric", "none"])
def test_a_long_completion_is_punished_the_more_the_nearer_to_the_limit(
    num_tokens: int, paid: float, text: str, mode: Any
) -> None:
    config = dataclasses.replace(SYMMETRIC, mode=mode, overlong=-2.0)
    verdict = read(config, "", text)
    given = {"gold": (8, 4), "num_tokens": num_tokens, "max_tokens": 200}
    terms = pay(config, verdict, **given)
    assert terms["overlong"] == pytest.approx(paid)
    without = pay(dataclasses.replace(config, overlong=0.0), verdict, **given)
    assert {**terms, "overlong": None} == {**without, "overlong": None}


def test_length_tokens() -> None:
    config = dataclasses.replace(SYMMETRIC, length=0.2, length_tokens=50)
    assert _reward(config, _judgement(8, 4), (8, 4), num_tokens=50) == pytest.approx(4.2)
    assert _reward(config, _judgement(8, 4), (8, 4), num_tokens=51) == pytest.approx(4.4)


@pytest.mark.parametrize("gold", [(0, 5), (5, 0), (0, 0)])
def test_a_gold_score_of_zero_is_a_label(gold) -> None:
    config = RewardConfig(min_score=0)
    verdict = read(config, "", f"r</think><answer>{gold[0]}</answer><answer>{gold[1]}</answer>")
    terms = pay(config, verdict, gold=gold, num_tokens=5, max_tokens=9)
    assert terms["relation"] == config.relation and terms["absolute"] == config.absolute_exact
