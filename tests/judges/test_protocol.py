"""What servers reply, in every form that is known, and what is no reply."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlrm.evaluation.games import Game, Item
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.reading import Reader, read_response
from jlrm.evaluation.scoring import counted
from jlrm.judgement.verdict import parse
from jlrm.judges import complaints, protocol
from jlrm.judges.protocol import NoReply, Reply

SAID = {"type": "text", "text": "SCORES"}
THOUGHT = {"type": "thinking", "thinking": "why"}
THOUGHTS = {
    "type": "thinking",
    "thinking": [{"type": "text", "text": t} for t in ("why", " and ", "why")],
}
GAME = Game(Item("a", "q", ("one", "two")), 0, 1)


@pytest.mark.parametrize(
    ("choice", "text", "status"),
    [
        ({"text": "a\n</think>x"}, "a\n</think>x", "no_answer"),
        ({"text": "<think>a"}, "<think>a", "no_think_end"),
        ({"message": {"content": "a</think>SCORES"}}, "a</think>SCORES", "ok"),
        ({"message": {"content": "\n<think>a</think>SCORES"}}, "a</think>SCORES", "ok"),
        (
            {"message": {"content": "SCORES", "reasoning_content": "why"}},
            "why</think>SCORES",
            "ok",
        ),
        ({"message": {"content": "SCORES", "reasoning": "why"}}, "why</think>SCORES", "ok"),
        (
            {"message": {"content": " a</think>SCORES", "reasoning": "why"}},
            "why a</think>SCORES",
            "ok",
        ),
        ({"message": {"content": "a</think>SCORES", "reasoning": ""}}, "a</think>SCORES", "ok"),
        (
            {"message": {"content": None, "reasoning": "why"}, "finish_reason": "length"},
            "why",
            "no_think_end",
        ),
        ({"message": {"content": "", "reasoning": "why"}}, "why", "no_think_end"),
        ({"message": {"content": " \n", "reasoning": "a</think>SCORES"}}, "a</think>SCORES", "ok"),
        ({"message": {"content": ["a</think>", {"text": "SCORES"}]}}, "a</think>SCORES", "ok"),
        ({"message": {"content": [THOUGHT, {"text": "SCORES"}]}}, "why</think>SCORES", "ok"),
        ({"message": {"content": [THOUGHTS, SAID]}}, "why and why</think>SCORES", "ok"),
        ({"message": {"content": [THOUGHT]}}, "why", "no_think_end"),
        ({"message": {"content": [SAID], "reasoning": "why"}}, "why</think>SCORES", "ok"),
        (
            {"message": {"content": "SCORES", "reasoning_content": "", "reasoning": "why"}},
            "why</think>SCORES",
            "ok",
        ),
        ({"message": {"content": ""}}, "", "no_think_end"),
        ({"message": {"content": None}}, "", "no_think_end"),
        ({"message": {"content": {"type": "text", "text": "SCORES"}}}, "SCORES", "no_think_end"),
        (
            {"message": {"content": [{"type": "text", "text": {"value": "SCORES"}}]}},
            "SCORES",
            "no_think_end",
        ),
        (
            {"message": {"content": [{"text": "why", "thought": True}, {"text": "SCORES"}]}},
            "why</think>SCORES",
            "ok",
        ),
        (
            {"message": {"content": "SCORES", "reasoning_details": [{"summary": "why"}]}},
            "why</think>SCORES",
            "ok",
        ),
        (
            {"message": {"content": "SCORES", "thinking_blocks": [THOUGHT]}},
            "why</think>SCORES",
            "ok",
        ),
        ({"message": {"content": "", "thinking": "why"}}, "why", "no_think_end"),
        ({"message": {"content": "\ud800</think>SCORES"}}, "\ufffd</think>SCORES", "ok"),
    ],
)
def test_forms_of_an_answer(choice, text, status):
    scores = "<answer>7</answer><answer>3</answer>"
    body = json.dumps({"choices": [choice]}).replace("SCORES", scores)
    reply = protocol.read(body.encode(), 1.5)
    assert reply.text == text.replace("SCORES", scores)
    assert parse(reply.text).status == status
    assert reply[1:] == (choice.get("finish_reason"), None, None, 1.5)


NAMES = ["choices", "message", "content", "text", "usage", "reasoning", "error", "code", "detail"]
JSON = st.recursive(
    st.sampled_from([None, True, 0, -1, 1.5, "", "a", "<think>", "\ud800", [], {}]),
    lambda part: (
        st.lists(part, max_size=2) | st.dictionaries(st.sampled_from(NAMES), part, max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(JSON | st.builds(lambda part: {"choices": [part], "usage": part}, JSON))
def test_no_body_breaks_the_reader(value):
    body = json.dumps(value).encode()
    assert isinstance(complaints.read(body).message, str)
    try:
        reply = protocol.read(body, 0.0)
    except protocol.Unreadable:
        return
    reply.text.encode()


def test_deep_json_is_unreadable():
    with pytest.raises(protocol.Unreadable):
        protocol.read(b"[" * 100_000, 0.0)
    complaints.read(b"[" * 100_000)


@pytest.mark.parametrize(
    ("word", "text", "ending"),
    [
        ("stop", "a", "stop"),
        ("STOP", "a", "stop"),
        ("eos", "a", "stop"),
        ("end_turn", "a", "stop"),
        ("tool_calls", "a", "stop"),
        (None, "a", "stop"),
        ("FinishReason.STOP", "a", "stop"),
        ("FINISH_REASON_MAX_TOKENS", "a", "length"),
        ("endTurn", "a", "stop"),
        ("<|im_end|>", "a", "stop"),
        ("finished", "a", "stop"),
        ("not_finished", "a", "unfinished"),
        ("time_limit", "a", "unfinished"),
        ("maxTokens", "a", "length"),
        ("maxPredictedTokensReached", "a", "length"),
        ("content_filter: RECITATION", "", "refused"),
        ("content-filter", "a", "refused"),
        ("IMAGE_SAFETY", "", "refused"),
        ("length", "", "length"),
        ("MAX_TOKENS", "a", "length"),
        ("model_length", "a", "length"),
        ("content_filter", "a", "refused"),
        ("SAFETY", "", "refused"),
        ("stop", "", "unfinished"),
        ("stop", " \n", "unfinished"),
        ("tool_calls", "", "unfinished"),
        (None, "", "unfinished"),
        ("", "a", "unfinished"),
        ("error", "a", "unfinished"),
        ("abort", "a", "unfinished"),
        ("insufficient_system_resource", "a", "unfinished"),
        ({"why": "error"}, "a", "unfinished"),
        (5, "a", "unfinished"),
    ],
)
@pytest.mark.parametrize("is_chat", [True, False])
def test_the_servers_word_decides_what_became_of_a_text(word, text, ending, is_chat):
    said = {"message": {"content": text}} if is_chat else {"text": text}
    body = json.dumps({"choices": [{**said, "finish_reason": word}]})
    assert protocol.read(body.encode(), 0.0).ending == ending


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"message": {"content": "a"}, "error": {"message": "it died"}}]},
        {"choices": [{"text": "a", "finish_reason": "stop"}], "error": {"message": "it died"}},
        {"choices": [{"message": {"content": ""}, "error": "it died"}]},
    ],
)
def test_an_error_beside_a_text_ends_it(body):
    reply = protocol.read(json.dumps(body).encode(), 0.0)
    assert (reply.ending, reply.finish_reason, reply.text) == ("unfinished", "error", "it died")


@pytest.mark.parametrize("error", [None, {}, "", {"code": 0, "message": ""}])
def test_an_error_that_is_none_ends_nothing(error):
    body = {"choices": [{"message": {"content": "a"}, "error": error}], "error": error}
    assert protocol.read(json.dumps(body).encode(), 0.0).ending == "stop"


@pytest.mark.parametrize(
    "choice",
    [{}, {"message": None}, {"message": {}}, {"message": {"content": None}}, {"text": None}],
)
@pytest.mark.parametrize(
    ("word", "ending"),
    [("content_filter", "refused"), ("length", "length"), ("stop", "unfinished")],
)
def test_of_what_ended_at_once_the_word_is_enough(choice, word, ending):
    body = {"choices": [{**choice, "finish_reason": word}]}
    assert protocol.read(json.dumps(body).encode(), 0.0).ending == ending


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [], "prompt_feedback": {"block_reason": "SAFETY"}},
        {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}},
        {"choices": [{"message": {"content": ""}, "error": {"message": "it was flagged"}}]},
        {"choices": [{"message": {"content": ""}, "error": {"code": "content_filter"}}]},
    ],
)
def test_content_that_was_blocked_is_refused(body):
    assert protocol.read(json.dumps(body).encode(), 0.0).ending == "refused"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"error": {"code": 429, "message": "slow down"}}, 429),
        ([{"error": {"code": "503", "message": "slow down"}}], 503),
        ({"choices": None, "error": {"code": "content_filter", "message": "no"}}, 400),
        ({"error": {"code": 7, "message": "slow down"}}, 0),
        ({"code": 429}, 0),
    ],
)
def test_an_error_in_the_place_of_choices_tells_its_status(body, status):
    with pytest.raises(protocol.Unreadable) as found:
        protocol.read(json.dumps(body).encode(), 0.0)
    assert found.value.status == status


def events(*pieces):
    lines = [": processing", *(f"data: {json.dumps(piece)}" for piece in pieces)]
    return "\n\n".join(lines).encode()


def piece(finish=None, **delta):
    return {"choices": [{"delta": delta, "finish_reason": finish}]}


def test_events_that_nobody_asked_for_are_joined():
    usage = {"usage": {"prompt_tokens": 5, "completion_tokens": 7}}
    parts = [piece(role="assistant", reasoning="wh"), piece(reasoning="y"), piece(content="a")]
    body = events(*parts, piece("stop", content="b"), {"choices": [], **usage})
    assert protocol.read(body, 1.0) == Reply("why</think>ab", "stop", 5, 7, 1.0)
    assert protocol.read(events(*parts) + b"\n\ndata: [DONE]\n\n", 1.0).ending == "stop"
    raw = events({"choices": [{"text": "a"}]}, {"choices": [{"text": "b", "finish_reason": "eos"}]})
    assert protocol.read(raw, 1.0)[:2] == ("ab", "eos")


def test_events_that_broke_off_or_told_an_error_are_not_finished():
    cut = protocol.read(events(piece(content="a")), 1.0)
    assert (cut.text, cut.ending) == ("a", "unfinished")
    died = protocol.read(events(piece("stop", content="a"), {"error": {"message": "died"}}), 1.0)
    assert (died.text, died.ending) == ("died", "unfinished")
    for body in (b"data: {", b"data: 5", b'data: {"choices": {"a": 1}}', b'data: {"choices": [5]}'):
        with pytest.raises(protocol.Unreadable):
            protocol.read(body, 0.0)


def test_reasoning_that_is_billed_beside_the_completion_is_counted():
    choice = {"choices": [{"message": {"content": "a"}}]}
    for total, number in ((None, 7), (12, 7), (3, 7), (1000, 995)):
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": total}
        reply = protocol.read(json.dumps({**choice, "usage": usage}).encode(), 0.0)
        assert (reply.prompt_tokens, reply.num_tokens) == (5, number)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *((0, 0), (7, 7), (10**9, 10**9), (10**9 + 1, None), (10**400, None), (-1, None)),
        *((True, None), (7.0, None), (float("nan"), None), ("7", None), (None, None), ([], None)),
    ],
)
def test_a_count_of_tokens(value, number):
    assert protocol.count(value) == number


def test_endings_are_told_where_any_server_said_one():
    def response(*words):
        return protocol.response(GAME, [Reply("a", word, 1, 2, 0.5) for word in words])

    assert response("stop", "length").endings == ("stop", "length")
    assert response(None, "max_tokens").endings == ("stop", "length")
    assert response(None, None).endings is None
    assert (response("stop", "stop").num_tokens, response("stop").seconds) == (4, 0.5)


def test_a_refused_game_counts_as_one_without_a_verdict_and_only_by_policy():
    refused = protocol.response(GAME, [NoReply("content_filter", is_refused=True)])
    assert (refused.refused, refused.error, refused.texts) == ("content_filter", None, None)
    verdict = read_response(GAME, refused, Reader())
    assert (verdict.preference, verdict.scores, verdict.status) == (None, None, "refused")
    usual = Policy("mean", "both", 0.5, 0.5)
    assert counted({GAME.id: refused}, usual) == {}
    counting = Policy("mean", "both", 0.5, 0.5, "error_credit")
    assert counted({GAME.id: refused}, counting) == {GAME.id: refused}
