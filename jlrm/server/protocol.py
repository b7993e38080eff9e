"""What of uvicorn is done otherwise: connections that end, and signals that come once.

Its own connections wait as long as a client likes, and each counts as one that is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 30.0  # in which a request's headers must have come
SEND_SECONDS = 60.0  # in which a client must have taken some of its reply


class Impatient(H11Protocol):
    """Ends a connection that brings no request in time, or takes nothing of its reply."""

    _coming: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._coming = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_answered = self.cycle is None or self.cycle.response_complete
        if not is_answered and self._coming:
            self._coming.cancel()
            self._coming = None
        elif is_answered and self._coming is None:
            self._coming = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking:
            self._taking.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._coming, self._taking):
            if timer:
                timer.cancel()
        super().connection_lost(exc)


class Announced(uvicorn.Server):
    """Says `text` once it listens, and ends by the first signal."""

    def __init__(self, config: uvicorn.Config, text: str) -> None:
        super().__init__(config)
        self._text = text

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        print(self._text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End by a signal; uvicorn would then send it to itself, and be ended in the middle."""
        both = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in both}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
