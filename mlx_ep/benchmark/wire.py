"""HTTP as a load generator needs it: whole requests, answers noted as they come.

It may share a machine with the server that it measures, so that a part of an answer
costs one callback: no coroutine wakes up, and nothing is read of it before the end.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools


@dataclass
class HttpAnswer:
    """What came: the status, and each part of the body with its time, in s."""

    status: int = 0
    parts: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.parts)


class EndpointClient:
    """Connections to one server, kept open between requests.

    Args:
        address: http or https, with a path that all requests begin with.
        headers: of every request.
        connections: at once.
        seconds: for one answer.
    """

    def __init__(
        self, address: str, headers: Mapping[str, str], connections: int, seconds: float
    ) -> None:
        parts = urlsplit(address)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        lines = {"host": parts.netloc.rpartition("@")[2], "accept": "*/*", **headers}
        lines["content-type"] = "application/json"
        self._headers = "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        self._seconds = seconds
        self._room = asyncio.Semaphore(connections)
        self._idle: list[_Connection] = []

    async def post(self, path: str, body: bytes) -> HttpAnswer:
        """One request, and its complete answer.

        Raises:
            OSError: the server cannot be reached, or breaks off.
            TimeoutError: the answer is not complete in time; an OSError too.
        """
        head = f"POST {self._path}{path} HTTP/1.1\r\n{self._headers}"
        request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        async with self._room:
            try:
                async with asyncio.timeout(self._seconds):
                    return await self._exchange(request)
            except TimeoutError:
                raise TimeoutError(f"no answer within {self._seconds:g} s") from None

    async def _exchange(self, request: bytes) -> HttpAnswer:
        while self._idle:
            answer = await self._over(self._idle.pop(), request)
            if answer is not None:
                return answer
            # The server had closed it before it saw the request.
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self._host, self._port, ssl=self._tls
        )
        answer = await self._over(connection, request)
        if answer is None:
            raise ConnectionResetError("the server closed the connection")
        return answer

    async def _over(self, connection: _Connection, request: bytes) -> HttpAnswer | None:
        """None where the connection ended before a byte of the answer."""
        try:
            answer = await connection.ask(request)
        except BaseException:  # also a cancelled request: the server is to notice
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        """The idle ones; those in use end with their requests."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


class _Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer = HttpAnswer()
        self._done: asyncio.Future[HttpAnswer | None] | None = None
        self._ends_with_connection = False

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes) -> asyncio.Future[HttpAnswer | None]:
        self._answer = HttpAnswer()
        self._done = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._ends_with_connection = False
        if self._transport is None or self._transport.is_closing():
            self._done.set_result(None)
        else:
            self._transport.write(request)
        return self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._done is None:
            return self.close()  # nobody has asked
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ConnectionError(f"this is not HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._ends_with_connection and error is None:
            self._end(self._answer)
        elif self._answer.status == 0:
            self._end(None)
        else:
            self._end(error or ConnectionResetError("the server broke off"))

    # What the parser calls ------------------------------------------------------------

    def on_status(self, status: bytes) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_message_begin(self) -> None:
        self._has_length = False

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        self._ends_with_connection = not self._has_length

    def on_body(self, body: bytes) -> None:
        self._answer.parts.append((self._now, body))

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
        self._end(self._answer)

    def _end(self, result: HttpAnswer | Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if isinstance(result, Exception):
            self._done.set_exception(result)
        else:
            self._done.set_result(result)
        self._done = None
