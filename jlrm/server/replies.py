"""What goes back to clients: JSON, errors in OpenAI's form, and server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from jlrm.config import RunError

log = logging.getLogger(__name__)

TYPES_OF_ERRORS = {401: "authentication_error", 429: "rate_limit_error"}


class Ascii(JSONResponse):
    """JSON in which every text can be sent, lone surrogates too."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def event(value: Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(value)}\n\n".encode()


def stream(events: AsyncIterator[bytes]) -> Response:
    """Return a reply that goes out event by event."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def failure(error: Exception) -> dict[str, Any]:
    """Return what a client is told of an error that is not its own."""
    if isinstance(error, RunError):
        return _complaint(500, str(error))
    log.error("A request has failed.", exc_info=error)
    return _complaint(500, "The server has made a mistake; its log says more.")


def _complaint(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    kind = TYPES_OF_ERRORS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "code": code}}


def error(status: int, message: str, code: str | None = None) -> JSONResponse:
    """Return what is refused, in OpenAI's form."""
    return Ascii(_complaint(status, message, code), status)


def closing(response: Response) -> Response:
    """Let the connection end: the rest of the body is not read."""
    response.headers["Connection"] = "close"
    return response
