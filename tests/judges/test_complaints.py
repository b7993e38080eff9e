"""What servers complain of, whose fault it is, and how long they ask to wait."""

from __future__ import annotations

import datetime
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlrm.config import RunError, UsageError
from jlrm.judges import complaints
from jlrm.judges.complaints import Declined, Passing, Received

NOW = datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC)
SENT = {
    "model": "m",
    "messages": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
    **{"temperature": 0.0, "max_tokens": 100, "seed": 5, "top_k": 3},
}


def failure(status, body, *, headers=None, sent=SENT, is_first=True):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    received = Received(status, headers or {}, content)
    return complaints.failure(received, sent, str, "http://host/v1", is_first)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("2", 2.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        (None, None),
        ("Tue, 24 Nov 2026 12:00:30 GMT", 30.0),
        ("Tue, 24 Nov 2026 12:00:30 -0000", 30.0),
        ("Tue, 24 Nov 2026 11:00:00 GMT", 0.0),
        ("2026-11-24T12:00:30Z", 30.0),
        (str(1795521630), 30.0),  # since 1970
        (str(1795521630000), 30.0),
        ("6m0s", 360.0),
        ("1h2m3.5s", 3723.5),
        ("120ms", 0.12),
        ("1s", 1.0),
        ("9" * 400, None),
        ("Tue, 99 Nov 2026", None),
    ],
)
def test_a_moment_in_a_header(header, seconds):
    assert complaints.moment(header, NOW) == seconds


@pytest.mark.parametrize(
    ("headers", "text", "seconds"),
    [
        ({"retry-after-ms": "1500", "retry-after": "2"}, "in 9s", 1.5),
        ({"retry-after": "2", "x-ratelimit-reset-requests": "5s"}, "Please try again in 9s", 2.0),
        ({"retry-after": "0"}, "Please try again in 9s.", 9.0),
        ({}, "Please try again in 20s. Visit https://host/1 for more", 20.0),
        ({}, "Please try again in 1.5s.", 1.5),
        ({}, "please retry in 500ms", 0.5),
        ({}, "Please try again in 6m0s.", 360.0),
        ({}, "Please retry after 20 seconds.", 20.0),
        ({}, "Rate limit reached, wait 2 minutes", 120.0),
        ({}, "Try again in 1 hour", 3600.0),
        ({}, "Limit 8 in 40 s", None),
        ({}, "Try again later. There were 3 requests", None),
        ({"x-ratelimit-reset-requests": "2s", "x-ratelimit-reset-tokens": "6m0s"}, "", 2.0),
        (
            {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}
            | {"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "1s"},
            "",
            360.0,
        ),
        ({"ratelimit-reset": "7"}, "", 7.0),
        ({"x-rate-limit-reset": "7"}, "", 7.0),
        ({"x-ratelimit-reset-requests": "1m30s"}, "", 90.0),
        ({"x-ratelimit-reset-requests": "250ms"}, "", 0.25),
        ({"retry-after": "Tue, 24 Nov 2020 12:00:00 GMT"}, "", None),
        ({"retry-after": "9" * 400 + "s"}, "", None),
        (
            {"anthropic-ratelimit-requests-remaining": "0"}
            | {"anthropic-ratelimit-requests-reset": "2026-11-24T12:00:30Z"},
            "",
            30.0,
        ),
        ({"x-ratelimit-reset": "1795521630000"}, "", 30.0),
        ({"x-ratelimit-reset-requests": "soon"}, "", None),
        ({"retry-after-ms": "nan"}, "", None),
        ({}, "", None),
    ],
)
def test_the_wait_that_a_server_tells(headers, text, seconds):
    received = Received(429, headers, json.dumps({"error": {"message": text}}).encode())
    assert complaints.wait_told(received, NOW) == seconds


@pytest.mark.parametrize(
    ("name", "value", "seconds"),
    [("retry_after", 12, 12.0), ("retryAfter", "1.5", 1.5), ("retry_after_ms", 500, 0.5)],
)
def test_a_number_in_the_body_is_read(name, value, seconds):
    body = json.dumps({"error": {"message": "slow down", name: value}}).encode()
    assert complaints.wait_told(Received(429, {}, body), NOW) == seconds


def test_a_delay_in_the_details_is_read():
    body = {"error": {"message": "Quota", "details": [{"@type": "x", "retryDelay": "34s"}]}}
    assert complaints.wait_told(Received(429, {}, json.dumps(body).encode()), NOW) == 34.0


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"message": "no", "code": "content_filter"}}),
        (400, {"error": {"message": "no", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
        (400, {"error": {"message": "Invalid prompt: flagged as violating our usage policy"}}),
        (400, {"error": {"message": "Input data may contain inappropriate content."}}),
        (403, {"error": {"message": "Your chosen model requires moderation", "code": 403}}),
        (422, {"detail": "blocked by the content filter"}),
        (400, [{"error": {"message": "The prompt was blocked due to SAFETY"}}]),
        (400, {"error": {"message": "Content Exists Risk"}}),
        (400, {"error": {"message": "输入内容可能包含不安全或敏感内容"}}),
        (500, {"error": {"message": "no", "code": "content_filter"}}),
    ],
)
def test_content_that_is_refused(status, body):
    found = failure(status, body)
    assert isinstance(found, Declined) and found.is_content


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"message": "This model's maximum context length is 4096 tokens"}}),
        (422, {"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Required"}]}),
        (400, {"error": {"message": "max_tokens is too large for this prompt, at most 5"}}),
        (400, {"error": {"message": "unknown seeds", "param": "messages[0].seed"}}),
    ],
)
def test_what_one_game_has_done(status, body):
    found = failure(status, body)
    assert isinstance(found, Declined) and not found.is_content
    assert "--request" not in str(found)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "x"}]}, "seed"),
        (
            {"message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "top_k"]}]}},
            "top_k",
        ),
        (
            {"error": {"message": "no", "code": "unsupported_value", "param": "temperature"}},
            "temperature",
        ),
        ({"error": {"message": "Unsupported parameter: 'seed'"}}, "seed"),
        ({"error": "Unrecognized request argument supplied: top_k"}, "top_k"),
        ({"error": {"message": 'Unknown name "seed": Cannot find field.'}}, "seed"),
        ({"error": {"message": "property 'seed' is unsupported"}}, "seed"),
        ({"message": "seed: Extra inputs are not permitted"}, "seed"),
        ({"error": {"message": "Extra inputs are not permitted", "param": "body.seed"}}, "seed"),
        ([{"error": {"message": 'Unknown name "seed": Cannot find field.'}}], "seed"),
        ({"error": {"message": "invalid temperature: only 1 is allowed"}}, "temperature"),
        ({"error": "`temperature` must be strictly positive"}, "temperature"),
        ({"error": {"message": "`temperature` is deprecated for this model."}}, "temperature"),
    ],
)
def test_a_refused_field_is_named_once_nothing_was_answered(body, name):
    advice = f"'{name}': --request {name}=null leaves it out."
    for status in (400, 422):
        found = failure(status, body)
        assert isinstance(found, UsageError) and advice in str(found)
        later = failure(status, body, is_first=False)
        assert isinstance(later, Declined) and advice in str(later)
    without = {key: value for key, value in SENT.items() if key != name}
    assert "--request" not in str(failure(400, body, sent=without))


def test_the_limits_other_name_is_told():
    text = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    found = str(failure(400, {"error": {"message": text}}))
    assert "--request max_tokens=null max_completion_tokens=N renames it" in found


@pytest.mark.parametrize(
    "text",
    [
        "System role not supported",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "Only user and assistant roles are supported!",
        "'system' is not one of ['user', 'assistant'] - 'messages.0.role'",
        "Expected the first message to be from the user, got system",
        "A conversation must start with a user message.",
        "Developer instruction is not enabled for models/gemma-3-27b-it",
        "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
        "System messages are not supported by this model",
        "jinja2.exceptions.TemplateError: system message not allowed",
    ],
)
def test_models_without_a_system_role(text):
    complaint = complaints.read(json.dumps({"error": {"message": text}}).encode())
    assert complaints.is_about_system(400, complaint)
    assert "--system user" in complaints.advised(400, complaint, SENT)
    alone = {"messages": [{"role": "user", "content": ""}]}
    assert "--system" not in complaints.advised(400, complaint, alone)


@pytest.mark.parametrize(
    "text", ["The system is overloaded", "file system full", "Internal error", "no such role"]
)
def test_other_errors_are_not_about_the_system_role(text):
    assert not complaints.is_about_system(500, complaints.Complaint(text))


def test_what_passes_stops_or_waits():
    limit = failure(429, {"error": {"message": "Please try again in 3s"}})
    assert isinstance(limit, Passing) and limit.is_limit and limit.wait == 3.0
    busy = failure(503, b"<html>", headers={"retry-after": "4"})
    assert isinstance(busy, Passing) and not busy.is_limit and busy.wait == 4.0
    daily = failure(429, {"error": {"message": "try again in 6h"}})
    assert isinstance(daily, RunError) and "wait for 360 minutes" in str(daily)
    assert isinstance(failure(429, {"error": {"code": "insufficient_quota"}}), UsageError)
    assert isinstance(failure(401, {}), UsageError) and isinstance(failure(404, {}), UsageError)


@pytest.mark.parametrize(
    ("status", "body", "suspect"),
    [
        (402, {"error": {"message": "Insufficient Balance"}}, "the account's balance"),
        (429, {"error": {"code": "insufficient_quota"}}, "the account's balance"),
        (400, [{"error": {"message": "API key not valid."}}], "the API key"),
        (400, {"error": {"message": "m is not a valid model ID"}}, "the model"),
        (400, {"error": {"message": "Invalid model: m"}}, "the model"),
        (405, {"detail": "Method Not Allowed"}, "the model, base_url and settings"),
    ],
)
def test_what_no_game_has_done_stops_the_run_and_says_where_to_look(status, body, suspect):
    found = failure(status, body)
    assert isinstance(found, UsageError) and str(found).endswith(f". Check {suspect}.")


@pytest.mark.parametrize("status", [408, 424, 425, 498, 499, 503, 529])
def test_what_may_pass(status):
    assert isinstance(failure(status, {"error": {"message": "busy"}}), Passing)


def test_a_redirection_and_a_web_page_are_told_in_short():
    found = failure(307, b"", headers={"location": "https://other/v1"})
    assert "It points to https://other/v1. Check" in str(found)
    page = b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head>..."
    assert str(failure(502, page)) == "HTTP 502: a web page, '502 Bad Gateway'"


NAMES = ("error", "message", "detail", "loc", "type", "code", "param", "innererror", "seed")
JSON = st.recursive(
    st.sampled_from([None, True, 0, 1.5, "", "seed unsupported", "body", [], {}]),
    lambda part: (
        st.lists(part, max_size=2) | st.dictionaries(st.sampled_from(NAMES), part, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(JSON, st.sampled_from([400, 403, 413, 422, 429, 500]))
def test_no_complaint_breaks_the_reader(body, status):
    assert str(failure(status, body)).count("HTTP") == 1
