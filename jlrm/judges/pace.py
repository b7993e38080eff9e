"""When requests go to a server, and how often the same one goes again.

After a failure that may pass, a request goes again at growing intervals, `max_retries` times. "Too
many requests" (HTTP 429) says nothing about this request: it goes again when the server says, or at
growing intervals, until patience ends.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from jlrm.config import RunError
from jlrm.judges.complaints import Declined, Passing
from jlrm.judges.paid import Spending

FIRST_WAIT = 0.5  # seconds before the first retry; every further one waits twice as long
LONGEST_WAIT = 60.0
PATIENCE = 1800.0  # seconds for which nothing but "too many requests" may come
LONGEST_PATIENCE = 4 * PATIENCE  # for which one request may be told so, while others get through

T = TypeVar("T")


class Adapted(Exception):
    """The request goes again at once, in another form that the server may know."""


class Pace:
    """The pace of requests to one server. per_minute: 0 for as many as there are."""

    def __init__(self, url: str, max_retries: int, per_minute: float, spent: Spending) -> None:
        self._url, self._max_retries, self._spent = url, max_retries, spent
        self._distance = 60.0 / per_minute if per_minute else 0.0  # seconds
        self._next = 0.0  # monotonic time of the next turn
        self._resume = 0.0  # monotonic time before which the server wants no request
        self._answered = -1.0  # monotonic time of the last request that was answered
        self._is_reached = False

    @property
    def is_answered(self) -> bool:
        """Whether the server has answered a request yet."""
        return self._answered >= 0.0

    async def asked(self, send: Callable[[], Awaitable[T]]) -> T:
        """Return what `send` returns, called until it does.

        Raises:
          Declined: it fails too often.
          RunError: there is no server, or it wants no requests from anybody.
        """
        num_failed, num_limited, limited_since = 0, 0, 0.0
        while True:
            await self._turn()
            try:
                result = await send()
            except Adapted:
                continue
            except Passing as error:
                self._is_reached = self._is_reached or not error.is_unreachable
                if error.is_limit:
                    limited_since = limited_since or time.monotonic()
                    num_limited += 1
                    wait = self._wait(error, num_limited)
                    self._check_patience(error, limited_since, wait)
                else:
                    num_failed += 1
                    self._check_tries(error, num_failed)
                    wait = self._wait(error, num_failed)
                self._spent.num_retries += 1
            else:
                self._answered = time.monotonic()
                return result
            await asyncio.sleep(wait)

    async def _turn(self) -> None:
        """Wait for a turn; a pause that others are told meanwhile holds this request back too."""
        while True:
            while (pause := self._resume - time.monotonic()) > 0:
                await asyncio.sleep(pause + min(0.1 * pause, 1.0) * random.random())
            if not self._distance:
                return
            turn = max(self._next, time.monotonic())
            self._next = turn + self._distance
            await asyncio.sleep(turn - time.monotonic())
            if self._resume <= time.monotonic():
                return

    def _wait(self, error: Passing, num_times: int) -> float:
        """Return the seconds to wait; all others wait too where the server says how long."""
        # The exponent is bounded: 2.0**1024 overflows.
        longest = min(FIRST_WAIT * 2.0 ** min(num_times - 1, 30), LONGEST_WAIT)
        wait = longest * random.uniform(0.5, 1.0)
        if error.wait is None:
            return wait
        self._resume = max(self._resume, time.monotonic() + error.wait)
        return error.wait if error.is_limit else max(wait, error.wait)

    def _check_tries(self, error: Passing, num_failed: int) -> None:
        if num_failed <= self._max_retries:
            return
        if error.is_unreachable and not (self._is_reached or self.is_answered):
            raise RunError(
                f"No server at {self._url}: {error}. Is it running, and is base_url right?"
            )
        times = f"{num_failed} times" if num_failed > 1 else "once"
        raise Declined(f"{error} (asked {times})")

    def _check_patience(self, error: Passing, since: float, wait: float) -> None:
        ends = time.monotonic() + wait
        text = f"{error} (for {(ends - since) / 60:.0f} minutes)"
        if ends - max(since, self._answered) > PATIENCE:
            raise RunError(
                f"{self._url} wants no requests: {text}. Run this again later, or with fewer"
                " --requests-per-minute; responses so far are kept."
            )
        if ends - since > LONGEST_PATIENCE:
            raise Declined(text)
