"""What a browser is given: the files of the page, and how it must treat them."""

from __future__ import annotations

import pathlib
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

ASSETS = pathlib.Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
POLICY = (  # nothing of the page comes from elsewhere, and no other page frames it
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def asset(name: str) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that gives a file of the page."""
    path = ASSETS / name

    async def give(request: Request) -> Response:
        return page(path.read_bytes(), TYPES[path.suffix])

    return give


def page(content: bytes, kind: str) -> Response:
    """Return what a browser shows, told to take nothing from elsewhere."""
    headers = {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(content, media_type=kind, headers=headers)
