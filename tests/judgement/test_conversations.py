"""Conversations are read from lists and from texts that write them out."""

from __future__ import annotations

import json

import pytest

from jlrm.config import UsageError
from jlrm.judgement.conversations import (
    context,
    conversation,
    messages,
    talks_of_turns,
    until,
    written_turns,
)
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


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n",
        "<s>[INST] Why? [/INST] So. </s>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>",
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nSo.<end_of_turn>",
        "<|user|>\nWhy?</s>\n<|assistant|>\nSo.</s>",
        "<|prompter|>Why?<|endoftext|><|assistant|>So.<|endoftext|>",
    ],
)
def test_transcripts_in_the_tokens_of_chat_templates(text):
    assert written_turns(text) == [("user", "Why?"), ("assistant", "So.")]


def test_a_system_text_of_llama_2_is_a_turn():
    text = "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWhy? [/INST] <s>So</s> it is."
    turns = [("system", "Be kind."), ("user", "Why?"), ("assistant", "<s>So</s> it is.")]
    assert written_turns(text) == turns


@pytest.mark.parametrize(
    "text",
    [
        *("Human: Why? Assistant: So.", "USER: Why? ASSISTANT: So.</s>", "Q: Why?\nA: So."),
        *("\n\nH: Why?\n\nA: So.", "human: Why?\n\nassistant: So.", "### Human: Why?### AI: So."),
        *("### Instruction:\nWhy?\n\n### Response:\nSo.", "Question: Why?\n\nAnswer: So."),
    ],
)
def test_looser_transcripts_are_read_only_where_nothing_else_can_be_meant(text):
    assert written_turns(text) == []
    assert written_turns(text, is_loose=True) == [("user", "Why?"), ("assistant", "So.")]


def test_instructions_before_a_transcript_and_inputs_belong_to_it():
    text = "Do it.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3"
    turns = [("system", "Do it."), ("user", "Add.\n\n1, 2"), ("assistant", "3")]
    assert written_turns(text, is_loose=True) == turns
    for plain in ("See plan A: So. Plan H: no.", "He said: USER", "", "a\nAnswer: b"):
        assert written_turns(plain, is_loose=True) == []


def test_messages_that_pandas_wrote_into_a_spreadsheet():
    talk = [{"role": "user", "content": 'It\'s\n}\n{ "so"'}, {"role": "assistant", "content": "x"}]
    turns = [("user", 'It\'s\n}\n{ "so"'), ("assistant", "x")]
    assert written_turns(str(talk)) == turns
    assert written_turns(str(talk).replace("}, {", "}\n {")) == turns  # an array of NumPy


def test_tool_calls_are_part_of_a_message():
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    assert messages([message], "x", "user", "here") == [("assistant", json.dumps(calls))]
    said = {**message, "content": "Wait."}
    assert messages(said, "x", "user", "here") == [("assistant", f"Wait.\n{json.dumps(calls)}")]


def test_lists_of_turns_are_conversations():
    both = talks_of_turns('["q", "r"]', [["a", "b"], '["c", null]'])
    assert [[message["content"] for message in talk] for talk in both] == [
        ["q", "a", "r", "b"],
        ["q", "c", "r", None],
    ]
    assert talks_of_turns('["q"]', ["x", "y"]) == talks_of_turns("q", [["x"], ["y"]]) == []


def test_a_transcript_may_end_with_the_name_of_who_answers():
    asked = [("user", "a"), ("assistant", "b"), ("user", "c")]
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert context(text, "prompt", "row 1") == asked
    assert context(text.removesuffix("\n\nAssistant:"), "prompt", "row 1") == asked
    assert context("\n\nHuman: a\n\nAssistant:", "prompt", "row 1") == asked[:1]


@pytest.mark.parametrize("text", ["a letter from me", "the role of a verb", ""])
def test_a_text_with_the_name_of_a_field_in_it_is_a_text(text):
    assert messages(text, "prompt", "user", "row 1") == [("user", text)]


def test_one_message_is_a_list_of_one():
    wanted = [("user", "a")]
    assert messages({"role": "user", "content": "a"}, "prompt", "system", "row 1") == wanted
    assert messages({"from": "human", "value": "a"}, "prompt", "system", "row 1") == wanted
