"""Judges behind an OpenAI-compatible endpoint: vLLM servers and hosted models.

A game is one request per vote (`n` is not served everywhere), each with a seed of its own made of
(seed, game, vote). A response depends on nothing but these and the settings. One that was paid for
is kept on disk (with `cache`) before it counts. Every game is recorded once: with all its votes, or
with the reason why one is missing. What went wrong for good (the key, the model, a setting that the
server refuses) stops the run; what may pass is asked again, later and later.

The transport is our own, not the `openai` package: that one reads a body whole whatever its size,
waits for no longer than a minute, counts a rate limit as a failed try, and cannot tell what a
request that broke off may have cost.

Left out: streaming, discounts for cached prompts (the cost is an upper bound).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx2

from jlrm.evaluation.games import Game, Response
from jlrm.judges import asking, complaints, protocol
from jlrm.judges.complaints import Declined, Passing, Received
from jlrm.judges.pace import Adapted, Pace
from jlrm.judges.paid import Cache, OverBudget, Purse, Receipt, Spending
from jlrm.judges.protocol import NoReply, Reply
from jlrm.judges.requests import LIMITS, EndpointSettings, Template
from jlrm.judges.transport import Server

log = logging.getLogger(__name__)


class Endpoint:
    """A `Backend`: judges games by asking a server, several at a time.

    `spent` tells what was used so far.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings, self.url = settings, settings.url
        self.template = Template.of(settings.prompt, settings.scale, settings.neutral)
        self._server, self._purse = Server(settings), Purse(settings.prices, settings.budget)
        self._cache = None if settings.cache is None else Cache(settings.cache)
        self._pace = Pace(
            self.url, settings.max_retries, settings.requests_per_minute, self._purse.spent
        )
        self._limit = LIMITS[0]  # hosted reasoning models want another name for it
        self._is_apart = settings.system != "user"  # the system text has a message of its own
        self._over_budget = ""  # why nothing more is asked

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
        self.template.check(games)
        asking.drive(lambda put: self._judge(games, put), record)

    async def _judge(self, games: Sequence[Game], record: Callable[[Response], None]) -> None:
        self._purse.open()
        ballots = itertools.product(enumerate(games), range(self.settings.votes))
        counted: dict[int, list[Reply | NoReply | None]] = {}

        async def work(client: httpx2.AsyncClient) -> None:
            for (place, game), vote in ballots:
                await asyncio.sleep(0)  # the cache never waits, but a stop must come in
                result = await self._vote(client, game, vote)
                results = counted.setdefault(place, [None] * self.settings.votes)
                results[vote] = result
                if None not in results:
                    record(protocol.response(game, counted.pop(place)))

        async with self._server.client() as client:
            workers = [asyncio.create_task(work(client)) for _ in range(self.settings.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _vote(self, client: httpx2.AsyncClient, game: Game, vote: int) -> Reply | NoReply:
        """Return a reply, or why there is none."""
        if kept := self._kept(game, vote):
            self.spent.num_cached += 1
            return kept
        if self._over_budget:
            return NoReply(self._over_budget)
        try:
            return await self._pace.asked(lambda: self._ask(client, game, vote))
        except Declined as error:
            return NoReply(str(error), error.is_content)
        except OverBudget as error:
            self._over_budget = f"not asked: {error}"
            return NoReply(self._over_budget)

    def _kept(self, game: Game, vote: int) -> Reply | None:
        """Return what was paid for already, in whichever form it may have been asked."""
        if self._cache is None:
            return None
        forms = (True, False) if self.settings.system == "auto" else (self._is_apart,)
        bodies = (self.settings.body(self.template, game, vote, is_apart) for is_apart in forms)
        keys = ({"url": self.url, "body": body, "vote": vote} for body in bodies)
        return next(filter(None, map(self._cache.get, keys)), None)

    async def _ask(self, client: httpx2.AsyncClient, game: Game, vote: int) -> Reply:
        """Send a vote once; a reply is in the cache when this returns."""
        if self._cache is not None:
            self._cache.check_writable()
        body = self.settings.body(self.template, game, vote, self._is_apart)
        async with self._purse.hold(self._purse.price(*self.settings.most_tokens(body))) as receipt:
            reply = await self._send(client, body, receipt)
        if self._cache is not None:
            self._cache.put({"url": self.url, "body": body, "vote": vote}, reply)
        return reply

    async def _send(
        self, client: httpx2.AsyncClient, body: Mapping[str, Any], receipt: Receipt
    ) -> Reply:
        """Send one request; what it cost goes on the receipt."""
        limit, began = self._limit, time.perf_counter()
        named = {limit if name == LIMITS[0] else name: value for name, value in body.items()}
        try:
            received = await self._server.exchange(client, "POST", self.url, json=named)
        except Passing as error:
            receipt.usd = 0.0 if error.is_unreachable else receipt.usd
            raise
        if 200 <= received.status < 300:
            seconds = time.perf_counter() - began
            try:
                return self._read(received.content, seconds, receipt)
            except protocol.Unreadable as error:
                if not error.status:
                    raise self._no_judgement(received, error) from None
                received = received._replace(status=error.status)  # what a gateway hides in a 200
        receipt.usd = 0.0
        self._adapt(received, named)
        quote, is_first = self._server.quotable, not self._pace.is_answered
        raise complaints.failure(received, body, quote, self.url, is_first)

    def _adapt(self, received: Received, sent: Mapping[str, Any]) -> None:
        """Turn to another form of request where the server knows none such.

        Raises:
          Adapted: there is another form now; the request goes again.
        """
        complaint = complaints.read(received.content)
        is_fault = received.status in (400, 422)
        if is_fault and LIMITS[0] in sent and LIMITS[1] in complaint.message:
            self._limit = LIMITS[1]
            raise Adapted
        is_apart = any(each["role"] == "system" for each in sent.get("messages", ()))
        if not is_apart or self.settings.system != "auto":
            return
        # A server that has answered requests of this form means something else.
        if self._is_apart and self._pace.is_answered:
            return
        if complaints.is_about_system(received.status, complaint):
            if self._is_apart:
                text = "%s knows no system role: the system text is put before the user's."
                log.warning(text, self.url)
            self._is_apart = False
            raise Adapted

    def _no_judgement(self, received: Received, error: protocol.Unreadable) -> Passing:
        is_page = received.content.lstrip()[:1] == b"<"  # no endpoint, as far as one can tell
        return Passing(self._server.quotable(str(error)), is_unreachable=is_page)

    def _read(self, body: bytes, seconds: float, receipt: Receipt) -> Reply:
        quote, reply = self._server.quotable, protocol.read(body, seconds)
        self.spent.prompt_tokens += reply.prompt_tokens or 0
        self.spent.num_tokens += reply.num_tokens or 0
        if reply.prompt_tokens is not None and reply.num_tokens is not None:
            receipt.usd = self._purse.price(reply.prompt_tokens, reply.num_tokens)
        if reply.is_finished:
            return reply
        if reply.ending == "refused":
            raise Declined(refusal(reply, quote), is_content=True)
        raise Passing(unfinished(reply, quote))


def refusal(reply: Reply, quote: Callable[[str], str]) -> str:
    """Return why content was refused: the server's word, and the judge's where it gave any."""
    is_told = reply.finish_reason == "refusal" and reply.text.strip()
    word = quote(str(reply.finish_reason))
    return f"{word}: {quote(reply.text)}" if is_told else word


def unfinished(reply: Reply, quote: Callable[[str], str]) -> str:
    """Return what became of a reply that is no judgement."""
    if reply.finish_reason == "error" and reply.text.strip():
        return f"the reply ended with an error: {quote(reply.text)}"
    if not reply.text.strip():
        return f"an empty reply, finish_reason '{quote(str(reply.finish_reason))}'"
    return f"the reply was not finished, finish_reason '{quote(str(reply.finish_reason))}'"
