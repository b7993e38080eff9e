"""A judge as a reward: shares of games won, in the forms of TRL and verl."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

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
    assert ask_as_verl_does(rewards.verl(silent), ["x"], ["y"]) == [
        {"score": 0.0, "has_verdict": 0.0}
    ]
    score = rewards.verl_batch(silent)
    assert score(["s"], ["x"], ["y"], [{"question": "q"}]) == [0.0]


def ask_as_verl_does(score: Any, texts: Sequence[str], truths: Sequence[str]) -> list[Any]:
    """Ask as verl 0.9's reward loop does: a task for each response, and keywords alone."""
    assert inspect.iscoroutinefunction(partial(score))  # else verl takes the coroutine for a score

    async def one(text: str, truth: str) -> Any:
        extra = {"question": "q", "num_turns": None, "rollout_reward_scores": {}}
        return await score(data_source="s", solution_str=text, ground_truth=truth, extra_info=extra)

    async def all_of_them() -> list[Any]:
        asked = [asyncio.create_task(one(*each)) for each in zip(texts, truths, strict=True)]
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(all_of_them())


def test_as_verl_asks():
    teller = Teller(lambda first, second: says(QUALITY[first], QUALITY[second]))
    score = rewards.verl(Judge(teller, Reader(), "j"))
    for _ in range(2):  # and again in an event loop of its own
        found = ask_as_verl_does(score, ["good", "bad", "fair"], ["fair"] * 3)
        assert [each["score"] for each in found] == [1.0, 0.0, 0.5]
        assert [each["has_verdict"] for each in found] == [1.0] * 3
    assert teller.calls == [6, 6]  # three responses, both orders, one batch
    with pytest.raises(UsageError, match="a response to s has no 'question'"):
        asyncio.run(score("s", "x", "y", {}))


def test_who_asks_verl_while_others_are_judged_is_judged_next():
    is_judging, may_end = threading.Event(), threading.Event()

    def tell(first: str, second: str) -> str:
        is_judging.set()
        assert may_end.wait(10)
        return says(QUALITY[first], QUALITY[second])

    teller = Teller(tell)
    score = rewards.verl(Judge(teller, Reader(), "j"))

    async def ask() -> list[Any]:
        extra = {"question": "q"}
        first = asyncio.create_task(score("s", "good", "fair", extra))
        await asyncio.to_thread(is_judging.wait, 10)
        later = [asyncio.create_task(score("s", text, "fair", extra)) for text in ("bad", "good")]
        left = asyncio.create_task(score("s", "good", "fair", extra))
        await asyncio.sleep(0)
        left.cancel()
        may_end.set()
        return await asyncio.gather(first, *later)

    assert [each["score"] for each in asyncio.run(ask())] == [1.0, 0.0, 1.0]
    assert teller.calls == [2, 4]  # who asked no more was not judged


def test_a_judge_that_raises_is_heard_of_by_all_whom_verl_asked_for():
    score = rewards.verl(judge())
    found = ask_as_verl_does(score, ["good", "bad"], ["fair", "unheard of"])
    assert [type(each) for each in found] == [KeyError, KeyError]
    (after,) = ask_as_verl_does(score, ["good"], ["fair"])
    assert after["score"] == 1.0


def test_as_verls_batch_manager_asks():
    score = rewards.verl_batch(judge())
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
