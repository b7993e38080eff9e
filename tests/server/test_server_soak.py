"""A server that is asked for a long time answers everybody once and rightly, and grows by nothing.

    JLRM_SERVER_SOAK=1200 python -m pytest --tier campaign tests/server/test_server_soak.py -s

For JLRM_SERVER_SOAK seconds clients of all sorts ask a toy at once: those that wait for their
verdict, those that read a stream, some of them slowly, those that leave, and those whose bodies are
too large, malformed or cut off. Half-way the server is killed and started again, while its clients
go on. Its memory, open files and threads are read from /proc.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import os
import pathlib
import random
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import slowness
from judges.test_local import write_model
from server.test_server import Server, started
from test_soak import MOST_GROWTH, Use, held

from jlrm.serving.judge import Judge

pytestmark = [pytest.mark.campaign, pytest.mark.slow]

SECONDS = float(os.environ.get("JLRM_SERVER_SOAK", "1200"))
CLIENTS = 12
NUM_PAIRS = 40
FLAGS = ["--prompt", "toy", "--slots", "8", "--max-waiting", "12"]
PAIRS = [
    {"question": f"Name {i} tools.", "answer_1": f"saw {i}", "answer_2": "drill " * (1 + i % 20)}
    for i in range(NUM_PAIRS)
]
Texts = list[list[str]]


class Clients:
    """Threads that ask until they are told to stop; `counts` says what came of it."""

    def __init__(self, port: Callable[[], int], wanted: list[Texts]) -> None:
        self._port, self._wanted = port, wanted
        self._ended, self._lock = threading.Event(), threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []  # from asking to the verdict, of those who wait for it
        self.is_away = False  # the server is being started again: to be refused is no fault
        self._threads = [
            threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(CLIENTS)
        ]

    def start(self) -> None:
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        self._ended.set()
        for each in self._threads:
            each.join(120)
            assert not each.is_alive()

    @property
    def done(self) -> int:
        return sum(self.counts.values())

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        kinds = [self.waits, self.streams, self.reads_slowly, self.leaves, self.leaves_a_stream]
        kinds += [self.is_oversize, self.is_malformed, self.is_cut_off, self.asks_too_much]
        weights = [12, 6, 1, 3, 3, 1, 2, 2, 1]
        while not self._ended.is_set():
            (kind,) = rng.choices(kinds, weights)
            was_away = self.is_away
            try:
                kind(rng)
            except (OSError, http.client.HTTPException) as error:
                if was_away or self.is_away:
                    self._count("away")
                    time.sleep(0.2)
                else:
                    self._say(f"{kind.__name__}: {error!r}")
            except Exception as error:
                self._say(f"{kind.__name__}: {error!r}")
            else:
                self._count(kind.__name__)

    # --- kinds of clients

    def waits(self, rng: random.Random) -> None:
        place, began = rng.randrange(NUM_PAIRS), time.monotonic()
        with self._asked({**PAIRS[place], "id": f"{place}"}) as reply:
            body = json.loads(reply.read())
        if reply.status == 429:
            self._busy(reply)
            return
        assert reply.status == 200 and body["id"] == f"{place}", (reply.status, body)
        assert _texts(body) == self._wanted[place], f"pair {place} has another's text"
        self.seconds.append(time.monotonic() - began)

    def streams(self, rng: random.Random, pause: float = 0.0) -> None:
        place = rng.randrange(NUM_PAIRS)
        with self._asked({**PAIRS[place], "stream": True}) as reply:
            if reply.status == 429:
                self._busy(reply)
                return
            content = b""
            while part := reply.read1(200 if pause else 65536):
                content += part
                time.sleep(pause)
        events = [line[6:] for line in content.decode().split("\n\n") if line]
        assert events.pop() == "[DONE]", events
        *pieces, last = map(json.loads, events)
        assert "result" in last and not any("result" in each for each in pieces), last
        assert sum(bool(each["ending"]) for each in pieces) == 2  # each order is told once
        grown = collections.defaultdict(str)
        for piece in pieces:
            grown[tuple(piece["order"])] += piece["text"]
        assert [[grown[1, 2]], [grown[2, 1]]] == _texts(last["result"]) == self._wanted[place]

    def reads_slowly(self, rng: random.Random) -> None:
        self.streams(rng, 0.2)

    def leaves(self, rng: random.Random) -> None:
        with self._sent(json.dumps(rng.choice(PAIRS)).encode()):
            time.sleep(rng.random())

    def leaves_a_stream(self, rng: random.Random) -> None:
        with self._sent(json.dumps({**rng.choice(PAIRS), "stream": True}).encode()) as connection:
            connection.settimeout(60 * slowness())
            begun = connection.recv(200)
            if not begun:
                raise ConnectionResetError  # as those that write are told
            assert begun.startswith(b"HTTP/1.1 "), begun

    def is_oversize(self, rng: random.Random) -> None:
        with self._asked({**PAIRS[0], "answer_1": "x" * (2**20 + rng.randrange(2**16))}) as reply:
            assert reply.status == 413

    def is_malformed(self, rng: random.Random) -> None:
        bodies = [b"{", b"\xff\xfe", b"[]", b"{}", b"[" * 9999, b'{"question": 1, "answers": [2]}']
        with self._asked(rng.choice(bodies)) as reply:
            assert reply.status == 400 and "error" in json.loads(reply.read())

    def is_cut_off(self, rng: random.Random) -> None:
        whole = json.dumps(rng.choice(PAIRS)).encode()
        with self._sent(whole[: rng.randrange(len(whole))], len(whole)):
            pass

    def asks_too_much(self, rng: random.Random) -> None:
        with self._asked({"pairs": PAIRS}) as reply:
            assert reply.status == 400 and b"at most 12" in reply.read()

    # --- what they share

    @contextlib.contextmanager
    def _asked(self, body: Any) -> Iterator[http.client.HTTPResponse]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self._port(), timeout=120 * slowness())
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            with contextlib.suppress(BrokenPipeError):  # refused before all of it was sent
                connection.request("POST", "/v1/judge", content, headers)
            yield connection.getresponse()

    def _sent(self, content: bytes, length: int = 0) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._port()), timeout=60)
        connection.sendall(
            b"POST /v1/judge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (length or len(content)) + content
        )
        return connection

    def _busy(self, reply: http.client.HTTPResponse) -> None:
        assert int(reply.headers["retry-after"]) >= 1
        self._count("told to come again")
        time.sleep(1)

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def _say(self, text: str) -> None:
        with self._lock:
            self.wrong.append(text)


def _texts(result: dict[str, Any]) -> Texts:
    return [game["texts"] for game in result["games"]]


def watched(server: Server, clients: Clients, until: float) -> list[Use]:
    """Return what the server holds, twice a second, and end when it does or when the time comes."""
    uses = []
    while time.monotonic() < until and server.process.poll() is None:
        uses.append(held(pathlib.Path(f"/proc/{server.process.pid}"), clients.done))
        time.sleep(0.5)
    return uses


def tenths(uses: list[Use]) -> tuple[Use, Use]:
    """Return the medians of the first tenth and of the last one."""
    size = max(len(uses) // 10, 1)

    def middle(part: list[Use]) -> Use:
        return Use(*(statistics.median(column) for column in zip(*part, strict=True)))

    return middle(uses[:size]), middle(uses[-size:])


def test_a_server_that_is_asked_for_long_answers_rightly_and_does_not_grow(tmp_path):
    model = tmp_path / "model"
    write_model(model)
    sizes = {"max_prompt_tokens": 256, "max_new_tokens": 48, "compute_dtype": "float32"}
    local = Judge.load(str(model), prompt="toy", **sizes)
    columns = [[pair[name] for pair in PAIRS] for name in ("question", "answer_1", "answer_2")]
    wanted = [_texts(json.loads(json.dumps(each.to_dict()))) for each in local.compare(*columns)]
    assert len({str(each) for each in wanted}) == NUM_PAIRS  # who gets another's is seen

    port = [0]
    clients, is_started = Clients(lambda: port[0], wanted), False
    parts: list[list[Use]] = []
    for is_last in (False, True):
        logs = tmp_path / f"logs{is_last}"
        logs.mkdir()
        with started(logs, "--model", str(model), *FLAGS) as server:
            for num in (1, 2, 4, 8):  # prompts that enter together: each is a program
                server.judged(*(pair.values() for pair in PAIRS[:num]), orders="given")
            port[0], clients.is_away = server.port, False
            if not is_started:
                clients.start()
                is_started = True
            try:
                parts.append(watched(server, clients, time.monotonic() + SECONDS / 2))
                assert server.process.poll() is None, server.log.read_text()[-3000:]
            except BaseException:
                clients.stop()
                raise
            clients.is_away = True
            if is_last:
                clients.stop()
                until = time.monotonic() + 60
                while server.measured("jlrm_running") or server.measured("jlrm_waiting"):
                    assert time.monotonic() < until
                    time.sleep(0.1)
                server.process.send_signal(signal.SIGTERM)
                assert server.process.wait(60) == 0
                said = server.log.read_text()
                assert "Traceback" not in said, said[-3000:]
            else:
                server.process.kill()
                port[0] = 1  # where nobody listens, until the next one is ready
    latency = sorted(clients.seconds)
    print(f"\n{clients.done} requests: {dict(clients.counts)}")
    print(
        "seconds to a verdict: "
        + ", ".join(f"p{p} {latency[p * len(latency) // 100]:.2f}" for p in (50, 95, 99))
    )
    ends = [tenths(uses) for uses in parts]
    for first, last in ends:
        print(f"first and last tenth: {first}, {last}")
    for uses in parts:
        print("MiB by tenths: " + ", ".join(f"{use.mib:.0f}" for use in uses[:: len(uses) // 10]))
    assert not clients.wrong, collections.Counter(clients.wrong).most_common(10)
    for first, last in ends:
        assert last.mib <= MOST_GROWTH * first.mib
        assert last.files <= first.files + CLIENTS
        assert last.threads <= first.threads + 4
    assert clients.counts["waits"] >= SECONDS and clients.counts["told to come again"]
