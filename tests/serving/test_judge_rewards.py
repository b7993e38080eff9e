"""A judge as a reward: shares of games won, in the forms of TRL and verl."""

from __future__ import annotations

import inspect

import pytest
from serving.test_judge_api import Teller, judge_of, says

from jlrm.config import UsageError
from jlrm.evaluation.reading import Reader
from jlrm.serving import rewards
from jlrm.serving.judge import Judge

QUALITY = {"bad": 2, "fair": 5, "good": 8}


def judge() -> Judge:
    return judge_of(lambda first, second: says(QUALITY[first], QUALITY[second]))


def test_against_a_reference_as_trl_asks():
    reward = rewards.trl(judge(), reference="answer")
    texts = ["bad", "fair", "good"]
    found = reward(prompts=["q"] * 3, completions=texts, answer=["fair"] * 3, other=[0] * 3)
    assert found == [0.0, 0.5, 1.0] and reward.__name__ == "jlrm_judge"
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    prompt = [{"role": "user", "content": "q"}]
    assert reward(prompts=[prompt] * 3, completions=messages, answer=["fair"] * 3) == found
    with pytest.raises(UsageError, match=r"no column 'answer'\. It has: other"):
        reward(prompts=["q"], completions=["bad"], other=[1])


def test_completions_of_one_prompt_against_each_other():
    teller = Teller(lambda first, second: says(QUALITY[first], QUALITY[second]))
    reward = rewards.trl(Judge(teller, Reader(), "j"))
    prompts, texts = ["q", "p", "q", "q", "p"], ["bad", "good", "fair", "good", "bad"]
    assert reward(prompts=prompts, completions=texts) == [0.0, 1.0, 0.5, 1.0, 0.0]
    assert teller.calls == [8]  # four pairs, both orders, one batch
    assert reward(prompts=["alone"], completions=["good"]) == [None]


def test_a_judge_that_follows_the_place_pays_all_alike():
    reward = rewards.trl(judge_of(lambda *shown: says(8, 6)), reference="answer")
    assert reward(prompts=["q"], completions=["x"], answer=["y"]) == [0.5]


def test_what_has_no_verdict_is_left_out():
    silent = judge_of(lambda *shown: "hm")
    assert rewards.trl(silent, reference="a")(prompts=["q"], completions=["x"], a=["y"]) == [None]
    score = rewards.verl(silent)
    assert score(["s"], ["x"], ["y"], [{"question": "q"}]) == [0.0]


def test_as_verl_asks():
    score = rewards.verl(judge())
    assert [*inspect.signature(score).parameters][:4] == [
        *("data_sources", "solution_strs", "ground_truths", "extra_infos")
    ]
    extras = [{"question": "q"}, {"question": "p"}]
    named = {"data_sources": ["s"] * 2, "solution_strs": ["good", "bad"], "extra_infos": extras}
    assert score(**named, ground_truths=["fair"] * 2) == [1.0, 0.0]
    with pytest.raises(UsageError, match="response 0 has no 'question'"):
        score(["s"], ["x"], ["y"], [{}])


def test_pairs_for_dpo():
    rows = rewards.preference_pairs(
        judge(), ["q", "p", "r"], [["fair", "good", "bad"], ["bad", "bad"], ["fair"]]
    )
    (row,) = rows
    assert row["prompt"] == "q" and (row["chosen"], row["rejected"]) == ("good", "bad")
    assert (row["score_chosen"], row["score_rejected"]) == (1.0, 0.0)
    assert rewards.preference_pairs(judge(), [], []) == []
