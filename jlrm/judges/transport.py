"""How bytes go to a server and come back: with its key, in time, and never more than fit.

Bodies are read in pieces and inflated by hand, so that neither an endless one nor one that inflates
a thousandfold takes more memory than `MOST_BYTES`. No server's text leaves here with the key in it.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2

from jlrm.config import UsageError
from jlrm.judges.complaints import Declined, Passing, Received
from jlrm.judges.requests import EndpointSettings

MOST_BYTES = 16 * 2**20  # of a body, or of a line of a file of replies, inflated
PIECE = 2**16
QUOTED = 400  # characters of a server's message
GZIP = 16 + zlib.MAX_WBITS


class Server:
    """A server that takes a key; `client` opens the connections that the others need."""

    def __init__(self, settings: EndpointSettings) -> None:
        self._key, self._timeout = settings.key, settings.timeout
        self._is_azure, self._num_kept = settings.is_azure, settings.concurrency

    def client(self) -> httpx2.AsyncClient:
        """Return connections. Only gzip is asked for: the one that `_inflated` knows.

        Raises:
          UsageError: variables of the environment name a proxy or certificates that can't be used.
        """
        headers = {"Accept-Encoding": "gzip"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        if self._key and self._is_azure:
            headers["api-key"] = self._key
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self._num_kept)
        try:
            return httpx2.AsyncClient(headers=headers, limits=limits, timeout=None)
        except (ImportError, ValueError, OSError, httpx2.InvalidURL) as error:
            reason = self.quotable(str(error)).rstrip(".")
            raise UsageError(
                f"No connection can be made with this environment: {reason}. Check HTTP_PROXY,"
                " HTTPS_PROXY, ALL_PROXY (no SOCKS), NO_PROXY and SSL_CERT_FILE."
            ) from None

    def quotable(self, text: str) -> str:
        """Return a server's text without the key, which it may echo, on one short line.

        Characters that steer a terminal, or that no file can hold, become U+FFFD.
        """
        text = " ".join((text.replace(self._key, "[key]") if self._key else text).split())
        text = "".join(c if c.isprintable() else "\ufffd" for c in text[: QUOTED + 1])
        return text if len(text) <= QUOTED else text[:QUOTED] + "..."

    async def exchange(
        self, client: httpx2.AsyncClient, method: str, url: str, **content: Any
    ) -> Received:
        """Send a request and return what came back, whatever its status.

        Raises:
          Passing: no connection, one that broke, or no whole reply in time.
          Declined: a body of more than MOST_BYTES.
        """
        body = bytearray()

        def take(status: int, piece: bytes) -> None:
            _extend(body, piece, "the reply")

        status, headers = await self._pieces(client, method, url, take, False, content)
        return Received(status, headers, bytes(body))

    async def lines(
        self, client: httpx2.AsyncClient, url: str, take: Callable[[bytes], None]
    ) -> Received:
        """Hand on a file's lines as they come; only the last, or an error, is in what is returned.

        Raises:
          Passing: as above; the time is for a piece of the file.
          Declined: a line of more than MOST_BYTES.
        """
        rest = bytearray()

        def cut(status: int, piece: bytes) -> None:
            _extend(rest, piece, "a line of the file")
            if status == 200 and b"\n" in piece:
                *whole, last = bytes(rest).split(b"\n")
                rest[:] = last
                for line in whole:
                    take(line)

        status, headers = await self._pieces(client, "GET", url, cut, True, {})
        return Received(status, headers, bytes(rest))

    async def _pieces(
        self,
        client: httpx2.AsyncClient,
        method: str,
        url: str,
        take: Callable[[int, bytes], None],
        is_file: bool,
        content: dict[str, Any],
    ) -> tuple[int, dict[str, str]]:
        loop = asyncio.get_running_loop()
        try:
            # httpx2's own limits are for one read; this one a server cannot stretch by trickling.
            async with asyncio.timeout(self._timeout) as limit:
                async with client.stream(method, url, **content) as response:
                    async for piece in _inflated(response):
                        take(response.status_code, piece)
                        if is_file and piece:
                            limit.reschedule(loop.time() + self._timeout)
                    headers = {name.lower(): value for name, value in response.headers.items()}
                    return response.status_code, headers
        except TimeoutError:
            raise Passing(f"no whole reply in {self._timeout:g} s") from None
        except httpx2.InvalidURL as error:
            raise UsageError(f"base_url is no address: {self.quotable(str(error))}.") from None
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            text = self.quotable(str(error))
            raise Passing(f"no connection: {text}", is_unreachable=True) from None
        except (httpx2.HTTPError, zlib.error) as error:
            raise Passing(f"the connection broke: {self.quotable(str(error))}") from None


async def _inflated(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Yield a body in pieces of at most PIECE bytes, or as they came where nothing inflates them.

    Raises:
      zlib.error: no gzip, or less than the whole of it.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise zlib.error(f"it came as {encoding}, which was not asked for")
    is_packed = "gzip" in encoding
    inflater = zlib.decompressobj(GZIP)
    num_bytes = 0
    async for raw in response.aiter_raw():
        num_bytes += len(raw)
        if not is_packed:
            yield raw
        if inflater.eof:  # it would keep all that follows
            return
        while is_packed and raw:
            yield inflater.decompress(raw, PIECE)
            raw = inflater.unconsumed_tail
    if is_packed and num_bytes and not inflater.eof:
        raise zlib.error("its end is missing")


def _extend(body: bytearray, piece: bytes, what: str) -> None:
    if len(body) + len(piece) > MOST_BYTES:
        raise Declined(f"{what} is larger than {MOST_BYTES // 2**20} MiB, which no judgement is")
    body.extend(piece)
