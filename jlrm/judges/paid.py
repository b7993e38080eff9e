"""What hosted judges cost: a purse that is never overdrawn, and a store of what was paid for.

A request's price is known only afterwards. So the most that it can cost is set aside before it is
sent, and a request for which the budget has no room waits until others have given back what they
did not use.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from jlrm.config import RunError, UsageError
from jlrm.judges import protocol
from jlrm.judges.protocol import Reply

MOST_BYTES = 128 * 2**20  # of a stored reply; escaping makes up to six of one

log = logging.getLogger(__name__)


@dataclass
class Spending:
    """What a backend has used in the life of this process; `str` of it fits on a progress bar."""

    num_requests: int = 0  # sent, failed ones included
    num_retries: int = 0
    num_cached: int = 0  # replies that were paid for by an earlier run
    prompt_tokens: int = 0
    num_tokens: int = 0
    usd: float = 0.0  # at most; a request that broke off counts with the most it can have cost

    def __str__(self) -> str:
        return f"{self.num_requests} requests, {self.num_cached} cached, {self.usd:.2f} USD"


@dataclass
class Receipt:
    usd: float


class OverBudget(Exception):
    """The next request could cost more than is left."""


class Purse:
    """Counts what is spent, and sets money aside for requests under way.

    prices: USD per million prompt tokens and per million generated ones. For one thread alone.
    """

    def __init__(self, prices: tuple[float, float] | None, budget: float | None) -> None:
        self.spent = Spending()
        self.prices = prices or (0.0, 0.0)
        self.budget = budget
        self._aside = 0.0
        self._num_under_way = 0
        self._settled = asyncio.Event()

    def open(self) -> None:
        """Forget who waits: from now on, requests come from another event loop."""
        self._settled = asyncio.Event()

    def price(self, prompt_tokens: int, num_tokens: int) -> float:
        """Return USD."""
        return (prompt_tokens * self.prices[0] + num_tokens * self.prices[1]) / 1e6

    @contextlib.asynccontextmanager
    async def hold(self, most: float) -> AsyncIterator[Receipt]:
        """Set `most` USD aside for one request; the caller corrects the receipt it gets.

        Raises:
          OverBudget: it does not fit, and nothing is under way that could give money back.
        """
        while self.budget is not None and self.spent.usd + self._aside + most > self.budget:
            if not self._num_under_way:
                raise OverBudget(
                    f"the budget of {self.budget:g} USD has no room for a request of up to"
                    f" {most:.2g} USD after {self.spent.usd:.2g} USD"
                )
            self._settled.clear()
            await self._settled.wait()
        self._aside += most
        self._num_under_way += 1
        self.spent.num_requests += 1
        receipt = Receipt(most)
        try:
            yield receipt
        finally:
            self._num_under_way -= 1
            self._aside = self._aside - most if self._num_under_way else 0.0
            self.spent.usd += receipt.usd
            self._settled.set()


class Cache:
    """One JSON file per request, under the hash of everything that shapes its reply.

    Raises:
      UsageError: there can be no such directory.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"The cache {directory} can't be made: {error.strerror}.") from None
        self.directory = directory

    def check_writable(self) -> None:
        """Raise RunError where nothing can be kept; what is kept already can still be read."""
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise RunError(
                f"The cache {self.directory} can't be written, so that replies would be paid for"
                " again: give another --cache, or none."
            )

    def path(self, request: Mapping[str, Any]) -> pathlib.Path:
        """Return where the reply to a request is or will be."""
        text = json.dumps(request, sort_keys=True)
        return self.directory / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def get(self, request: Mapping[str, Any]) -> Reply | None:
        """Return a stored reply that was finished; None where there is none.

        A file that holds no reply is reported, and so is an unfinished reply that an older version
        stored. Both are asked for again.
        """
        path = self.path(request)
        try:
            with path.open("rb") as file:
                content = file.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise ValueError("it is too large")
            reply = protocol.stored(json.loads(content))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            log.warning("%s holds no reply (%s); it is asked for again.", path, error)
            return None
        if not reply.is_finished:
            text = "%s holds a reply that ended with '%s'; it is asked for again."
            log.warning(text, path, reply.finish_reason)
            return None
        return reply

    def put(self, request: Mapping[str, Any], reply: Reply) -> None:
        """Store a reply: all of it or nothing.

        Raises:
          RunError: it can't be written, so that it would be paid for again.
        """
        path = self.path(request)
        # Two machines may share a cache, and their processes a number.
        unfinished = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            unfinished.write_text(json.dumps(reply._asdict()))
            unfinished.replace(path)
        except OSError as error:
            raise RunError(f"The cache can't keep {path}: {error.strerror}.") from None
