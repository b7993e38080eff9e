"""Judges behind an OpenAI-compatible endpoint: vLLM servers and hosted models.

A game is one request per vote (`n` is not served everywhere), each with a seed of its own made of
(seed, game, vote). A response depends on nothing else, and one that was paid for
is kept on disk before it counts. Every game is recorded once: with all its votes, or with the
reason why one is missing. What went wrong for good (the key, the model, a setting that the server
refuses) stops the run; what may pass is asked again, later and later.

Left out: streaming, batch APIs, discounts for cached prompts (the cost is an upper bound).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import itertools
import pathlib
import queue
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from jlrm.config import RunError, UsageError
from jlrm.evaluation.games import Game, Response
from jlrm.judgement import prompts
from jlrm.judges import protocol
from jlrm.judges.paid import Cache, OverBudget, Purse, Receipt, Spending
from jlrm.judges.protocol import Reply, Template

FIRST_WAIT = 0.5  # seconds before the first retry; every further one waits twice as long
LONGEST_WAIT = 60.0
LONGEST_PAUSE = 600.0  # seconds; a server that asks for more has a limit per day
QUOTED = 400  # characters of a server's message
OVERHEAD = 256  # tokens that a chat template may add to a prompt

_OF_ONE_GAME = (400, 413, 422)  # most often a prompt that is too long
_MAY_PASS = (408, 409, 429)  # and all from 500 on
_OF_THE_SETTINGS = ("unsupported_parameter", "unsupported_value", "model_not_found")


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """What is asked of a server, and how.

    Raises:
      UsageError: a bad address, key, prompt or number.
    """

    model: str
    base_url: str
    api_key: str | None
    prompt: str
    scale: tuple[int, int]
    max_new_tokens: int
    temperature: float
    top_p: float
    votes: int
    concurrency: int
    timeout: float  # seconds for a whole reply
    max_retries: int
    cache: pathlib.Path | None
    prices: tuple[float, float] | None  # USD per million prompt and generated tokens
    # USD in the life of this process, never exceeded; games without room are unjudged.
    budget: float | None
    seed: int
    neutral: bool  # control tokens inside the texts to be judged are broken

    def __post_init__(self) -> None:
        if not (self.key.isascii() and self.key.isprintable()) or " " in self.key:
            raise UsageError("The API key holds characters that no HTTP header can carry.")
        for name in ("votes", "concurrency", "max_new_tokens"):
            if (number := getattr(self, name)) < 1:
                raise UsageError(f"{name}={number} is too small: at least 1.")
        if not (self.timeout > 0 and self.max_retries >= 0):
            raise UsageError(
                f"timeout={self.timeout}, max_retries={self.max_retries}: wanted a time and a"
                " count."
            )
        if self.budget is not None and self.prices is None:
            raise UsageError("A budget needs prices: USD per million prompt and generated tokens.")

    @property
    def key(self) -> str:
        """The API key without white space around it; empty: none."""
        return (self.api_key or "").strip()

    @property
    def is_raw(self) -> bool:
        """Whether the prompt is one text, without a chat template."""
        return self.prompt in prompts.PAIR_TEMPLATES

    @property
    def url(self) -> str:
        """Where requests go."""
        return _checked_url(self.base_url) + (
            "/completions" if self.is_raw else "/chat/completions"
        )

    def request(self) -> dict[str, Any]:
        """Return the fields that all requests share."""
        fields: dict[str, Any] = {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
        }
        if self.top_p != 1.0:  # some models refuse it beside a temperature
            fields["top_p"] = self.top_p
        if self.is_raw:
            fields["stop"] = ["<|im_end|>"]  # a base model's own end token is another
        return fields


class _Passing(Exception):
    """A failure that may pass. `wait`: seconds that the server asked for."""

    def __init__(
        self, reason: str, *, wait: float | None = None, is_unreachable: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait, self.is_unreachable = wait, is_unreachable


class _Refused(Exception):
    """The server does not answer this game; others it may."""


class Endpoint:
    """A `Backend`: judges games by asking a server, several at a time.

    `spent` tells what was used so far.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings, self.url, self._shared = settings, settings.url, settings.request()
        self.template = Template.of(settings.prompt, settings.scale, settings.neutral)
        self._key, self._purse = settings.key, Purse(settings.prices, settings.budget)
        self._cache = None if settings.cache is None else Cache(settings.cache)
        self._limit = "max_tokens"  # hosted reasoning models want another name for it
        self._resume = 0.0  # monotonic time before which the server wants no request
        self._is_reached = False
        self._is_over_budget = ""

    @property
    def spent(self) -> Spending:
        return self._purse.spent

    def __repr__(self) -> str:
        return f"Endpoint({self.settings.model!r} at {self.url})"

    def __call__(self, games: Sequence[Game], record: Callable[[Response], None]) -> None:
        """Judge games; each is recorded when the last of its votes is in.

        Raises:
          UsageError: the server refuses the key, the model or a setting.
          RunError: there is no server, or it asks to come back much later.
          KeyboardInterrupt: requests under way are dropped; what was recorded is complete.
        """
        # Signals raise in the main thread, wherever it is, and would tear an event loop there.
        responses: queue.SimpleQueue[Response | None] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._judge(games, responses.put))

        def drive() -> None:
            try:
                loop.run_until_complete(asyncio.wait([task]))
                loop.run_until_complete(loop.shutdown_asyncgens())
            finally:
                loop.close()
                responses.put(None)

        thread = threading.Thread(target=drive, name="requests", daemon=True)
        thread.start()
        try:
            _record(responses, record)
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it was done just now
                loop.call_soon_threadsafe(task.cancel)
            thread.join()
            if isinstance(error, KeyboardInterrupt):
                responses.put(None)  # the first one may have been taken out
                _record(responses, record)
            raise
        thread.join()
        task.result()

    async def _judge(self, games: Sequence[Game], record: Callable[[Response], None]) -> None:
        self._purse.open()
        ballots = itertools.product(enumerate(games), range(self.settings.votes))
        counted: dict[int, list[Reply | str | None]] = {}

        async def work(client: httpx2.AsyncClient) -> None:
            for (place, game), vote in ballots:
                await asyncio.sleep(0)  # the cache never waits, but a stop must come in
                result = await self._vote(client, game, vote)
                results = counted.setdefault(place, [None] * self.settings.votes)
                results[vote] = result
                if None not in results:
                    record(protocol.response(game, counted.pop(place)))

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        num_workers = self.settings.concurrency
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=num_workers)
        async with httpx2.AsyncClient(headers=headers, limits=limits, timeout=None) as client:
            workers = [asyncio.create_task(work(client)) for _ in range(num_workers)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _vote(self, client: httpx2.AsyncClient, game: Game, vote: int) -> Reply | str:
        """Return a reply, or why there is none."""
        lot = hashlib.sha256(
            f"{self.settings.seed}:{game.id}:{vote}".encode(errors="surrogatepass")
        )
        seed = int.from_bytes(lot.digest()[:4]) >> 1
        body = {**self._shared, **self.template.fill(game), "seed": seed}
        request = {"url": self.url, "body": body, "vote": vote}
        if self._cache is not None and (kept := self._cache.get(request)):
            self.spent.num_cached += 1
            return kept
        if self._is_over_budget:
            return self._is_over_budget
        try:
            reply = await self._ask(client, body)
        except _Refused as error:
            return str(error)
        except OverBudget as error:
            self._is_over_budget = f"not asked: {error}"
            return self._is_over_budget
        if self._cache is not None:
            self._cache.put(request, reply)
        return reply

    async def _ask(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> Reply:
        """Ask until there is a reply."""
        text = body.get("prompt") or "".join(each["content"] for each in body["messages"])
        # No byte-level tokenizer makes more tokens than there are bytes.
        most = self._purse.price(len(text.encode()) + OVERHEAD, body["max_tokens"])
        for attempt in itertools.count():
            while (pause := self._resume - time.monotonic()) > 0:
                await asyncio.sleep(pause * random.uniform(1.0, 1.1))
            try:
                async with self._purse.hold(most) as receipt:
                    return await self._send(client, body, receipt)
            except _Passing as error:
                if attempt >= self.settings.max_retries:
                    if error.is_unreachable and not self._is_reached:
                        raise RunError(
                            f"No server at {self.url}: {error}. Is it running, and is base_url"
                            " right?"
                        ) from None
                    raise _Refused(f"{error} (asked {attempt + 1} times)") from None
                self.spent.num_retries += 1
                wait = min(FIRST_WAIT * 2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
                if error.wait is not None:
                    self._resume = max(self._resume, time.monotonic() + error.wait)
                    wait = max(wait, error.wait)
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _send(
        self, client: httpx2.AsyncClient, body: Mapping[str, Any], receipt: Receipt
    ) -> Reply:
        """Send one request; what it cost goes on the receipt."""
        limit, began = self._limit, time.perf_counter()
        named = {limit if name == "max_tokens" else name: value for name, value in body.items()}
        try:
            # httpx2's own limits are for one read; this one a server cannot stretch by trickling.
            async with asyncio.timeout(self.settings.timeout):
                response = await client.post(self.url, json=named)
        except TimeoutError:
            raise _Passing(f"no whole reply in {self.settings.timeout:g} s") from None
        except httpx2.ConnectError as error:
            receipt.usd = 0.0
            raise _Passing(f"no connection: {error}", is_unreachable=True) from None
        except httpx2.HTTPError as error:
            raise _Passing(f"the connection broke: {self._quotable(str(error))}") from None
        self._is_reached = True
        if response.status_code == 200:
            return self._read(response.content, time.perf_counter() - began, receipt)
        is_unnamed = response.status_code == 400 and limit == "max_tokens"
        if is_unnamed and "max_completion_tokens" in protocol.complaint(response.content).message:
            self._limit = "max_completion_tokens"
            return await self._send(client, body, receipt)
        receipt.usd = 0.0
        raise self._failure(response)

    def _read(self, body: bytes, seconds: float, receipt: Receipt) -> Reply:
        try:
            reply = protocol.read(body, seconds)
        except protocol.Unreadable as error:
            raise _Passing(self._quotable(str(error))) from None
        self.spent.prompt_tokens += reply.prompt_tokens or 0
        self.spent.num_tokens += reply.num_tokens or 0
        if reply.prompt_tokens is not None and reply.num_tokens is not None:
            receipt.usd = self._purse.price(reply.prompt_tokens, reply.num_tokens)
        return reply

    def _failure(self, response: httpx2.Response) -> Exception:
        """Return what a status other than 200 means."""
        status = response.status_code
        message, code = protocol.complaint(response.content)
        text = f"HTTP {status}: {self._quotable(message)}"
        if status >= 500 or (status in _MAY_PASS and code != "insufficient_quota"):
            now = datetime.datetime.now(datetime.UTC)
            wait = protocol.retry_after(response.headers.get("Retry-After"), now)
            if wait is not None and wait > LONGEST_PAUSE:
                return RunError(
                    f"{self.url} answered {text}. It asks to wait for {wait / 60:.0f} minutes: run"
                    " this again then, responses so far are kept."
                )
            return _Passing(text, wait=wait)
        if status in _OF_ONE_GAME and code not in _OF_THE_SETTINGS:
            return _Refused(text)
        suspects = "the API key" if status in (401, 403) else "the model, base_url and settings"
        return UsageError(f"{self.url} answered {text.rstrip('.')}. Check {suspects}.")

    def _quotable(self, text: str) -> str:
        """Return a server's text without the key, which it may echo, on one short line."""
        text = " ".join((text.replace(self._key, "[key]") if self._key else text).split())
        return text if len(text) <= QUOTED else text[:QUOTED] + "..."


def _record(
    responses: queue.SimpleQueue[Response | None], record: Callable[[Response], None]
) -> None:
    while (response := responses.get()) is not None:
        record(response)


def _checked_url(base_url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(base_url.strip())
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        is_address = False
    if not is_address:
        raise UsageError("base_url is no address such as http://localhost:8000/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        # Not quoted: it may be a secret, and would be written to every log.
        raise UsageError("base_url must hold no user, password or query. Give the key as a key.")
    return parts.geturl().rstrip("/")
