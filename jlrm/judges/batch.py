"""Judges by the batch files of OpenAI's API: half the price, an answer within a day.

    1  want     the votes that are neither in the cache nor in a batch under way
    2  send     them as files of JSONL, and begin a batch of each
    3  wait     until each has ended
    4  read     its files of replies and errors; a game is recorded with the last of its votes

Batches under way are kept in a file. So a command that was stopped finds them again and pays for
nothing twice. Games that a batch left without a reply are unjudged until the next run asks them:
since a batch may take a day, no second one begins by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jlrm.config import RunError, UsageError
from jlrm.evaluation.games import Game, Response
from jlrm.judges import asking, openai, protocol
from jlrm.judges.batch_service import BatchService, Job
from jlrm.judges.paid import Cache, Purse, Spending
from jlrm.judges.protocol import NoReply, Reply
from jlrm.judges.requests import EndpointSettings, Template

SHARE = 0.5  # of the price of a request that is not in a batch
MOST_REQUESTS = 50_000  # of a batch
MOST_BYTES = 90 * 2**20  # of a file; OpenAI's limit is above, other servers' is 100 MB


class Vote(NamedTuple):
    """A request of a batch, and the place of its reply."""

    place: int  # of the game
    number: int
    game: Game
    body: dict[str, Any]


class BatchEndpoint:
    """A `Backend`: judges games by batches. `spent` tells what was used so far."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings, self.url = settings, settings.url
        self.template = Template.of(settings.prompt, settings.scale, settings.neutral)
        prices = settings.prices and (settings.prices[0] * SHARE, settings.prices[1] * SHARE)
        self._purse = Purse(prices, settings.budget)
        self._cache = None if settings.cache is None else Cache(settings.cache)
        self._service = BatchService(settings, self._purse.spent)

    @property
    def spent(self) -> Spending:
        return self._purse.spent

    def __repr__(self) -> str:
        return f"BatchEndpoint({self.settings.model!r} at {self.url})"

    def __call__(self, games: Sequence[Game], record: Callable[[Response], None]) -> None:
        """Judge games; each is recorded when the last of its votes is in.

        Raises:
          UsageError: the server refuses the key, a file or a batch.
          RunError: it can't be asked now; batches under way are kept.
          KeyboardInterrupt: batches go on where they are; what was recorded is complete.
        """
        self.template.check(games)
        ended: list[Job] = []
        try:
            asking.drive(lambda put: self._judge(games, put, ended), record)
        except (KeyboardInterrupt, UsageError, RunError):
            self._service.forget(ended)
            raise
        self._service.forget(ended)  # not sooner: all that they gave is recorded now

    async def _judge(
        self, games: Sequence[Game], record: Callable[[Response], None], ended: list[Job]
    ) -> None:
        """Judge games; the batches whose results are all recorded are added to `ended`."""
        counted: dict[int, list[Reply | NoReply | None]] = {}

        def count(vote: Vote, result: Reply | NoReply) -> None:
            results = counted.setdefault(vote.place, [None] * self.settings.votes)
            results[vote.number] = result
            if None not in results:
                record(protocol.response(vote.game, counted.pop(vote.place)))

        wanted: dict[str, Vote] = {}
        for vote in self._votes(games):
            await asyncio.sleep(0)  # the cache never waits, but a stop must come in
            if self._cache is not None and (kept := self._cache.get(self._key(vote))):
                self.spent.num_cached += 1
                count(vote, kept)
            else:
                wanted[self._name(vote)] = vote
        jobs = [job for job in self._service.jobs if wanted.keys() & set(job.requests)]
        known = {name for job in jobs for name in job.requests}
        affordable = self._affordable(wanted, known)
        for name, vote in wanted.items():
            if name not in known and name not in affordable:
                count(vote, NoReply(f"not asked: no room in the budget of {self._budget}"))
        if self._cache is not None and (affordable or jobs):
            self._cache.check_writable()
        async with self._service.client() as client:
            for part in _parts(affordable, wanted):
                bodies = {name: wanted[name].body for name in part}
                jobs.append(await self._service.begun(client, bodies))
                self.spent.num_requests += len(part)
            waiting = list(jobs)
            while jobs:
                results = await self._service.ended(client, jobs[0])
                for name in jobs.pop(0).requests:
                    if name in wanted:
                        count(wanted[name], self._settled(wanted[name], results.get(name)))
                # A game whose votes are in several batches is recorded with the last of them.
                ended[:] = [
                    job
                    for job in waiting
                    if job not in jobs
                    and not any(n in wanted and wanted[n].place in counted for n in job.requests)
                ]

    def _votes(self, games: Sequence[Game]) -> Iterator[Vote]:
        is_apart = self.settings.system != "user"
        for place, game in enumerate(games):
            for number in range(self.settings.votes):
                body = self.settings.body(self.template, game, number, is_apart)
                yield Vote(place, number, game, body)

    def _key(self, vote: Vote) -> dict[str, Any]:
        """Return what shapes a reply, as the cache of single requests knows it."""
        return {"url": self.url, "body": vote.body, "vote": vote.number}

    def _name(self, vote: Vote) -> str:
        """Return the request's `custom_id`: another request has another one, in any run."""
        text = json.dumps({**self._key(vote), "game": vote.game.id}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    # ------------------------------------------------------------------------------ what is paid

    @property
    def _budget(self) -> str:
        return f"{self._purse.budget:g} USD"

    def _most(self, vote: Vote) -> float:
        return self._purse.price(*self.settings.most_tokens(vote.body))

    def _affordable(self, wanted: Mapping[str, Vote], known: set[str]) -> dict[str, None]:
        """Return the requests for which the budget has room, after those under way."""
        under_way = sum(self._most(vote) for name, vote in wanted.items() if name in known)
        left = float("inf")
        if self._purse.budget is not None:
            left = self._purse.budget - self.spent.usd - under_way
        names: dict[str, None] = {}
        for name, vote in wanted.items():
            most = self._most(vote)
            if name not in known and most <= left:
                names[name], left = None, left - most
        return names

    def _settled(self, vote: Vote, result: Reply | NoReply | None) -> Reply | NoReply:
        """Count what a reply cost, keep it if it was finished, and say what became of it."""
        if result is None:
            return NoReply("the batch ended without it")
        if isinstance(result, NoReply):
            return result
        self.spent.prompt_tokens += result.prompt_tokens or 0
        self.spent.num_tokens += result.num_tokens or 0
        is_told = result.prompt_tokens is not None and result.num_tokens is not None
        used = (result.prompt_tokens or 0, result.num_tokens or 0)
        self.spent.usd += self._purse.price(*used) if is_told else self._most(vote)
        if result.ending == "refused":
            return NoReply(openai.refusal(result, self._service.quotable), is_refused=True)
        if not result.is_finished:
            return NoReply(openai.unfinished(result, self._service.quotable))
        if self._cache is not None:
            self._cache.put(self._key(vote), result)
        return result


def _parts(names: Iterable[str], votes: Mapping[str, Vote]) -> Iterator[list[str]]:
    """Cut requests into batches that are small enough."""
    part: list[str] = []
    size = 0
    for name in names:
        more = len(json.dumps(votes[name].body)) + 200
        if part and (size + more > MOST_BYTES or len(part) >= MOST_REQUESTS):
            yield part
            part, size = [], 0
        part.append(name)
        size += more
    if part:
        yield part
