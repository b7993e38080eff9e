"""MT-Bench's votes in the published form, and its published figures."""

from __future__ import annotations

import json

import pytest

from jlrm.config import UsageError
from jlrm.evaluation.benchmarks.registry import BENCHMARKS

KNOWN = BENCHMARKS["mtbench_human"]


def talk(model):
    return [
        {
            "content": f"{role} {turn} {model}" if role == "assistant" else f"ask {turn}",
            "role": role,
        }
        for turn in (1, 2)
        for role in ("user", "assistant")
    ]


ROW = {
    **{"question_id": 81, "model_a": "vicuna", "model_b": "alpaca", "winner": "model_a"},
    **{"judge": "expert_3", "conversation_a": talk("v"), "conversation_b": talk("a"), "turn": 1},
}


def read(tmp_path, *rows):
    (tmp_path / "human.json").write_text(json.dumps(rows))
    return KNOWN.read(str(tmp_path / "human.json"))


def test_votes_on_a_pair_in_either_order_belong_together(tmp_path):
    mirrored = {
        **{**ROW, "model_a": "alpaca", "model_b": "vicuna", "winner": "tie (inconsistent)"},
        **{"conversation_a": talk("a"), "conversation_b": talk("v")},
    }
    (item,) = read(tmp_path, ROW, mirrored, {**mirrored, "winner": "model_b"})
    assert (item.id, item.label) == ("81:alpaca-vicuna:1", 2)
    assert item.answers == ("assistant 1 a", "assistant 1 v")
    assert item.meta["votes"] == (2, 0, 2)


def test_votes_of_gpt_4_and_of_authors_are_not_asked(tmp_path, caplog):
    others = [{**ROW, "judge": judge} for judge in ("author_0", "gpt4_pair", ["gpt-4", "pair-v2"])]
    assert len(read(tmp_path, ROW, *others)) == 1
    assert "3 rows are not asked: their judge is no expert" in caplog.text


@pytest.mark.parametrize("wrong", [None, "text", {}, talk("v")[:2]])
def test_a_conversation_that_ends_before_its_turn_is_named(tmp_path, wrong):
    with pytest.raises(UsageError, match="row 1: 'conversation_a' must be a list of 4 messages"):
        read(tmp_path, {**ROW, "turn": 2, "conversation_a": wrong})


def test_published_figures_are_those_of_both_turns():
    assert {row.metric: row.value for row in KNOWN.published} == {
        **{"turn 1": 66.0, "turn 1_no_ties": 85.0},
        **{"turn 2": 66.0, "turn 2_no_ties": 85.0},
    }
