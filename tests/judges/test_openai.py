"""Whatever a server does, every game is recorded once, nothing is paid twice, no key leaks."""

from __future__ import annotations

import collections
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
import traceback
from typing import Any

import chat_server
import pytest
from conftest import slowness
from endpoints import (
    KEY,
    PRICES,
    TESTS,
    Running,
    game,
    games,
    judged,
    make,
    options,
    outputs,
)
from hostile import HOSTILE
from qwen import CONTROL_TOKENS

from jlrm.config import RunError, UsageError
from jlrm.evaluation.games import Game, Item, Response
from jlrm.judgement import prompts
from jlrm.judgement.verdict import parse
from jlrm.judges import openai, pace, requests

# Judges as `jlrm.evaluate` does: each answer is on disk when `record` returns.
CLIENT = """
import json, pathlib, signal, sys
from jlrm.evaluation.games import Item, both_orders
from jlrm.judges import openai, requests

def stop(signum, frame):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
num_items, path, kwargs = json.loads(sys.argv[1])
items = [Item(str(i), f"question {i}", ("one", "two")) for i in range(num_items)]
kwargs["cache"] = kwargs["cache"] and pathlib.Path(kwargs["cache"])
with open(path, "a") as file:
    def record(answer):
        file.write(json.dumps([answer.game, answer.texts, answer.error]) + "\\n")
        file.flush()
    judge = openai.Endpoint(requests.EndpointSettings(model="judge", **kwargs))
    try:
        judge(both_orders(items), record)
    except KeyboardInterrupt:
        sys.exit(130)
"""


# -------------------------------------------------------------------------------- what is asked


@pytest.mark.slow
def test_every_vote_is_asked_once_and_concurrency_is_reached(serve):
    server = serve("--delay", "0.05", "--key", KEY)
    backend = make(server, votes=3, concurrency=6)
    answers = judged(backend, games(12))
    assert len(server.requests) == 36 == backend.spent.num_requests
    assert max(row["in_flight"] for row in server.requests) == 6
    # No body came twice: each vote has a seed of its own, and so do both orders.
    assert len({row["body"]["seed"] for row in server.requests}) == 36
    assert outputs(answers) == sorted(server.served)
    for answer in answers.values():
        assert len(answer.texts or ()) == 3
        assert answer.num_tokens == 3 * chat_server.COMPLETION_TOKENS
        assert answer.prompt_tokens and answer.seconds
        assert all(parse(text).scores == (7, 3) for text in answer.texts or ())
    assert backend.spent.num_tokens == 36 * chat_server.COMPLETION_TOKENS


def test_answers_do_not_depend_on_order_concurrency_or_what_else_is_asked(serve):
    server = serve()
    everything = judged(make(server, votes=2, concurrency=8), games(8))
    few = judged(make(server, votes=2, concurrency=1), games(8)[::-2])
    assert len(few) == 4
    for name, answer in few.items():
        assert answer.texts == everything[name].texts


@pytest.mark.parametrize("name", ["judgelrm_train", "judgelrm_eval"])
def test_raw_prompts_go_out_byte_for_byte(serve, name):
    server = serve()
    judged(make(server, prompt=name), [game("What is 2 {answer_1}?")])
    (row,) = server.requests
    assert row["path"] == "/v1/completions"
    assert row["body"]["prompt"] == prompts.fill(
        prompts.PAIR_TEMPLATES[name],
        question="What is 2 {answer_1}?",
        answer_1="one",
        answer_2="two",
    )
    assert row["body"]["stop"] == ["<|im_end|>"]


def test_chat_prompts_and_settings_go_out(serve):
    server = serve()
    asked = [Game(Item("a", "Why?", ("one", "two")), 1, 0)]
    judged(make(server, scale=(0, 5), top_p=0.9, temperature=0.25, max_new_tokens=77), asked)
    judged(make(server, api_key=None, seed=1), asked)
    first, second = server.requests
    system, user = prompts.messages("jlrm", 0, 5)
    assert first["path"] == "/v1/chat/completions"
    assert first["body"] == {
        "model": "judge",
        "messages": [
            {"role": "system", "content": system},
            {
                "role": "user",
                "content": prompts.fill(user, question="Why?", answer_1="two", answer_2="one"),
            },
        ],
        "temperature": 0.25,
        "top_p": 0.9,
        "max_tokens": 77,
        "seed": first["body"]["seed"],
    }
    assert first["auth"] == f"Bearer {KEY}" and second["auth"] is None
    assert first["body"]["seed"] != second["body"]["seed"]
    assert "top_p" not in second["body"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["judgelrm_train", "jlrm"])
def test_hostile_text_has_no_control_tokens_and_only_where_asked(name):
    clean = requests.Template.of(name, (1, 10), True)
    raw = requests.Template.of(name, (1, 10), False)
    assert set(CONTROL_TOKENS) == requests.CONTROL_TOKENS
    empty = chat_server.text_of(clean.fill(Game(Item("", "", ("", "")), 0, 1)))
    honest = game("Is a < b, or `x |> f`?")
    assert clean.fill(honest) == raw.fill(honest)
    for text in HOSTILE.values():
        asked = Game(Item("", text, (text, text)), 0, 1)
        filled = chat_server.text_of(clean.fill(asked))
        for token in CONTROL_TOKENS:
            assert filled.count(token) == empty.count(token)
        filled.encode()
        if not any("\ud800" <= character <= "\udfff" for character in text):
            assert chat_server.text_of(raw.fill(asked)).count(text) >= 3


# ------------------------------------------------------------------------------ what goes wrong

PASSING = (
    *("not_json", "not_utf8", "no_choices", "schema", "null", "error", "empty", "reset", "half"),
    *("s408", "s409", "s500", "s503", "upstream", "beside", "blank", "no_tokens", "aborted"),
    *("packed_half", "brotli"),
)


@pytest.mark.slow
def test_what_passes_is_asked_again(serve):
    """Neither are limits of a rate tries: more of them come than there are retries."""
    server = serve()
    asked = [game(f"FAULT:{fault}*2", number) for number, fault in enumerate((*PASSING, "s429"))]
    backend = make(server, concurrency=4, max_retries=2)
    answers = judged(backend, asked)
    assert [answer.error for answer in answers.values()] == [None] * len(asked)
    assert outputs(answers) == sorted(server.served)
    assert set(server.counts().values()) == {3}
    assert backend.spent.num_retries == 2 * len(asked)


def test_what_does_not_pass_is_unjudged_after_the_last_retry(serve):
    server = serve()
    asked = [game(f"FAULT:{fault}", number) for number, fault in enumerate(PASSING)]
    answers = judged(make(server, max_retries=1), [*asked, game("fine", 99)])
    assert sum(answer.error is None for answer in answers.values()) == 1
    assert collections.Counter(server.counts().values()) == {2: len(PASSING), 1: 1}
    for number, fault in enumerate(PASSING):
        error = answers[asked[number].id].error
        assert error and "asked 2 times" in error
        assert not fault.startswith("s4") or f"HTTP {fault[1:]}" in error


# The words for what a server did not finish.
TOLD = {
    "upstream": "the reply ended with an error: upstream died",
    "beside": "the reply ended with an error: cut off by the gateway",
    "blank": "an empty reply, finish_reason 'stop'",
    "no_tokens": "an empty reply, finish_reason 'None'",
    "aborted": "the reply was not finished, finish_reason 'abort'",
}


def test_what_was_not_finished_is_named_paid_and_asked_again_by_the_next_run(serve, tmp_path):
    """Each costs what its usage says, and nothing of it is kept."""
    server = serve()
    asked = [game(f"FAULT:{fault}*2", number) for number, fault in enumerate(TOLD)]
    cache = tmp_path / "cache"
    backend = make(server, max_retries=1, cache=cache, prices=(0.0, 1e6))
    answers = judged(backend, asked)
    assert [answers[each.id].error for each in asked] == [
        f"{text} (asked 2 times)" for text in TOLD.values()
    ]
    assert not list(cache.iterdir())
    assert backend.spent.usd == 2 * chat_server.COMPLETION_TOKENS * (len(TOLD) - 1)  # no_tokens: 0
    again = judged(make(server, cache=cache), asked)
    assert all(answer.endings == ("stop",) for answer in again.values())


def test_refused_content_is_recorded_as_such_and_asked_once(serve, tmp_path):
    server = serve()
    faults = ("filter", "azure_filter", "filter_code", "moderated", "flagged", "wont", "wont_part")
    asked = [game(f"FAULT:{fault}", number) for number, fault in enumerate(faults)]
    cache = tmp_path / "cache"
    answers = judged(make(server, cache=cache), [*asked, game("fine", 99)])
    reasons = [answers[each.id].refused or "" for each in asked]
    assert reasons[0] == "content_filter" and reasons[5:] == ["refusal: I won't judge this."] * 2
    assert all(reason.startswith("HTTP 4") for reason in reasons[1:5])
    assert answers["99:0-1"].endings == ("stop",)
    assert len(server.requests) == len(asked) + 1 and len(list(cache.iterdir())) == 1


def test_a_text_cut_at_the_limit_says_so_and_is_kept(serve, tmp_path):
    server = serve()
    for _ in range(2):
        (answer,) = judged(make(server, votes=2, cache=tmp_path), [game("FAULT:cut")]).values()
        assert answer.endings == ("length", "length") and answer.error is None
    assert len(server.requests) == 2


def test_a_refused_vote_refuses_its_game_and_a_missing_one_counts_more(serve):
    server = serve("--fault", "2=filter", "--fault", "5=filter", "--fault", "6=s400")
    backend = make(server, votes=3, concurrency=1)
    first, second = judged(backend, [game("a", 1), game("b", 2)]).values()
    assert first.refused == "content_filter" and first.error is None
    assert second.refused is None and (second.error or "").startswith("HTTP 400")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["endless", "bomb", "five_gigabytes", "endless_error"])
def test_a_body_without_end_costs_one_game_and_no_memory(serve, fault):
    """A process of its own: what it held at most is known only when it has ended."""
    server = serve()
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps([server.url, f"FAULT:{fault}"])],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        **{"capture_output": True, "text": True, "timeout": 60.0 * slowness()},
    )
    assert run.stderr == ""
    before, after, error, other = json.loads(run.stdout)
    assert error == "the reply is larger than 16 MiB, which no judgement is"
    assert other is None
    assert after - before < 100 * 1024  # KiB
    assert len(server.requests) == 2


# The first game's reply has no end; prints the memory before and after, and both errors.
MEASURED = """
import json, resource, sys
import endpoints
from jlrm.judges import openai, requests
url, question = json.loads(sys.argv[1])
settings = requests.EndpointSettings(model="judge", **endpoints.options(url))
backend, responses = openai.Endpoint(settings), []
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = used()
for number, text in enumerate((question, "fine")):
    backend([endpoints.game(text, number)], responses.append)
print(json.dumps([before, used(), *(each.error for each in responses)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", range(5))
def test_a_storm_of_limits_loses_no_game(serve, shape):
    """40 games at 8 a window, the wait told in every way; far more refusals than retries."""
    server = serve("--rate", "8/0.8", "--rate-shape", str(shape))
    answers = judged(make(server, concurrency=20, max_retries=0), games(40))
    assert all(answer.texts for answer in answers.values())
    assert outputs(answers) == sorted(server.served)
    assert len(server.requests) < 160
    times = sorted(row["time"] for row in server.requests)
    assert times[-1] - times[0] >= 4 * 0.8 - 0.1


@pytest.mark.slow
def test_a_limit_that_never_ends_stops_the_run_and_one_of_a_game_costs_the_game(serve, monkeypatch):
    monkeypatch.setattr(pace, "LONGEST_PATIENCE", 0.5)
    server = serve()
    asked = [game("FAULT:s429", 0), *(game(f"fine {i}", i) for i in range(1, 120))]
    slow = make(server, concurrency=2, requests_per_minute=6000)
    answers = judged(slow, asked)
    assert "HTTP 429" in (answers["0:0-1"].error or "")
    assert sum(answer.error is not None for answer in answers.values()) == 1
    monkeypatch.setattr(pace, "PATIENCE", 0.5)
    with pytest.raises(RunError, match=r"wants no requests: HTTP 429.*--requests-per-minute"):
        make(server)([game("FAULT:s429", 0)], lambda answer: None)


def test_a_request_larger_than_the_limit_is_not_waited_for(serve):
    server = serve()
    (answer,) = judged(make(server), [game("FAULT:oversized")]).values()
    assert "Request too large" in (answer.error or "") and len(server.requests) == 1


@pytest.mark.slow
def test_requests_per_minute_are_kept_by_all_together(serve):
    server = serve()
    judged(make(server, concurrency=8, requests_per_minute=1200), games(20))
    times = sorted(row["time"] for row in server.requests)
    assert times[-1] - times[0] >= 19 * 0.05 - 0.04


@pytest.mark.parametrize("status", [400, 422, 500])
def test_without_a_system_role_the_system_text_goes_before_the_users(serve, status, caplog):
    server = serve("--no-system", str(status))
    answers = judged(make(server, concurrency=3), games(12))
    assert all(answer.texts for answer in answers.values())
    assert 12 < len(server.requests) <= 15
    assert caplog.text.count("no system role") == 1
    system, user = prompts.messages("jlrm", 1, 10)
    filled = prompts.fill(user, question="question 0", answer_1="one", answer_2="two")
    assert f"{system}\n\n{filled}" in server.counts()
    roles = [row["body"]["messages"][0]["role"] for row in server.requests]
    assert roles.count("user") == 12  # and each worker asked once in the own form, at most
    with pytest.raises(UsageError, match="--system user puts"):
        make(server, system="own", concurrency=1)(games(2), lambda answer: None)
    before = len(server.requests)
    judged(make(server, system="user"), games(2))
    assert len(server.requests) == before + 2


def test_what_was_paid_for_in_another_form_is_found_again(serve, tmp_path):
    server = serve("--no-system", "400")
    judged(make(server, cache=tmp_path), games(4))
    backend = make(server, cache=tmp_path)
    judged(backend, games(4))
    assert backend.spent.num_cached == 4 and backend.spent.num_requests == 0
    backend = make(server, cache=tmp_path, system="user")
    judged(backend, games(4))
    assert backend.spent.num_cached == 4


def test_a_server_that_answers_keeps_its_form(serve):
    """One complaint of a system role, after answers, costs its game."""
    server = serve("--fault", "3=no_system")
    answers = judged(make(server, concurrency=1), games(6))
    errors = [answer.error for answer in answers.values() if answer.error]
    assert len(errors) == 1 and "--system user" in errors[0]
    assert all(row["body"]["messages"][0]["role"] == "system" for row in server.requests)


def test_fields_are_added_changed_and_left_out(serve):
    server = serve()
    added = {"seed": None, "temperature": None, "top_k": 5, "stop": ["a", None], "max_tokens": 7}
    judged(make(server, request=added), [game("Why?")])
    body = server.requests[0]["body"]
    assert set(body) == {"model", "messages", "max_tokens", "top_k", "stop"}
    assert (body["top_k"], body["stop"], body["max_tokens"]) == (5, ["a", None], 7)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [("seed", 0), ("temperature", 1), ("seed", 2)])
def test_a_field_that_a_server_refuses_is_named_with_the_flag_that_helps(serve, name, shape):
    server = serve("--refuse", name, "--refuse-shape", str(shape))
    with pytest.raises(UsageError, match=f"'{name}': --request {name}=null leaves it out"):
        make(server, concurrency=2)(games(8), lambda answer: None)
    assert len(server.requests) <= 2
    assert all(a.texts for a in judged(make(server, request={name: None}), games(8)).values())


def test_azures_version_stays_behind_the_path_and_its_key_has_a_header_of_its_own(serve):
    server = serve()
    url = f"{server.url}/deployments/x?api-version=2024-10-21"
    judged(make(server, base_url=url), [game("Why?")])
    row = server.requests[0]
    assert row["path"] == "/v1/deployments/x/chat/completions?api-version=2024-10-21"
    assert row["api_key"] == KEY
    judged(make(server), [game("Why?")])
    assert server.requests[1]["api_key"] is None


@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens"])
@pytest.mark.parametrize("value", ["1" + "0" * 400, "-5", "NaN", "true", '"7"', "1e999", "2.5"])
def test_a_usage_that_can_be_none_counts_as_the_most(serve, tmp_path, field, value):
    server = serve("--usage", f'{{"prompt_tokens": 1, "completion_tokens": 1, "{field}": {value}}}')
    backend = make(server, prices=(0.0, 1e6), budget=1000.0, cache=tmp_path)
    (answer,) = judged(backend, [game("Why?")]).values()
    assert answer.texts and backend.spent.usd == 100.0
    again = make(server, cache=tmp_path)
    judged(again, [game("Why?")])
    assert again.spent.num_cached == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["late", "trickle", "trickled_head"])
def test_a_slow_answer_ends_at_the_timeout(serve, fault):
    server = serve()
    began = time.monotonic()
    answers = judged(
        make(server, timeout=0.5, max_retries=1), [game(f"FAULT:{fault}"), game("fine", 1)]
    )
    assert time.monotonic() - began < 2.5 * slowness()
    assert "no whole reply in 0.5 s" in (answers["0:0-1"].error or "")
    assert answers["1:0-1"].error is None


@pytest.mark.slow
def test_a_number_in_retry_after_holds_back_all_requests(serve):
    server = serve("--delay", "0.05")
    asked = [game("FAULT:seconds*1", 0), *(game(f"fine {i}", i) for i in range(1, 30))]
    answers = judged(make(server, concurrency=2), asked)
    assert all(answer.error is None for answer in answers.values())
    times = [row["time"] - server.requests[0]["time"] for row in server.requests]
    # Besides the first one: what was under way, or left just before the 429 came in.
    assert len(times) == 31 and sum(seconds < 0.9 for seconds in times) <= 4


@pytest.mark.slow
def test_a_date_in_retry_after_is_obeyed(serve):
    server = serve()
    (answer,) = judged(make(server), [game("FAULT:date*1")]).values()
    assert answer.error is None
    first, second = (row["time"] for row in server.requests)
    assert second - first >= 1.0  # a date has whole seconds: two from now are more than one


def test_a_limit_per_day_stops_the_run(serve):
    server = serve("--fault", "all=tomorrow")
    with pytest.raises(RunError, match="wait for 1440 minutes"):
        make(server)(games(20), lambda answer: None)
    assert len(server.requests) <= 8


@pytest.mark.parametrize("fault", ["s401", "s403", "s404", "setting", "quota", "redirect"])
def test_refusals_stop_at_once_and_hide_the_key(serve, fault, caplog, tmp_path):
    server = serve("--fault", f"all={fault}")
    backend = make(server, concurrency=3, cache=tmp_path / "cache")
    answers: list[Response] = []
    with caplog.at_level(logging.DEBUG), pytest.raises(UsageError) as caught:
        backend(games(40), answers.append)
    assert not answers
    assert len(server.requests) <= 3
    message = str(caught.value)
    assert f"no for Bearer [key]: {fault}" in message and server.url in message
    trace = "".join(traceback.format_exception(caught.value))
    for text in (message, trace, caplog.text, repr(backend), str(backend.spent)):
        assert KEY not in text
    assert not list((tmp_path / "cache").iterdir())


def test_a_request_that_is_refused_costs_only_its_game(serve):
    server = serve()
    asked = [game("FAULT:s400", 0), game("FAULT:s413", 1), *(game("fine", i) for i in range(2, 6))]
    answers = judged(make(server), asked)
    assert [answer.error is None for _, answer in sorted(answers.items())] == [False] * 2 + [
        True
    ] * 4
    assert (answers["0:0-1"].error or "").startswith("HTTP 400: no for Bearer [key]")
    assert set(server.counts().values()) == {1}


def test_the_other_name_of_the_limit(serve):
    server = serve("--fault", "all=renamed")
    answers = judged(make(server, concurrency=4, max_retries=0), games(12))
    assert outputs(answers) == sorted(server.served)
    assert len(server.requests) <= 12 + 4
    assert all(
        row["body"]["max_completion_tokens"] == 100
        for row in server.requests
        if "max_tokens" not in row["body"]
    )


def test_without_a_server_the_run_stops(serve):
    server = serve()
    server.stop()
    with pytest.raises(RunError, match="No server at"):
        make(server, max_retries=1)(games(4), lambda answer: None)


def test_an_error_in_record_comes_through(serve):
    server = serve("--delay", "0.02")
    recorded = []

    def record(answer: Response) -> None:
        recorded.append(answer)
        if len(recorded) == 3:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        make(server, concurrency=2)(games(40), record)
    assert len(recorded) == 3
    assert len(server.requests) < 40


@pytest.mark.slow
def test_a_missing_vote_leaves_the_game_unjudged_and_the_others_kept(serve, tmp_path):
    server = serve("--fault", "2=s400")
    backend = make(server, votes=3, concurrency=1, cache=tmp_path / "cache")
    (answer,) = judged(backend, [game("fine")]).values()
    assert (answer.error or "").startswith("HTTP 400") and len(server.requests) == 3
    (answer,) = judged(backend, [game("fine")]).values()
    assert len(answer.texts or ()) == 3
    assert len(server.requests) == 4 and backend.spent.num_cached == 2


# ------------------------------------------------------------------------------- what is stopped


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back(serve, tmp_path):
    cache = tmp_path / "cache"
    server = serve("--fault", "20=die", "--delay", "0.01")
    asked = games(40)
    answers = judged(make(server, concurrency=4, max_retries=1, cache=cache), asked)
    errors = [answer.error for answer in answers.values() if answer.error is not None]
    assert outputs(answers) == sorted(server.served)
    assert 16 <= len(server.served) < 20 and len(errors) == 40 - len(server.served)
    assert all("connection" in error for error in errors)

    serve("--port", str(server.port))  # writes into the same log
    backend = make(server, concurrency=4, cache=cache)
    again = judged(backend, asked)
    assert all(answer.error is None for answer in again.values())
    assert outputs(again) == sorted(server.served) and len(server.served) == 40
    assert backend.spent.num_cached == 40 - len(errors)
    assert list(cache.glob("*.tmp")) == []


def start_client(path: pathlib.Path, num_items: int, **kwargs: Any) -> subprocess.Popen:
    arguments = json.dumps([num_items, str(path), {**kwargs, "cache": str(kwargs["cache"])}])
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, arguments],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on_and_pays_nothing_twice(serve, tmp_path, signum):
    server = serve("--delay", "0.05")
    path, cache = tmp_path / "answers.jsonl", tmp_path / "cache"
    kwargs = options(server.url, cache=cache, concurrency=4, votes=2)
    client = start_client(path, 20, **kwargs)
    deadline = time.monotonic() + 20.0 * slowness()
    while not path.exists() or path.read_text().count("\n") < 8:
        assert time.monotonic() < deadline and client.poll() is None
        time.sleep(0.01)
    began = time.monotonic()
    client.send_signal(signum)
    _, stderr = client.communicate(timeout=10 * slowness())
    assert time.monotonic() - began < 3.0 * slowness()
    assert client.returncode == (-signal.SIGKILL if signum == signal.SIGKILL else 130)
    assert stderr == ""
    recorded = [json.loads(line) for line in path.read_text().splitlines()]
    assert 8 <= len(recorded) < 40
    assert len({name for name, _, _ in recorded}) == len(recorded)
    assert all(len(texts) == 2 for _, texts, _ in recorded)
    num_paid = len(list(cache.glob("*.json")))
    assert num_paid >= 2 * len(recorded)

    backend = make(server, cache=cache, concurrency=4, votes=2)
    answers = judged(backend, games(40))
    assert all(answer.error is None for answer in answers.values())
    assert all(list(answers[name].texts or ()) == texts for name, texts, _ in recorded)
    assert backend.spent.num_cached == num_paid
    # Only what was under way when the signal came can have been answered twice.
    assert len(server.served) - len(set(server.served)) <= 4
    assert len(set(server.served)) == 80


# ---------------------------------------------------------------------------------- what is paid


@pytest.mark.slow
def test_a_cache_file_that_is_broken_is_asked_for_again(serve, tmp_path, caplog):
    server = serve()
    cache = tmp_path / "cache"
    first = judged(make(server, cache=cache), games(10))
    files = sorted(cache.iterdir())
    assert len(files) == 10
    assert all(KEY not in file.read_text() for file in files)
    row = json.loads(files[6].read_bytes())
    wrong = (
        *({"num_tokens": -1}, {"prompt_tokens": 10**400}, {"num_tokens": True}),
        *({"seconds": float("nan")}, {"seconds": None}, {"text": None}, {"finish_reason": 5}),
        *({"finish_reason": "error"}, {"text": " "}, {"finish_reason": "content_filter"}),
    )
    for change in wrong:
        files[6].write_text(json.dumps({**row, **change}))
        backend = make(server, cache=cache)
        judged(backend, games(10))
        assert (backend.spent.num_requests, backend.spent.num_cached) == (1, 9), change
        assert json.loads(files[6].read_bytes())["text"] == row["text"]
    assert len([r for r in caplog.records if "asked for again" in r.message]) == len(wrong)
    caplog.clear()
    broken = [b"", files[1].read_bytes()[:-5], b"{}", b'{"text": 1}', b"[]", b"\xff"]
    for file, content in zip(files, broken, strict=False):
        file.write_bytes(content)
    backend = make(server, cache=cache)
    second = judged(backend, games(10))
    assert backend.spent.num_requests == len(broken) and backend.spent.num_cached == 4
    assert len([r for r in caplog.records if "asked for again" in r.message]) == len(broken)
    assert outputs(second) == outputs(first)
    backend = make(server, cache=cache)
    assert outputs(judged(backend, games(10))) == outputs(first)
    assert backend.spent.num_requests == 0


def test_a_cache_that_cannot_be_written_is_read_but_nothing_is_asked(serve, tmp_path, monkeypatch):
    server, cache = serve(), tmp_path / "cache"
    judged(make(server, cache=cache), games(2))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert all(each.texts for each in judged(make(server, cache=cache), games(2)).values())
    with pytest.raises(RunError, match="can't be written"):
        judged(make(server, cache=cache), games(4))
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://h:1"), ("HTTP_PROXY", "foo://h"), ("SSL_CERT_FILE", "/nowhere")],
)
def test_an_environment_that_allows_no_connection_is_told(serve, monkeypatch, name, value):
    server = serve()
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"with this environment: .+ Check HTTP_PROXY"):
        judged(make(server), games(2))


def test_a_servers_text_cannot_steer_a_terminal(serve):
    quote = make(serve())._server.quotable
    assert quote(f"\x1b[2J {KEY}\ud800\n b") == "\ufffd[2J [key]\ufffd b"


@pytest.mark.slow
def test_what_shapes_an_answer_shapes_its_place_in_the_cache(serve, tmp_path):
    server = serve()
    cache = tmp_path / "cache"
    judged(make(server, cache=cache), games(4))

    def num_asked(**changes: Any) -> int:
        backend = make(server, cache=cache, **changes)
        judged(backend, games(4))
        return backend.spent.num_requests

    for change in (
        {"prompt": "judgelrm_eval"},
        {"scale": (1, 5)},
        {"max_new_tokens": 101},
        {"temperature": 0.6},
        {"top_p": 0.9},
        {"seed": 1},
        {"request": {"top_k": 5}},
        {"request": {"temperature": None}},
        {"system": "user"},
        {"votes": 2},  # the first vote of each is there
        {"base_url": server.url.replace("127.0.0.1", "localhost")},
    ):
        assert num_asked(**change) == 4, change
    for change in (
        {"concurrency": 1},
        {"timeout": 3.0},
        {"max_retries": 0},
        {"api_key": "another"},
        {"prices": PRICES, "budget": 0.0},
        {"neutral": False},  # nothing was broken in these texts
        {"requests_per_minute": 1e6},
    ):
        assert num_asked(**change) == 0, change


def cost(server: Running) -> float:
    """Return what the server would charge for all that it has served."""
    served = set(server.served)
    charged = 0.0
    for row in server.requests:
        if chat_server.judgement(row["body"]) in served:
            prompt_tokens = len(chat_server.text_of(row["body"])) // 4
            charged += prompt_tokens * PRICES[0] + chat_server.COMPLETION_TOKENS * PRICES[1]
    return charged / 1e6


@pytest.mark.slow
def test_a_budget_is_used_and_not_exceeded(serve, tmp_path):
    server = serve("--delay", "0.02")
    budget, cache = 0.015, tmp_path / "cache"
    backend = make(server, concurrency=16, prices=PRICES, budget=budget, cache=cache)
    answers = judged(backend, games(100))
    assert max(row["in_flight"] for row in server.requests) > 1
    assert cost(server) == pytest.approx(backend.spent.usd)
    most = (1500 + requests.OVERHEAD) * PRICES[0] / 1e6 + 100 * PRICES[1] / 1e6  # of one request
    assert budget - 2 * most < backend.spent.usd <= budget
    assert 0 < len(server.served) < 100
    errors = [answer.error for answer in answers.values() if answer.error]
    assert len(errors) == 100 - len(server.served)
    assert all("not asked: the budget of 0.015 USD" in error for error in errors)

    rest = make(server, concurrency=16, prices=PRICES, budget=1.0, cache=cache)
    assert all(answer.error is None for answer in judged(rest, games(100)).values())
    assert len(server.served) == 100 == len(set(server.served))
    assert backend.spent.usd + rest.spent.usd == pytest.approx(cost(server))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["half", "late", "no_usage"])
def test_an_unknown_cost_counts_as_the_highest(serve, fault):
    server = serve("--fault", f"all={fault}")
    backend = make(server, prices=(0.0, 1e6), budget=350.0, timeout=0.3, max_retries=9)
    answers = judged(backend, games(6))
    assert len(server.requests) == 3  # 100 tokens of one USD each
    assert backend.spent.usd == 300.0
    assert sum(answer.error is None for answer in answers.values()) == 3 * (fault == "no_usage")


def test_an_error_status_and_a_missing_server_cost_nothing(serve):
    server = serve("--fault", "all=s500")
    backend = make(server, prices=(0.0, 1e6), budget=100.0, max_retries=2)
    judged(backend, games(6))
    server.stop()
    judged(backend, games(6))
    assert len(server.requests) == 18
    assert backend.spent.usd == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000"}, "is no address"),
        ({"base_url": "ftp://host/v1"}, "is no address"),
        ({"base_url": "http://host:port/v1"}, "is no address"),
        ({"base_url": "https://user:secret@host/v1"}, "must hold no user"),
        ({"base_url": "https://host/v1?key=secret"}, "must hold no user"),
        ({"api_key": "secret\nX: y"}, "no HTTP header"),
        ({"api_key": "secrét"}, "no HTTP header"),
        ({"prompt": "jlrn"}, "Did you mean 'jlrm'"),
        ({"votes": 0}, "votes=0"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"base_url": "https://host/v1?api-version=1&sig=secret"}, "must hold no user"),
        ({"budget": 1.0}, "needs prices"),
        ({"budget": float("nan"), "prices": PRICES}, "budget=nan"),
        ({"budget": float("inf"), "prices": PRICES}, "budget=inf"),
        ({"budget": -1.0, "prices": PRICES}, "budget=-1"),
        ({"prices": (float("nan"), 1.0)}, "prices=nan"),
        ({"prices": (1.0, -1.0)}, "prices=-1"),
        ({"prices": PRICES, "request": {"max_tokens": None}}, "need a limit of tokens"),
        ({"prices": PRICES, "request": {"max_tokens": "many"}}, "need a limit of tokens"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"requests_per_minute": -1.0}, "requests_per_minute=-1"),
        ({"system": "none"}, "wanted one of auto, own, user"),
        ({"system": "user", "prompt": "judgelrm_eval"}, "is one text"),
    ],
)
def test_mistakes_are_refused_without_a_secret(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        settings = {**options("http://host/v1"), **changes}
        openai.Endpoint(requests.EndpointSettings(model="judge", **settings))
    assert "secr" not in str(caught.value)
