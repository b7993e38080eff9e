"""The server as clients meet it: a process of its own, asked over HTTP."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jsonschema
import pytest
from conftest import COMPILE_FASTEST, slowness
from judges.test_local import CONFIG, write_model
from starlette.requests import Request

from jlrm.config import UsageError
from jlrm.server import app, bodies
from jlrm.serving.asked import each_beside_each
from jlrm.serving.judge import Judge
from jlrm.serving.ranking import ranked
from jlrm.serving.results import JudgedGame, JudgedList, JudgedPair, Ranking

pytestmark = pytest.mark.slow  # processes that compile whole models

ROOT = pathlib.Path(__file__).parent.parent.parent
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = ["--max-prompt-tokens", "256", "--max-new-tokens", "48", "--compute-dtype", "float32"]
PAIRS = [(f"Name {i} tools.", f"hammer saw {i}", f"drill {'wrench ' * (i % 5)}") for i in range(6)]
COLUMNS = list(zip(*PAIRS, strict=True))
RANKED = {"question": "q", "answers": ["one", "two", "three"]}
RERANKED = {"query": "q", "documents": ["d", "e"]}
PAIR = dict(zip(("question", "answer_1", "answer_2"), PAIRS[0], strict=True))


class Server(NamedTuple):
    """A server that listens."""

    process: subprocess.Popen[str]
    port: int
    log: pathlib.Path

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Ask, and return the status, the reply and its headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120 * slowness())
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        with contextlib.closing(connection):
            connection.request("POST" if content is not None else "GET", path, content, headers)
            reply = connection.getresponse()
            read = reply.read()
        is_json = reply.headers.get("content-type", "").startswith("application/json")
        return reply.status, json.loads(read) if is_json else read, dict(reply.headers)

    def measured(self, name: str) -> float:
        """Return a metric."""
        _, text, _ = self.ask("/metrics")
        return float(re.search(rf"^{name} (\S+)$", text.decode(), re.M)[1])

    def judged(self, *pairs: Sequence[str], **settings: Any) -> list[dict[str, Any]]:
        rows = [
            dict(zip(("question", "answer_1", "answer_2"), each, strict=True)) for each in pairs
        ]
        status, reply, _ = self.ask("/v1/judge", {"pairs": rows, **settings})
        assert status == 200, reply
        return reply["results"]


@contextlib.contextmanager
def started(tmp: pathlib.Path, *flags: str, **environment: str) -> Iterator[Server]:
    """Start a server, and end it."""
    log = tmp / f"server{len(list(tmp.iterdir()))}.log"
    command = [sys.executable, "-m", "jlrm.judge", "serve", "--port", "0", *SIZES, *flags]
    with log.open("w") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=said,
            stderr=said,
            text=True,
            env={**os.environ, "XLA_FLAGS": COMPILE_FASTEST, **environment},
        )
    try:
        until = time.monotonic() + 120 * slowness()
        while not (found := re.search(r"Serving .* at http://\S+:(\d+) ", log.read_text())):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield Server(process, int(found[1]), log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("served")
    write_model(path, config=dataclasses.replace(CONFIG, max_position_embeddings=4096))
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": CHAT}))
    return path


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[Server]:
    flags = ["--model", str(model), "--prompt", "toy", "--slots", "4", "--max-waiting", "64"]
    with started(tmp_path_factory.mktemp("logs"), *flags) as each:
        yield each


@pytest.fixture(scope="module")
def local(model) -> Judge:
    return Judge.load(
        str(model), prompt="toy", max_prompt_tokens=256, max_new_tokens=48, compute_dtype="float32"
    )


def texts(result: dict[str, Any]) -> list[list[str]]:
    return [game["texts"] for game in result["games"]]


# --- what is judged ------------------------------------------------------------------------------


def test_a_rubric_a_reference_and_expected_scores(server, model, local, tmp_path):
    """Random weights write no verdict: what is asked shows in texts and in what is refused."""
    status, reply, _ = server.ask("/v1/judge", {**PAIR, "expected_scores": True})
    assert status == 200 and texts(reply) == texts(local.compare(*PAIRS[0]).to_dict())
    for body, says in (
        ({**PAIR, "rubric": "look"}, "The prompt 'toy' has no place for a rubric"),
        ({**PAIR, "reference": "r"}, "The prompt 'toy' has no place for a reference"),
        ({**PAIR, "rubric": 3}, "rubric: wanted a text, or names with their descriptions, got 3"),
        ({**PAIR, "rubric": {"a": 3}}, "description of 'a' is no text"),
        ({**PAIR, "expected_scores": 1.5}, "expected_scores: wanted true or false"),
    ):
        status, reply, _ = server.ask("/v1/judge", body)
        assert status == 400 and says in reply["error"]["message"], reply
    own, criteria = tmp_path / "own.txt", tmp_path / "rubric.json"
    own.write_text("{rubric} {reference} {question} {answer_1} {answer_2}")
    criteria.write_text(json.dumps({"facts": "True?"}))
    flags = ["--model", str(model), "--prompt", str(own), "--rubric", str(criteria), "--slots", "4"]
    with started(tmp_path, *flags) as other:
        status, reply, _ = other.ask("/v1/judge", PAIR)
        assert status == 400 and "no reference is given" in reply["error"]["message"]
        status, reply, _ = other.ask("/v1/judge", {**PAIR, "reference": "r"})
        assert status == 200 and reply["winner"] is None and "criteria" not in reply
    wanted = Judge.load(
        str(model),
        **{"prompt": str(own), "max_prompt_tokens": 256, "max_new_tokens": 48},
        compute_dtype="float32",
        rubric={"facts": "True?"},
    )
    assert texts(reply) == texts(wanted.compare(*PAIRS[0], reference="r").to_dict())


def test_a_pair_is_judged_as_the_python_class_judges_it(server, local):
    wanted = [json.loads(json.dumps(each.to_dict())) for each in local.compare(*COLUMNS)]
    assert [texts(each) for each in server.judged(*PAIRS)] == [texts(each) for each in wanted]
    status, reply, _ = server.ask("/v1/judge", {**PAIR, "id": "mine"})
    assert status == 200 and reply["id"] == "mine" and texts(reply) == texts(wanted[0])
    assert reply["usage"]["completion_tokens"] == reply["num_tokens"] > 0


def test_many_clients_get_each_their_own(server):
    pairs = [(f"Name {i}.", f"saw {i}", "drill") for i in range(40)]
    alone = server.judged(*pairs[:20]) + server.judged(*pairs[20:])
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda pair: server.judged(pair)[0], pairs))
    assert [texts(each) for each in found] == [texts(each) for each in alone]
    assert len({str(texts(each)) for each in found}) > 30


def test_votes_are_drawn_by_the_seed_and_the_pair_and_not_by_their_place(server):
    drawn = {"votes": 3, "temperature": 1.0}
    first, second = server.judged(*PAIRS[:2], **drawn, seed=1)
    assert texts(server.judged(PAIRS[1], **drawn, seed=1)[0]) == texts(second)
    assert texts(server.judged(PAIRS[1], **drawn, seed=2)[0]) != texts(second)
    assert all(len(set(votes)) == 3 for votes in texts(first))


def test_a_stream_brings_the_same_text_in_pieces(server):
    (wanted,) = server.judged(PAIRS[0])
    _, body, headers = server.ask("/v1/judge", {**PAIR, "stream": True})
    assert headers["content-type"].startswith("text/event-stream")
    *events, end = [line[6:] for line in body.decode().split("\n\n") if line]
    events = [json.loads(each) for each in events]
    assert end == "[DONE]" and texts(events[-1]["result"]) == texts(wanted)
    grown: dict[str, str] = {}
    for event in events[:-1]:
        order = str(event["order"])
        grown[order] = grown.get(order, "") + event["text"]
    assert [[grown["[1, 2]"]], [grown["[2, 1]"]]] == texts(wanted) and len(events) > 4


def test_answers_are_ranked(server, local):
    body = {"question": "Name tools.", "answers": ["saw", "hammer", "drill"]}
    status, reply, _ = server.ask("/v1/judge", body)
    assert status == 200 and sorted(reply["order"]) == [1, 2, 3] and len(reply["pairs"]) == 3
    assert reply["usage"] == {
        "completion_tokens": sum(each["num_tokens"] for each in reply["pairs"])
    }
    status, reply, _ = server.ask("/v1/judge", {**body, "at_once": True})
    told = local.rank(body["question"], body["answers"], at_once=True)
    wanted = json.loads(json.dumps(told.to_dict()))
    assert status == 200 and [reply[name] for name in wanted] == [*wanted.values()]
    used = sum(each["num_tokens"] for each in reply["judgements"])
    assert reply["usage"] == {"completion_tokens": used} and reply.keys() - wanted.keys() == {
        "usage",
        "model",
    }
    _, content, _ = server.ask("/v1/judge", {**body, "at_once": True, "stream": True})
    *events, _ = [line[6:] for line in content.decode().split("\n\n") if line]
    *pieces, last = map(json.loads, events)
    assert {(each["pair"], *each["order"]) for each in pieces} == {(0, 1, 2, 3), (0, 3, 2, 1)}
    assert last["result"] == reply
    status, reply, _ = server.ask("/v1/rerank", {"query": "q", "documents": ["one"]})
    assert reply["results"] == [{"index": 0, "relevance_score": 0.5}]
    # Random weights write no verdict, and that is no ranking.
    status, reply, _ = server.ask("/v1/rerank", {"query": "q", "documents": ["saw", "drill"]})
    assert status == 400 and "No two documents could be compared" in reply["error"]["message"]


def reranked(rank, judging: str = "pairs", **more: Any) -> dict[str, Any]:
    """Return the reply about three documents of a service that ranks so."""

    async def receive():
        documents = ["saw", {"text": "a longer one"}, "hammer"]
        body = {"query": "q", "documents": documents, "return_documents": True, **more}
        return {"type": "http.request", "body": json.dumps(body).encode()}

    defaults = bodies.Defaults("m", 0.0, 1, 8, 0, judging=judging)
    read = types.SimpleNamespace(scale=(1, 10))
    service = types.SimpleNamespace(defaults=defaults, rank=rank, read=read)
    routes = app.Routes(service, app.Limits(), None)
    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    return json.loads(asyncio.run(routes.rerank(request)).body)


def test_documents_come_back_from_the_best_to_the_worst():
    async def longer_wins(asked, at_once, orders, drawing):
        def game(pair, order):
            winner = 1 if len(pair.answer_1) > len(pair.answer_2) else 2
            return JudgedGame(order, winner, None, "ok", (), 5)

        assert not at_once and orders == "both"
        judged = [
            JudgedPair(1, None, None, True, "", "ok", (game(p, (1, 2)), game(p, (2, 1))), 10, p.id)
            for p in each_beside_each(asked.question, asked.answers, None)
        ]
        return ranked(judged, len(asked.answers))

    reply = reranked(longer_wins, top_n=2)
    assert [each["document"]["text"] for each in reply["results"]] == ["a longer one", "hammer"]
    scores = [each["relevance_score"] for each in reply["results"]]
    assert 1 > scores[0] > scores[1] > 0 and reply["unjudged"] == 0
    assert reply["usage"] == {"completion_tokens": 30}


@pytest.mark.parametrize(("judging", "more"), [("lists", {}), ("pairs", {"at_once": True})])
def test_a_judge_of_lists_orders_documents_by_one_judgement(judging, more):
    async def scored(asked, at_once, orders, drawing):
        assert at_once and orders == "both"

        def pair(name, winner):
            games = [JudgedGame(order, winner, None, "ok", (), None) for order in ((1, 2), (2, 1))]
            return JudgedPair(winner, None, None, True, "", "ok", tuple(games), None, name)

        pairs = pair("1-2", 2), pair("1-3", None), pair("2-3", None)
        lists = [
            JudgedList((1, 2, 3), (5.0, 8.0, None), "ok", ("...",), 7),
            JudgedList((3, 2, 1), (5.0, 8.0, None), "ok", ("...",), 8),
        ]
        return Ranking((2, 1), (), (), (0.0, 2.0, 0.0), pairs, (5.0, 8.0, None), tuple(lists))

    reply = reranked(scored, judging, **more)
    found = [(each["index"], each["relevance_score"]) for each in reply["results"]]
    # Shares of the scale from 1 to 10; no score was read of the last one.
    assert found == [(1, pytest.approx(7 / 9)), (0, pytest.approx(4 / 9)), (2, 0.0)]
    assert reply["unjudged"] == 2 and reply["usage"] == {"completion_tokens": 15}


def test_documents_are_compared_by_two_where_a_judgement_holds_no_more_or_is_told_to():
    defaults = bodies.Defaults("m", 0.0, 1, 8, 0, judging="lists")

    def at_once(number: int, **more: Any) -> bool:
        return bodies.rerank_body(
            {"query": "q", "documents": ["d"] * number, **more}, defaults
        ).at_once

    assert at_once(8) and not at_once(9) and not at_once(2, at_once=False)
    with pytest.raises(UsageError, match="trained to judge each answer alone"):
        alone = dataclasses.replace(defaults, judging="single")
        bodies.rerank_body({"query": "q", "documents": ["d", "e"], "at_once": True}, alone)


def test_too_long_a_prompt_is_an_error_of_its_own_game(server):
    overlong = ("Name tools.", "saw " * 300, "drill")
    long, short = server.judged(overlong, PAIRS[0])
    assert "max_prompt_tokens is 256" in long["error"] and short["error"] is None
    assert "max_prompt_tokens is 256" in server.judged(overlong)[0]["error"]
    assert "over 8192 characters" in server.judged(("q", "x" * 9000, "y"))[0]["error"]
    status, reply, _ = server.ask("/v1/rerank", {"query": "q", "documents": ["saw " * 300, "a"]})
    assert status == 400 and "max_prompt_tokens is 256" in reply["error"]["message"]


# --- OpenAI's form -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    )


MESSAGES = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "saw or drill?"}]


def test_a_text_is_continued_as_it_stands(client, server, local):
    """So prompts that are no conversation reach a served judge, our own client's too."""
    whole = client.completions.create(model="default", prompt="saw or", max_tokens=20)
    assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
    (choice,) = whole.choices
    assert choice.text and choice.finish_reason in ("stop", "length")
    pieces = client.completions.create(model="default", prompt="saw or", max_tokens=20, stream=True)
    grown = [(each.choices[0].text, each.choices[0].finish_reason) for each in pieces]
    assert "".join(text for text, _ in grown) == choice.text
    assert [end for _, end in grown if end] == [choice.finish_reason]
    address = f"http://127.0.0.1:{server.port}/v1"
    asked = Judge.load(address, prompt="toy", max_new_tokens=48)
    pair = ("q one", "an answer", "another")
    found, wanted = asked.compare(*pair), local.compare(*pair)
    assert [game.texts for game in found.games] == [game.texts for game in wanted.games]


def test_the_official_client_is_answered(client):
    assert [each.id for each in client.models.list()]
    reply = client.chat.completions.create(
        model="default", messages=MESSAGES, n=2, temperature=1.0, seed=3, max_completion_tokens=20
    )
    assert [each.finish_reason for each in reply.choices] == ["length", "length"]
    assert reply.usage.completion_tokens == 40
    again = client.chat.completions.create(
        model="default", messages=MESSAGES, n=2, temperature=1.0, seed=3, max_completion_tokens=20
    )
    said = [[each.message.reasoning_content for each in one.choices] for one in (reply, again)]
    assert said[0] == said[1] and len(set(said[0])) == 2


def test_a_stream_of_the_official_client_is_what_it_gets_at_once(client):
    settings = {"model": "default", "messages": MESSAGES, "max_tokens": 30}
    whole = client.chat.completions.create(**settings)
    told, usage = "", None
    for chunk in client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            told += getattr(choice.delta, "reasoning_content", None) or ""
    assert told == whole.choices[0].message.reasoning_content
    assert usage == whole.usage


def test_a_stop_string_of_a_request_ends_its_text(client):
    settings = {"model": "default", "messages": MESSAGES, "max_tokens": 30}
    whole = client.chat.completions.create(**settings).choices[0].message.reasoning_content
    stop = whole[10:13]
    reply = client.chat.completions.create(**settings, stop=[stop]).choices[0]
    assert reply.message.reasoning_content == whole[: whole.find(stop)]
    assert reply.finish_reason == "stop"
    streamed = client.chat.completions.create(**settings, stop=stop, stream=True)
    deltas = [chunk.choices[0].delta for chunk in streamed]
    told = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert told == reply.message.reasoning_content


def test_our_own_client_judges_through_it_as_at_home(model, tmp_path):
    home = Judge.load(
        str(model),
        prompt="jlrm",
        max_prompt_tokens=2000,
        max_new_tokens=40,
        compute_dtype="float32",
    )
    sizes = ["--max-prompt-tokens", "2000", "--max-new-tokens", "40"]
    with started(tmp_path, "--model", str(model), "--slots", "2", *sizes) as served:
        away = Judge.load(f"http://127.0.0.1:{served.port}/v1")
        found = [judge.compare(*zip(*PAIRS[:2], strict=True)) for judge in (home, away)]
    said = [[game.texts for each in judged for game in each.games] for judged in found]
    assert said[0] == said[1]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/judge", b"{", 400, "no JSON"),
        ("/v1/judge", b"[" * 10**5, 400, "no JSON"),
        ("/v1/judge", b"\xff", 400, "no JSON"),
        ("/v1/judge", [], 400, "JSON object"),
        ("/v1/judge", {}, 400, "Wanted one of"),
        ("/v1/judge", {**PAIR, "vote": 2}, 400, "votes"),
        ("/v1/judge", {**PAIR, "votes": 2}, 400, "temperature 0"),
        ("/v1/judge", {**PAIR, "votes": 99, "temperature": 1}, 400, "from 1 to 16"),
        ("/v1/judge", {**PAIR, "votes": 5, "temperature": 1}, 400, "has 4 slots"),
        ("/v1/judge", {**PAIR, "orders": "all"}, 400, "both, given, random"),
        ("/v1/judge", {"pairs": [PAIR], "question": "q"}, 400, "question has no place"),
        ("/v1/judge", {"question": "q", "answer": "a", "id": True}, 400, "id: wanted"),
        ("/v1/judge", b'{"pairs": [], "temperature": 1%s}' % (b"0" * 400), 400, "temperature"),
        ("/v1/models/other", None, 404, "Only"),
        ("/v1/judge/", {}, 404, "No such route"),
        ("/v1/judge", {**PAIR, "max_new_tokens": 49}, 400, "from 1 to 48"),
        ("/v1/judge", {**PAIR, "answer_2": None}, 400, "answer_2 is missing"),
        ("/v1/judge", {**PAIR, "answer_2": 3}, 400, "answer_2 must be text"),
        ("/v1/judge", {**PAIR, "temperature": "NaN"}, 400, "temperature"),
        ("/v1/judge", b'{"pairs": [], "temperature": NaN}', 400, "temperature"),
        ("/v1/judge", {"question": "q", "answers": ["one"]}, 400, "list of 2 to 16"),
        ("/v1/judge", {**RANKED, "at_once": "yes"}, 400, "at_once: wanted true or false"),
        ("/v1/judge", {**RANKED, "answers": ["a"] * 9, "at_once": True}, 400, "2 to 8 answers"),
        ("/v1/judge", {**RANKED, "answers": [3, "a"], "at_once": True}, 400, "must be text"),
        ("/v1/judge", {**RANKED, "at_once": True, "rubric": {"a": "b"}}, 400, "no place for a"),
        ("/v1/judge", {**PAIR, "at_once": True}, 400, "at_once has no place beside answer_1"),
        ("/v1/judge", {"pairs": ["x"]}, 400, "pairs[0]"),
        ("/v1/judge", {**PAIR, "model": "gpt-4"}, 404, "is not served here"),
        ("/v1/rerank", {"query": "q", "documents": [3]}, 400, "documents[0]"),
        ("/v1/rerank", {"query": "q", "documents": "d"}, 400, "documents"),
        ("/v1/rerank", {**RERANKED, "at_once": "yes"}, 400, "at_once: wanted true or false"),
        ("/v1/rerank", {**RERANKED, "documents": ["d"] * 9, "at_once": True}, 400, "2 to 8"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": ""}]}, 400, "role"),
        ("/v1/chat/completions", {"messages": MESSAGES, "top_p": 0.5}, 400, "top_p=0.5"),
        ("/v1/chat/completions", {"messages": MESSAGES, "stop": ["a"] * 5}, 400, "stop"),
        ("/v1/chat/completions", {"messages": MESSAGES * 99}, 400, "at most 256"),
        ("/v1/completions", {}, 400, "prompt"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "one text"),
        ("/v1/completions", {"prompt": "a", "echo": True}, 400, "echo=True"),
        ("/v1/completions", {"prompt": "a b " * 999}, 400, "at most 256"),
        ("/v1/nothing", {}, 404, "No such route"),
        ("/v1/judge", None, 405, "GET"),
    ],
)
def test_what_is_wrong_is_named(server, path, body, status, says):
    found, reply, _ = server.ask(path, body)
    assert found == status and says in reply["error"]["message"]


def test_limits_and_origins_are_kept(server):
    large = {**PAIR, "answer_1": "x" * 2**20}
    assert server.ask("/v1/judge", large)[0] == 413
    assert server.ask("/v1/judge", PAIR, {"Content-Type": "text/plain"})[0] == 400
    assert server.ask("/healthz", None, {"Host": "evil.example"})[0] == 400
    _, _, headers = server.ask("/healthz", None, {"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in headers


def test_who_comes_when_too_many_wait_is_told_when_to_come_again(server):
    status, reply, _ = server.ask("/v1/judge", {"pairs": [PAIR] * 40})  # 80 games: 64 may wait
    assert status == 400 and "at most 64" in reply["error"]["message"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        body = {"pairs": [PAIR] * 32}
        found = list(pool.map(lambda _: server.ask("/v1/judge", body), range(4)))
    assert {status for status, _, _ in found} == {200, 429}
    _, reply, headers = next(each for each in found if each[0] == 429)
    assert 1 <= int(headers["retry-after"]) < 60
    assert reply["error"]["code"] == "rate_limit_exceeded"
    assert server.measured("jlrm_rejected_total") >= 1
    assert server.judged(PAIRS[0])


def test_a_client_that_leaves_frees_what_it_has_asked_for(server):
    def left(body: dict[str, Any], waits: bool) -> None:
        content = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(
                b"POST /v1/judge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
                b"\r\nContent-Length: %d\r\n\r\n" % len(content) + content
            )
            if waits:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            else:
                time.sleep(0.3)

    for waits, is_streamed in ((True, True), (False, True), (False, False)):
        before = server.measured("jlrm_cancelled_total")
        left({"pairs": [PAIR] * 32, "stream": is_streamed}, waits)
        until = time.monotonic() + 30 * slowness()
        while server.measured("jlrm_running") or server.measured("jlrm_waiting"):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert server.measured("jlrm_cancelled_total") > before or not waits
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/judge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
    assert server.judged(PAIRS[0])
    assert "Traceback" not in server.log.read_text()


def test_text_that_no_encoding_has_is_answered(server):
    odd = {**PAIR, "id": "\ud800", "answer_1": "saw \ud800"}
    status, reply, _ = server.ask("/v1/judge", odd)
    assert status == 200 and reply["id"] == "\ud800"
    status, reply, _ = server.ask("/v1/judge", {"\ud800": 1})
    assert status == 400 and "No field" in reply["error"]["message"]
    messages = [{"role": "system", "content": "\ud800"}, {"role": "user", "content": "q"}]
    assert server.ask("/v1/chat/completions", {"messages": messages})[0] == 200


def test_a_key_is_asked_for_where_there_is_one(model, tmp_path):
    flags = ["--model", str(model), "--prompt", "toy", "--slots", "2"]
    with started(tmp_path, *flags, JLRM_API_KEY="one, two") as served:
        assert served.ask("/v1/judge", PAIR)[0] == 401
        assert served.ask("/metrics")[0] == 401 and served.ask("/healthz")[0] == 200
        assert served.ask("/v1/judge", PAIR, {"Authorization": "Bearer on"})[0] == 401
        assert served.ask("/v1/judge", PAIR, {"Authorization": "Bearer two"})[0] == 200


# --- its end, and what is drawn ------------------------------------------------------------------


def test_what_has_come_is_finished_when_the_server_is_asked_to_end(model, tmp_path):
    flags = ["--model", str(model), "--prompt", "toy", "--slots", "2"]
    with started(tmp_path, *flags) as served:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(served.judged, *PAIRS * 5)
            while not served.measured("jlrm_running"):
                assert not asked.done()
            served.process.send_signal(signal.SIGTERM)
            assert len(asked.result()) == 30
        assert served.process.wait(60 * slowness()) == 0
        assert "Ended: 60 judgements" in served.log.read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "http://host/v1"], "an endpoint is served already"),
        ([], "--model is missing"),
        (["--model", "m", "--slots", "0"], "--slots=0"),
        (["--model", "m", "--block", "0"], "--block=0"),
        (["--model", "m", "--api-key-env", "NO_SUCH"], "holds no key"),
        (["--model", "m", "--host", "no.such.host.example"], "--host"),
        (["--model", "m", "--port", "99999"], "port must be 0-65535"),
    ],
)
def test_a_start_that_fails_says_why(flags, says):
    command = [sys.executable, "-m", "jlrm.judge", "serve", *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and says in ended.stderr and "Traceback" not in ended.stderr


def test_a_port_that_is_taken_is_heard_of_at_once(server, model):
    command = [sys.executable, "-m", "jlrm.judge", "serve", "--model", str(model)]
    ended = subprocess.run(
        [*command, "--port", str(server.port)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2 and "in use" in ended.stderr


def test_the_page_and_the_description_need_nothing_from_elsewhere(server):
    for path in ("/", "/page.js", "/page.css", "/docs"):
        status, content, headers = server.ask(path)
        assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
        links = re.findall(rb"""(?:src|href)=["']([^"']*)""", content)
        assert all(link.startswith((b"/", b"data:,")) for link in links)
        assert b"innerHTML" not in content
    _, described, _ = server.ask("/openapi.json")
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described))
    assert set(references) <= described["components"]["schemas"].keys()
    assert f"http://127.0.0.1:{server.port}/v1/judge".encode() in server.ask("/docs")[1]


@pytest.mark.parametrize(
    "body",
    [
        PAIR,
        {"pairs": [PAIR, PAIR]},
        {"question": "q", "answer": "a"},
        {"question": "q", "answers": ["a", "b", "c"]},
        {"question": "q", "answers": ["a", "b", "c"], "at_once": True},
    ],
    ids=["pair", "pairs", "answer", "answers", "at once"],
)
def test_replies_are_what_the_description_says(server, body):
    _, described, _ = server.ask("/openapi.json")
    replies = described["paths"]["/v1/judge"]["post"]["responses"]["200"]["content"]
    schema = replies["application/json"]["schema"] | {"components": described["components"]}
    status, reply, _ = server.ask("/v1/judge", body)
    assert status == 200
    jsonschema.validate(reply, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": reply["model"]}, schema)


def test_one_answer_is_scored_as_the_python_class_scores_it(model, tmp_path):
    sizes = {"max_prompt_tokens": 2000, "max_new_tokens": 40, "compute_dtype": "float32"}
    home = Judge.load(str(model), prompt="jlrm", **sizes)
    flags = ["--model", str(model), "--slots", "2", "--max-prompt-tokens", "2000"]
    with started(tmp_path, *flags, "--max-new-tokens", "40") as served:
        status, reply, _ = served.ask("/v1/judge", {"question": "q", "answer": "a"})
        wanted = home.score("q", "a")
        assert status == 200 and reply["texts"] == list(wanted.texts)
        assert reply["usage"] == {"completion_tokens": 40}
        away = Judge.load(f"http://127.0.0.1:{served.port}/v1", max_new_tokens=40)
        assert away.score("q", "a").texts == wanted.texts
