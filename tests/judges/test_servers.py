"""Servers that behave as users of such tools have reported: what `jlrm.evaluate` makes of each."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from jlrm import evaluate
from jlrm.config import RunError, UsageError
from jlrm.judges import pace


class Outcome(NamedTuple):
    """What a command came to."""

    overall: float | None
    num_judged: int
    num_requests: int
    code: int
    text: str  # warnings, and the error if there was one


@pytest.fixture(scope="module")
def port(cases):
    """The port of the server of the cases, which serves every mode at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(cases / "server.py"), str(number)])
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", number)) == 0:
                break
        time.sleep(0.05)
    yield number
    server.kill()
    server.wait()


@pytest.fixture
def evaluated(port, cases, tmp_path, capsys, caplog, monkeypatch):
    """Evaluate the pairs with a mode of the server and flags."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pace, "FIRST_WAIT", 0.02)

    def run(mode: str, *flags: str, rows: str = "pairs.jsonl", policy: str = "") -> Outcome:
        argv = ["--backend", "openai", "--model", "m", "--benchmark", "pairs", "--no-report"]
        argv += ["--base-url", f"http://127.0.0.1:{port}/{mode}/v1", "--json"]
        argv += ["--data", str(cases / "rows" / rows), "--out", str(tmp_path / "out")]
        argv += ["--policy", "order=as_given", *([policy] if policy else []), *flags]
        caplog.clear()
        code, error = 0, ""
        with caplog.at_level(logging.WARNING):
            try:
                evaluate.main(argv)
            except (UsageError, RunError) as stop:
                code, error = 2 if isinstance(stop, UsageError) else 1, str(stop)
        printed = capsys.readouterr()
        found = json.loads(printed.out)["pairs"] if printed.out else {}
        spent = [part for part in printed.err.split(", ") if part.endswith(" requests")]
        num_requests = int(spent[-1].split()[0]) if spent else 0
        text = f"{caplog.text} {error}"
        return Outcome(found.get("overall"), found.get("n", 0), num_requests, code, text)

    return run


@pytest.mark.parametrize("mode", ["ok", "reasoning_only", "parts"])
def test_every_form_of_a_judgement_is_read_at_once(evaluated, mode):
    assert evaluated(mode)[:4] == (100.0, 6, 6, 0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["upstream_error", "empty"])
def test_what_was_not_finished_is_asked_again_then_unjudged_then_asked_by_the_next_run(
    evaluated, mode
):
    """Every other request is answered well."""
    first = evaluated(mode, "--max-retries", "0", "--concurrency", "1")
    assert first[:4] == (100.0, 3, 6, 1)
    assert "3 of 6 games were not judged: 3 x " in first.text
    again = evaluated(mode, "--concurrency", "1")
    assert (again.overall, again.num_judged, again.code) == (100.0, 6, 0)
    assert again.num_requests <= 6  # 3 games, each failing once


def test_a_text_that_was_cut_off_is_said_to_be(evaluated):
    found = evaluated("cut")
    assert (found.num_requests, found.code) == (6, 0)
    assert "6 of 6 games were cut off at the limit of tokens" in found.text
    assert "--max-new-tokens" in found.text


def test_a_field_that_is_refused_is_named_and_can_be_left_out(evaluated):
    refused = evaluated("no_seed")
    assert refused.code == 2 and "--request seed=null leaves it out" in refused.text
    assert evaluated("no_seed", "--request", "seed=null", "top_k=5")[:4] == (100.0, 6, 6, 0)


def test_a_model_without_a_system_role_is_asked_another_way_by_itself(evaluated):
    found = evaluated("no_system", "--concurrency", "2")
    assert (found.overall, found.num_judged, found.code) == (100.0, 6, 0)
    assert found.num_requests in (7, 8)
    assert found.text.count("knows no system role") == 1


def test_the_form_of_the_system_text_can_be_chosen(evaluated):
    own = evaluated("no_system", "--system", "own")
    assert own.code == 2 and "--system user puts the system text before" in own.text
    assert evaluated("no_system", "--system", "user")[:4] == (100.0, 6, 6, 0)


def test_what_a_filter_refuses_is_named_and_counted_only_by_policy(evaluated):
    found = evaluated("filtered")
    assert found[:4] == (100.0, 5, 6, 1)
    assert "1 of 6 games was REFUSED: 1 x HTTP 400: The response was filtered" in found.text
    assert "--policy refused=error_credit counts" in found.text
    again = evaluated("filtered")
    assert (again.num_judged, again.num_requests, again.code) == (5, 1, 1)
    counted = evaluated("filtered", policy="refused=error_credit")
    assert counted.overall == pytest.approx(100 * 5 / 6)
    assert (counted.num_judged, counted.num_requests, counted.code) == (6, 0, 0)
    assert "They count as games without a verdict" in counted.text


def test_another_request_is_another_journal_and_the_usual_one_is_that_of_old(evaluated, tmp_path):
    evaluated("ok")
    journal = tmp_path / "out" / "pairs" / "responses.jsonl"
    header = json.loads(journal.read_text().splitlines()[0])["header"]
    assert "system" not in header and "request" not in header
    other = evaluated("ok", "--request", "top_k=5")
    assert other.code == 2 and "given under request None (now {'top_k': 5})" in other.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget", "nan", "--prices", "1", "1"), "--budget: wanted a finite number"),
        (("--prices", "inf", "1"), "--prices: wanted a finite number"),
        (("--budget", "-1", "--prices", "1", "1"), "budget=-1: wanted dollars, at least 0"),
        (("--temperature", "nan"), "--temperature: wanted a finite number"),
        (("--request", "seed"), "wanted KEY=JSON"),
        (("--request", "a=low"), "text in double quotes"),
        (("--request", "a=NaN"), "wanted KEY=JSON"),
        (("--request", "a=[1e999]"), "wanted KEY=JSON"),
        (("--request", 'a="\\ud800"'), "wanted KEY=JSON"),
        (("--request", "a=1", "a=2"), "names 'a' twice"),
        (("--request", "messages=[]"), "'messages' is not for this flag"),
        (("--request", "n=2"), "'n' is not for this flag"),
    ],
)
def test_mistakes_of_flags_are_refused_before_anything_is_asked(evaluated, flags, message):
    found = evaluated("ok", *flags)
    assert (found.code, found.num_requests) == (2, 0) and message in found.text


@pytest.mark.campaign  # waits for minutes; test_openai.py has such a storm with a quicker clock
def test_forty_games_at_eight_in_forty_seconds(evaluated, tmp_path, port):
    """Takes three minutes, all of them spent waiting."""
    rows = tmp_path / "forty.jsonl"
    pair = {"question": "a prime?", "answer_1": "It is 7.", "answer_2": "It is 9.", "preference": 1}
    rows.write_text("".join(json.dumps({"id": str(n), **pair}) + "\n" for n in range(40)))
    found = evaluated("limited", rows=str(rows))
    assert (found.overall, found.num_judged, found.code) == (100.0, 40, 0)
    assert found.num_requests < 100
