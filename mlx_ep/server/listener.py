"""The port: uvicorn on a thread of its own, with limits that it lacks.

uvicorn has no time limit for headers and answers 503 to all where there are too many
connections. Here idle connections end, the one that idles longest makes room for a new
one, and a client that does not read can be dropped.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mlx_ep.server.replies import ABORT

# s: a load balancer or a monitor that looks once a second sees a 503, with the reason.
LINGER = 1.5


@dataclass(frozen=True)
class PortLimits:
    """Of connections.

    Attributes:
        connections: at once.
        header_seconds: for a request's headers, also before the first.
        header_bytes: of a request.
        idle_seconds: between two requests.
    """

    connections: int = 1024
    header_seconds: float = 10.0
    header_bytes: int = 64 * 2**10
    idle_seconds: float = 30.0


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ValueError: there is no such address, or somebody else has it.
    """
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family, kind))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
            stack.pop_all()
    except OSError as error:
        raise ValueError(
            f"--host and --port must be an address of this host that is free: {error}; "
            f"got {host} and {port}."
        ) from error
    return listener


class Listener:
    """Serves an application on a thread, until `stop`."""

    def __init__(
        self, app: Starlette, port: socket.socket, limits: PortLimits = PortLimits()
    ) -> None:
        protocol = type("_Bound", (_Protocol,), {"limits": limits})
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(limits.idle_seconds),
            timeout_graceful_shutdown=1,
        )
        errors = logging.getLogger("uvicorn.error")
        errors.setLevel(logging.ERROR)
        errors.handlers = logging.getLogger("mlx_ep").handlers
        self._server = uvicorn.Server(config)
        self._port = port
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Returns when the server answers.

        Raises:
            RuntimeError: it could not start.
        """
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.01)
            if not self._thread.is_alive():
                raise RuntimeError("[server] the HTTP thread could not start")

    def stop(self) -> None:
        """Answers that are being sent get a second more."""
        self._server.should_exit = True
        self._thread.join(5.0)

    def linger(self, seconds: float = LINGER) -> None:
        """Wait, on another thread: who asks meanwhile is told why the server ends."""
        time.sleep(seconds)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._port]))


class _Protocol(HttpToolsProtocol):
    """One connection, with its limits."""

    limits: PortLimits
    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(
        self,
        transport: asyncio.Transport,  # type: ignore[override]  # as in uvicorn
    ) -> None:
        super().connection_made(transport)
        self._expect_headers()
        if len(self.connections) > self.limits.connections:
            self._make_room()

    def _make_room(self) -> None:
        """Drop the connection that idles longest."""
        staying = [
            connection
            for connection in self.connections
            if isinstance(connection, _Protocol)
            and not connection.transport.is_closing()
        ]
        if len(staying) <= self.limits.connections:
            return  # others have been dropped, and will soon be gone
        idle = [c for c in staying if c._is_idle and c is not self]
        victim = min(idle or [self], key=lambda c: c._idle_since)
        victim.transport.abort()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._idle_since = self.loop.time()
        self._deadline = self.loop.call_later(
            self.limits.header_seconds, self._too_late
        )

    def _too_late(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _done_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        if self._deadline is None:
            self._expect_headers()
        extensions: dict[str, Any] = {ABORT: self.transport.abort}
        self.scope["extensions"] = extensions

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self.limits.header_bytes:
            raise ValueError("headers are too long")  # uvicorn answers 400

    def on_headers_complete(self) -> None:
        self._done_waiting()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._done_waiting()
        super().connection_lost(exc)
