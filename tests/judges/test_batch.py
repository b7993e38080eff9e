"""Batches are begun once, whatever breaks between; they cost half; what lacks is asked again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from chat_server import COMPLETION_TOKENS
from conftest import slowness
from endpoints import KEY, PRICES, TESTS, game, games, judged, options

from jlrm.config import RunError, UsageError
from jlrm.evaluation.games import Response
from jlrm.judges import batch, batch_service, requests

# As `jlrm.evaluate` does: each response is on disk when `record` returns.
CLIENT = """
import json, pathlib, sys
import endpoints
from jlrm.judges import batch, batch_service, requests
url, number, path, state = json.loads(sys.argv[1])
batch_service.FIRST_POLL = batch_service.LONGEST_POLL = 0.05
settings = endpoints.options(url, batch=pathlib.Path(state))
judge = batch.BatchEndpoint(requests.EndpointSettings(model="judge", **settings))
with open(path, "a") as file:
    judge(endpoints.games(number), lambda each: print(each.game, file=file, flush=True))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(batch_service, "FIRST_POLL", 0.01)
    monkeypatch.setattr(batch_service, "LONGEST_POLL", 0.02)


@pytest.fixture
def service(serve):
    def start(*flags: str):
        return serve(*flags, script="batch_server.py")

    return start


@pytest.fixture
def make(tmp_path):
    def backend(server, **changes):
        changes = {"batch": tmp_path / "out" / "batches.json", **changes}
        settings = options(server.url, **changes)
        return batch.BatchEndpoint(requests.EndpointSettings(model="judge", **settings))

    return backend


def begun(server) -> list[list[dict]]:
    """Return the requests of each batch that was begun, and is paid for."""
    return [row["begun"] for row in server.rows] if server.path.exists() else []


def under_way(tmp_path) -> list[dict]:
    return json.loads((tmp_path / "out" / "batches.json").read_text())["batches"]


def test_a_batch_holds_every_vote_once_at_half_the_price(service, make, tmp_path, caplog):
    server = service()
    backend = make(server, votes=3, prices=PRICES)
    answers = judged(backend, games(12))
    (rows,) = begun(server)
    assert len({row["custom_id"] for row in rows}) == 36
    assert {(row["method"], row["url"]) for row in rows} == {("POST", "/v1/chat/completions")}
    assert all(len(each.texts or ()) == 3 for each in answers.values())
    assert all(each.endings == ("stop",) * 3 for each in answers.values())
    usd = 36 * (1000 * PRICES[0] + COMPLETION_TOKENS * PRICES[1]) / 1e6 / 2
    assert backend.spent.usd == pytest.approx(usd) and backend.spent.num_requests == 36
    assert answers["0:0-1"].seconds == pytest.approx(3 * 60 / 36)
    assert under_way(tmp_path) == []
    assert "batch_1: in_progress" in caplog.text and "36 of 36 requests" in caplog.text
    assert KEY not in caplog.text


def test_the_same_requests_come_as_without_batches(service, serve, make, tmp_path):
    """So that the cache of one is the cache of the other."""
    cache = tmp_path / "cache"
    server = service()
    backend = make(server, cache=cache)
    judged(backend, games(6))
    again = make(server, cache=cache)
    judged(again, games(6))
    assert again.spent.num_cached == 6 and len(begun(server)) == 1
    bodies = [row["body"] for row in begun(server)[0]]
    from jlrm.judges.openai import Endpoint

    settings = requests.EndpointSettings(model="judge", **options(server.url, cache=cache))
    single = Endpoint(settings)
    judged(single, games(6))
    assert single.spent.num_requests == 0 and len(bodies) == 6


@pytest.mark.slow
def test_many_requests_are_several_batches_and_their_games_are_whole(service, make, monkeypatch):
    monkeypatch.setattr(batch, "MOST_REQUESTS", 4)
    server = service("--fault", "order")
    answers = judged(make(server, votes=3), games(6))
    assert [len(rows) for rows in begun(server)] == [4, 4, 4, 4, 2]
    assert all(len(set(each.texts or ())) == 3 for each in answers.values())


@pytest.mark.slow
def test_large_requests_are_several_batches(service, make, monkeypatch):
    monkeypatch.setattr(batch, "MOST_BYTES", 5_000)
    server = service()
    judged(make(server), games(6))
    assert 2 <= len(begun(server)) <= 6


@pytest.mark.slow
def test_what_fails_costs_its_game_and_is_asked_by_the_next_run(service, make, tmp_path):
    server = service()
    faults = ("s400", "batch_expired", "aborted", "filter", "cut", "blank")
    asked = [game(f"FAULT:{fault}", number) for number, fault in enumerate(faults)]
    answers = judged(make(server), [*asked, game("fine", 99)])
    errors = [answers[each.id].error for each in asked]
    assert errors[0] == "HTTP 400: too long" and errors[1] == "not in time"
    assert errors[2] == "the reply was not finished, finish_reason 'abort'"
    assert (answers["3:0-1"].refused, errors[3]) == ("content_filter", None)
    assert answers["4:0-1"].endings == ("length",)
    assert errors[5] == "an empty reply, finish_reason 'stop'"
    assert answers["99:0-1"].texts
    assert under_way(tmp_path) == []
    judged(make(server), asked[:2])
    assert len(begun(server)) == 2


def test_a_batch_that_expires_gives_what_it_has(service, make):
    server = service("--fault", "expired")
    answers = judged(make(server), games(6))
    errors = [each.error for each in answers.values() if each.error]
    assert errors == ["the batch ended without it"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["busy", "lost", "torn"])
def test_nothing_is_begun_twice_when_a_call_breaks(service, make, fault):
    server = service("--fault", fault)
    answers = judged(make(server, max_retries=2), games(6))
    assert all(each.texts for each in answers.values())
    assert len(begun(server)) == 1


@pytest.mark.slow
def test_a_file_whose_batch_never_told_its_name_is_found(service, make, tmp_path, monkeypatch):
    """A command that was killed between the two, with other batches begun since."""
    server = service("--fault", "lost")
    with pytest.raises(RunError, match="goes on with the batches in"):
        make(server, max_retries=0)(games(6), lambda answer: None)
    (job,) = under_way(tmp_path)
    assert job["id"] == "" and len(job["requests"]) == 6
    for number in range(3):
        judged(make(server, batch=tmp_path / str(number)), games(2, f"other {number}"))
    answers = judged(make(server), games(6))
    assert all(each.texts for each in answers.values()) and len(begun(server)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_and_pays_nothing_twice(service, make, tmp_path, signum):
    server = service("--polls", "10")
    path, state = tmp_path / "recorded", tmp_path / "out" / "batches.json"
    arguments = json.dumps([server.url, 6, str(path), str(state)])
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, arguments],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30.0 * slowness()
    while not begun(server):
        assert time.monotonic() < deadline and client.poll() is None
        time.sleep(0.01)
    client.send_signal(signum)
    client.wait()
    assert path.read_text() == ""
    answers = judged(make(server), games(8))
    assert all(each.texts for each in answers.values())
    assert [len(rows) for rows in begun(server)] == [6, 2]
    assert under_way(tmp_path) == []


def test_a_record_that_fails_keeps_the_batch(service, make, tmp_path):
    server = service()

    def record(answer: Response) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        make(server)(games(4), record)
    assert len(under_way(tmp_path)) == 1
    judged(make(server), games(4))
    assert len(begun(server)) == 1


def test_a_budget_is_not_exceeded_and_batches_under_way_count(service, make, tmp_path):
    server = service()
    most = (100 * 1e6 / 1e6) / 2  # of a request, in USD
    backend = make(server, prices=(0.0, 1e6), budget=3.5 * most)
    answers = judged(backend, games(6))
    assert len(begun(server)[0]) == 3
    errors = [each.error for each in answers.values() if each.error]
    assert errors == ["not asked: no room in the budget of 175 USD"] * 3
    assert backend.spent.usd == 3 * COMPLETION_TOKENS / 2


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("failed", UsageError, "failed: the model is unknown"),
        ("evil_id", RunError, "no id of a batch that can be used"),
        ("many_lines", RunError, "has more lines than there were requests"),
    ],
)
def test_a_service_that_misbehaves_is_told_in_one_sentence(service, make, fault, kind, message):
    server = service("--fault", fault)
    with pytest.raises(kind, match=message):
        make(server, max_retries=1)(games(4), lambda answer: None)


def test_lines_given_twice_or_of_others_change_nothing(service, make):
    answers = judged(make(service("--fault", "twice")), games(4))
    assert all(each.texts for each in answers.values())


def test_replies_that_are_gone_are_asked_by_the_next_run(service, make, tmp_path):
    server = service("--fault", "no_file")
    answers = judged(make(server), games(4))
    assert {each.error for each in answers.values()} == {"the batch ended without it"}
    assert under_way(tmp_path) == []


def test_a_batch_that_is_gone_is_told_with_its_list(make, service, tmp_path):
    with pytest.raises(RunError):
        make(service("--fault", "no_status"))(games(4), lambda answer: None)
    assert len(under_way(tmp_path)) == 1
    server = service()
    listed = tmp_path / "out" / "batches.json"
    backend = make(server)
    backend._service.jobs = [
        batch_service.Job("f", "batch_9", (backend._name(vote),))
        for vote in backend._votes(games(2))
    ]
    with pytest.raises(UsageError, match=rf"has no batch_9\. Remove {listed} to ask"):
        backend(games(2), lambda answer: None)


def test_a_server_without_batches_is_told(service, make):
    server = service()
    with pytest.raises(UsageError, match=r"/batches answered HTTP 404: Not Found\. Check"):
        make(server, base_url=f"{server.url}/x")(games(2), lambda answer: None)


@pytest.mark.parametrize("content", ["", "[]", '{"batches": [{}]}', '{"batches": [5]}', "\0"])
def test_a_broken_list_of_batches_is_told(make, tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content)

    class Nowhere:
        url = "http://localhost:1/v1"

    with pytest.raises(UsageError, match=r"broken\.json is no list of batches"):
        make(Nowhere, batch=path)


def test_azures_batches_name_no_version_of_the_api_in_their_lines(service, make):
    server = service()
    answers = judged(make(server, base_url=f"{server.url}?api-version=1"), games(2))
    assert all(each.texts for each in answers.values())
    (row,) = server.rows
    assert {line["url"] for line in row["begun"]} == {"/chat/completions"} == {row["endpoint"]}
