"""Answers on their way to a client that may be slow, or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from mlx_ep.server.errors import ApiError
from mlx_ep.server.service import Access

T = TypeVar("T")
KEEP_ALIVE = b": keep-alive\n\n"
# Under this name the listener gives a way to drop a connection, unsent bytes and all.
ABORT = "mlx_ep.abort"


class GoneError(Exception):
    """The client has closed its connection, or does not read."""


async def read_limited(receive: Receive, scope: Scope, access: Access) -> bytes:
    """The request's body.

    Raises:
        ApiError: 413: it is longer than it may be, by its header or as it comes; 408:
            it does not come.
        GoneError: the client has gone.
    """
    limit = access.body_bytes
    too_long = ApiError(413, f"body must have at most {limit} bytes", code="too_large")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if not length.isdigit() or int(length) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(access.send_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise GoneError
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        seconds = access.send_seconds
        raise ApiError(408, f"body must come within {seconds:g} s") from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled when the client goes away.

    Raises:
        GoneError: the client has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(
    send: Send,
    content: Any,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> None:
    """A whole answer."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    lines = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), text.encode()) for name, text in (headers or {}).items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


class EventStream:
    """Server-sent events: a comment when nothing comes, an end when nobody reads."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, access: Access):
        self._scope, self._receive, self._send = scope, receive, send
        self._access = access
        self._last = 0.0
        self._writing_since: float | None = None

    async def run(self, events: AsyncIterator[bytes]) -> None:
        """Send all events.

        Raises:
            GoneError: the client has gone, or does not read; its connection is closed.
        """
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would keep events back
        ]
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": headers}
        )
        self._last = asyncio.get_running_loop().time()
        work = asyncio.ensure_future(self._write_all(events))
        gone = asyncio.ensure_future(_gone(self._receive))
        stuck = asyncio.ensure_future(self._watch())
        tasks = (work, gone, stuck)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if not gone.done():
                self._drop()
                await gone
            raise GoneError
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write_all(self, events: AsyncIterator[bytes]) -> None:
        async for event in events:
            await self._write(event)
        await self._send({"type": "http.response.body", "body": b""})

    async def _write(self, data: bytes) -> None:
        clock = asyncio.get_running_loop().time
        self._last = self._writing_since = clock()
        body = {"type": "http.response.body", "body": data, "more_body": True}
        await self._send(body)
        self._writing_since = None

    async def _watch(self) -> None:
        """Signs of life while nothing comes; returns when the client does not read."""
        clock = asyncio.get_running_loop().time
        pause = self._access.keep_alive_seconds
        while True:
            await asyncio.sleep(pause)
            since = self._writing_since
            if since is None:
                if clock() - self._last >= pause:
                    await self._write(KEEP_ALIVE)
            elif clock() - since >= self._access.send_seconds:
                return

    def _drop(self) -> None:
        abort = self._scope.get("extensions", {}).get(ABORT)
        if abort is not None:
            abort()
