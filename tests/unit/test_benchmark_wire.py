"""The load generator's HTTP: answers of servers that end in different ways."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from mlx_ep.benchmark.wire import EndpointClient, HttpAnswer
from tests.support.waiting import LONG

CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
)
SIZED = b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno"
# As Python's http.server answers: the end of the connection is that of the body.
UNSIZED = b"HTTP/1.0 200 OK\r\n\r\nabcde"


class _Server:
    """Gives one of `answers` to each request, the last one also to later ones."""

    def __init__(self, *answers: bytes, closes: bool = False) -> None:
        self._answers, self._closes = list(answers), closes
        self.requests: list[bytes] = []
        self.connections = 0
        self.gone = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        while line := await reader.readline():
            head = line + await reader.readuntil(b"\r\n\r\n")
            size = int(head.split(b"content-length: ")[1].split()[0])
            self.requests.append(head + await reader.readexactly(size))
            several = len(self._answers) > 1
            writer.write(self._answers.pop(0) if several else self._answers[0])
            if self._closes:
                break
        self.gone.set()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def _with_wire(
    server: _Server,
    use: Callable[[EndpointClient], Awaitable[None]],
    seconds: float = LONG,
) -> None:
    async def run() -> None:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        wire = EndpointClient(f"http://127.0.0.1:{port}/v1", {"x-a": "b"}, 2, seconds)
        await use(wire)
        wire.close()
        await asyncio.gather(*server.tasks)
        listener.close()
        await listener.wait_closed()

    asyncio.run(run())


def _post(wire: EndpointClient) -> Awaitable[HttpAnswer]:
    return wire.post("/completions", b"{}")


def test_a_connection_serves_one_request_after_another() -> None:
    server = _Server(CHUNKED, SIZED, CHUNKED)

    async def use(wire: EndpointClient) -> None:
        for status, body in ((200, b"abcde"), (404, b"no"), (200, b"abcde")):
            answer = await _post(wire)
            assert (answer.status, answer.body) == (status, body)
        times = [when for when, _ in answer.parts]
        assert [part for _, part in answer.parts] == [b"abc", b"de"]
        assert times == sorted(times)

    _with_wire(server, use)
    assert server.connections == 1
    assert all(
        request.startswith(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:")
        and b"\r\nx-a: b\r\n" in request
        and request.endswith(b"\r\n\r\n{}")
        for request in server.requests
    )


@pytest.mark.parametrize("answer", [UNSIZED, CHUNKED])
def test_a_server_that_closes_gets_a_new_connection(answer: bytes) -> None:
    server = _Server(answer, closes=True)

    async def use(wire: EndpointClient) -> None:
        for _ in range(3):
            assert (await _post(wire)).body == b"abcde"

    _with_wire(server, use)
    assert server.connections == 3


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (CHUNKED[:-9], "broke off"),
        (b"", "closed the connection"),
        (b"SSH-2.0-x\r\n\r\n", "not HTTP"),
    ],
)
def test_half_an_answer_is_an_error(answer: bytes, said: str) -> None:
    async def use(wire: EndpointClient) -> None:
        with pytest.raises(ConnectionError, match=said):
            await _post(wire)

    _with_wire(_Server(answer, closes=True), use)


def test_late_answers_and_cancelled_requests_close_their_connections() -> None:
    async def run(seconds: float, cancel: bool) -> None:
        server = _Server(CHUNKED[:-9])

        async def use(wire: EndpointClient) -> None:
            request = asyncio.ensure_future(_post(wire))
            if cancel:
                await asyncio.sleep(0.05)
                request.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await request
            else:
                with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
                    await request
            await asyncio.wait_for(server.gone.wait(), LONG)

        await asyncio.to_thread(_with_wire, server, use, seconds)

    asyncio.run(run(0.05, cancel=False))
    asyncio.run(run(LONG, cancel=True))
