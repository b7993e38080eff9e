"""A judge behind the server of chat_server.py: what tests of several files ask of both."""

from __future__ import annotations

import collections
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import chat_server
import pytest

from jlrm.evaluation.games import Backend, Game, Item, Response, both_orders
from jlrm.judges import openai, pace, requests

TESTS = pathlib.Path(__file__).parent
KEY = "sk-this-must-not-be-seen-anywhere"
PRICES = (2.0, 10.0)


class Running:
    """The server of chat_server.py, or another of its kind, as a process."""

    def __init__(self, log: pathlib.Path, *options: str, script: str = "chat_server.py") -> None:
        self.path = log
        command = [sys.executable, str(TESTS / script), str(log), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "body" in row]

    @property
    def served(self) -> list[str]:
        return [row["served"] for row in self.rows if "served" in row]

    def counts(self) -> dict[str, int]:
        """Return how often each request came, by the start of its question."""
        bodies = collections.Counter(json.dumps(row["body"]) for row in self.requests)
        return {chat_server.text_of(json.loads(body)): n for body, n in bodies.items()}


def options(url: str, **changes: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "base_url": url,
        "api_key": KEY,
        "prompt": "jlrm",
        "scale": (1, 10),
        "max_new_tokens": 100,
        "temperature": 0.5,
        "top_p": 1.0,
        "votes": 1,
        "concurrency": 8,
        "timeout": 20.0,
        "max_retries": 3,
        "cache": None,
        "prices": None,
        "budget": None,
        "seed": 0,
        "neutral": True,
        "system": "auto",
        "request": {},
        "requests_per_minute": 0.0,
        "batch": None,
    }
    return {**defaults, **changes}


def make(server: Running, **changes: Any) -> openai.Endpoint:
    settings = {**options(server.url), **changes}
    return openai.Endpoint(requests.EndpointSettings(model="judge", **settings))


def game(question: str, number: int = 0) -> Game:
    return Game(Item(f"{number}", question, ("one", "two")), 0, 1)


def games(number: int, question: str = "question") -> list[Game]:
    return both_orders(Item(str(i), f"{question} {i}", ("one", "two")) for i in range(number // 2))


def judged(backend: Backend, asked: list[Game]) -> dict[str, Response]:
    """Judge games, and check that each is recorded once, and is an answer or an error."""
    answers: list[Response] = []
    backend(asked, answers.append)
    assert sorted(answer.game for answer in answers) == sorted(each.id for each in asked)
    for answer in answers:
        said = (answer.texts, answer.error, answer.refused)
        assert sum(each is not None for each in said) == 1
        assert answer.scores is None and answer.preference is None
    return {answer.game: answer for answer in answers}


def outputs(answers: dict[str, Response]) -> list[str]:
    return sorted(text for answer in answers.values() for text in answer.texts or ())


@pytest.fixture
def serve(tmp_path, monkeypatch) -> Iterator[Callable[..., Running]]:
    """Start servers with flags; retries come at once."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pace, "FIRST_WAIT", 0.02)
    servers = []

    def start(*options: str, **more: str) -> Running:
        servers.append(Running(tmp_path / "server.jsonl", *options, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
