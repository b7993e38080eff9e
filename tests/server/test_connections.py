"""Connections whose clients bring nothing, or take nothing, are ended."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from conftest import slowness
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from jlrm.server import protocol


@pytest.fixture
def port(monkeypatch) -> Iterator[int]:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(protocol, "SEND_SECONDS", 0.5)

    async def much(request) -> Response:
        return Response(b"x" * 20_000_000)

    app = Starlette(routes=[Route("/", much)])
    config = uvicorn.Config(app, http=protocol.Impatient, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


def is_ended(connection: socket.socket) -> bool:
    """Return whether the other side ends a connection, of which nothing more is read."""
    until = time.monotonic() + 10 * slowness()
    while time.monotonic() < until:
        try:
            connection.send(b" ")
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHo"])
def test_a_connection_without_a_request_is_ended(port, begun):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(begun)
        connection.settimeout(10 * slowness())
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""


def test_a_client_that_takes_nothing_is_ended(port):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert is_ended(connection)


def test_a_client_that_reads_gets_all(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        taken = 0
        while part := connection.recv(1_000_000):
            taken += len(part)
        assert taken > 20_000_000
