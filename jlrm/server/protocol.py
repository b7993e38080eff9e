"""Connections that end: uvicorn's own wait as long as a client likes, and each counts as one."""

from __future__ import annotations

import asyncio
from typing import Any

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
