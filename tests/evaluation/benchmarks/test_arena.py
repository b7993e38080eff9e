"""Conversations of Chatbot Arena as the benchmark `pairs`: a vote on two whole conversations."""

from __future__ import annotations

import json

from jlrm.evaluation.benchmarks.registry import BENCHMARKS


def talk(model, turns):
    return [
        {"content": f"{role} {turn}" + f" {model}" * (role == "assistant"), "role": role}
        for turn in range(1, turns + 1)
        for role in ("user", "assistant")
    ]


def vote(number, winner, turns=1):
    """Return a row as lmsys/chatbot_arena_conversations has it."""
    return {
        **{"question_id": f"q{number}", "model_a": "vicuna", "model_b": "koala", "winner": winner},
        **{"judge": "arena_user_1", "turn": turns, "anony": True, "language": "English"},
        **{"conversation_a": talk("a", turns), "conversation_b": talk("b", turns)},
        **{"tstamp": 1682351591.1, "openai_moderation": {}, "toxic_chat_tag": {}},
    }


def read(tmp_path, *rows):
    (tmp_path / "arena.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return BENCHMARKS["pairs"].read(str(tmp_path / "arena.jsonl"))


def test_every_winner_of_the_arena_is_a_label(tmp_path):
    winners = {"model_a": 1, "model_b": 2, "tie": 0, "tie (bothbad)": 0}
    items = read(tmp_path, *(vote(n, winner) for n, winner in enumerate(winners)))
    assert [item.label for item in items] == list(winners.values())
    assert {item.answers for item in items} == {("assistant 1 a", "assistant 1 b")}
    assert {item.question for item in items} == {"user 1"}


def test_what_follows_the_shared_turns_is_the_answer(tmp_path):
    (item,) = read(tmp_path, vote(1, "model_b", turns=2))
    assert item.question == "user 1"
    assert item.answers[1] == "Assistant: assistant 1 b\n\nUser: user 2\n\nAssistant: assistant 2 b"
    assert item.label == 2
