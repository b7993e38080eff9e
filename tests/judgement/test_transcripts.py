"""Texts that write out a conversation are taken apart, and other texts are left alone."""

from __future__ import annotations

import pytest

from jlrm.judgement.transcripts import loosely_written, without_end, written

TURNS = [("user", "Why?"), ("assistant", "So.")]


@pytest.mark.parametrize(
    "text",
    [
        "\n\nHuman: Why?\n\nAssistant: So.",
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n",
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nSo.<end_of_turn>\n",
    ],
)
def test_turns_of_names_and_of_tokens(text: str) -> None:
    assert [(role, without_end(said)) for role, said in written(text)] == TURNS
    assert loosely_written(text) == written(text)


@pytest.mark.parametrize(
    "text", ["Q: Why?\nA: So.", "### Instruction:\nWhy?\n\n### Response:\nSo."]
)
def test_looser_forms_are_read_where_asked_for(text: str) -> None:
    assert written(text) == []
    assert loosely_written(text) == TURNS


@pytest.mark.parametrize(
    "text", ["", "Why?", "Humans: why", "a <b> c", "Plan A: walk. Plan B: run."]
)
def test_other_texts_are_no_transcripts(text: str) -> None:
    assert written(text) == loosely_written(text) == []
    assert without_end(text) == text


def test_a_question_alone_is_a_transcript_where_it_begins_as_one() -> None:
    assert written("\n\nHuman: Why?") == [("user", "Why?")]
    assert written("Human: Why?") == []
