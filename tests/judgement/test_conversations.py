"""Conversations are read from lists and from texts that write them out."""

from __future__ import annotations

import json

import pytest

from jlrm.config import UsageError
from jlrm.judgement.conversations import context, conversation, messages, until, written_turns
from jlrm.judgement.labels import Unusable

TALK = [("user", "Why?"), ("assistant", "Because.\n\nIt is."), ("user", "And?")]


@pytest.mark.parametrize(
    "value",
    [
        [{"role": role, "content": text} for role, text in TALK],
        [
            {"role": role.upper(), "content": [{"type": "text", "text": text}]}
            for role, text in TALK
        ],
        [
            {"from": {"user": "human", "assistant": "gpt"}[role], "value": text, "weight": 1}
            for role, text in TALK
        ],
    ],
)
def test_lists_of_messages(value):
    assert messages(value, "prompt", "user", "here") == TALK
    assert written_turns(json.dumps(value)) == TALK


@pytest.mark.parametrize(
    "text",
    [
        "\n\nHuman: Why?\n\nAssistant: Because.\n\nIt is.\n\nHuman: And?",
        "Human: Why? \n\nAssistant:Because.\n\nIt is.\n\nHuman: And?\n",
        "\r\n\r\nHuman: Why?\r\n\r\nAssistant: Because.\n\nIt is.\r\n\r\nHuman: And?",
        "User: Why?\nAssistant: Because.\n\nIt is.\nUser: And?",
        conversation(TALK),
    ],
)
def test_transcripts(text):
    assert written_turns(text) == TALK


@pytest.mark.parametrize(
    "text",
    [
        *("", "Why?", "Human: what is a human?", "He said:\n\nHuman: no\n\nAssistant: yes", "[1]"),
        *('[{"a": 1}]', "[{'role'", '[{"role": "user"', "Assistant: I am one.", None, 3),
    ],
)
def test_what_is_no_conversation_stays_text(text):
    assert written_turns(text) == []


def test_a_prompt_that_ends_with_the_name_of_who_answers():
    text = "\n\nHuman: Why?\n\nAssistant:"
    assert context(text, "prompt", "here") == [("user", "Why?")]
    assert context("\n\nHuman: Why?", "prompt", "here") == [("user", "Why?")]
    assert context("Assistant:", "prompt", "here") == [("user", "Assistant:")]


def test_what_is_no_text_is_said():
    picture = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
    with pytest.raises(Unusable, match="not_text"):
        messages(picture, "prompt", "user", "here")
    with pytest.raises(Unusable, match="missing_text"):
        messages([{"role": "user", "content": None}], "prompt", "user", "here")
    with pytest.raises(UsageError, match="here: 'prompt': 'content' must be text, got 7"):
        messages([{"role": "user", "content": 7}], "prompt", "user", "here")
    with pytest.raises(UsageError, match=r"list of {role, content}, got 'Why"):
        messages(["Why?"], "prompt", "user", "here")


@pytest.mark.parametrize(
    ("turn", "kept"), [(1, 3), ("1", 3), (2, 5), (3, 5), (None, 5), (0, 5), (-1, 5), (1.5, 5)]
)
def test_a_vote_on_a_turn_is_on_the_answers_up_to_it(turn, kept):
    talk = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert until(talk, turn) == talk[:kept]
