"""Who may ask, and how much a client can take."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mlx_ep.server.listener import PortLimits, open_port
from mlx_ep.server.replies import ABORT, EventStream, GoneError
from mlx_ep.server.service import Access
from tests.support.http_serving import Serving, serving
from tests.support.waiting import LONG, until

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
KEY = "a-secret-key"


def _connect(server: Serving) -> socket.socket:
    parts = urlsplit(server.address)
    found = socket.create_connection((parts.hostname or "", parts.port or 0))
    found.settimeout(LONG)
    return found


def _raw(body: bytes, *headers: str) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "host: x", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _read_all(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def test_keys() -> None:
    access = Access(api_keys=(KEY, "another"))
    with serving(access=access) as server:
        client = server.client
        assert client.post(CHAT, json=HI).status_code == 401
        for wrong in ("x", KEY + "x", KEY[:-1]):
            headers = {"authorization": f"Bearer {wrong}"}
            found = client.post(CHAT, json=HI, headers=headers)
            assert found.status_code == 401
            assert found.json()["error"]["code"] == "invalid_api_key"
        for headers in (
            {"authorization": f"Bearer {KEY}"},
            {"authorization": "bearer another"},
            {"x-api-key": KEY},
        ):
            assert client.post(CHAT, json=HI, headers=headers).status_code == 200
        for path in ("/v1/models", "/metrics", "/v1/state", "/v1/nothing"):
            assert client.get(path).status_code == 401
        for path in ("/health", "/", "/page.js", "/page.css"):
            assert client.get(path).status_code == 200
        messages = client.post("/v1/messages", json={}).json()
        assert messages["error"]["type"] == "authentication_error"


def test_no_key_and_no_prompt_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KEY not in repr(Access(api_keys=(KEY,)))
    secret = "the prompt is secret"
    body = {"messages": [{"role": "user", "content": secret}]}
    headers = {"authorization": f"Bearer {KEY}"}
    monkeypatch.setattr(logging.getLogger("mlx_ep"), "propagate", True)  # to caplog
    with (
        caplog.at_level(logging.DEBUG),
        caplog.at_level(logging.DEBUG, "mlx_ep"),
        serving(access=Access(api_keys=(KEY,)), headers=headers) as server,
    ):
        assert server.post(CHAT, **body).status_code == 200
        assert server.post(CHAT, **body, oops=secret).status_code == 400
        server.client.post(CHAT, content=json.dumps(body)[:-1])
        server.client.get(f"/v1/models/{secret}")
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert f"POST {CHAT}: 200" in said and f"POST {CHAT}: 400" in said
    assert secret not in said and KEY not in said


def test_pages_of_other_sites_may_not_ask() -> None:
    with serving() as server:
        for origin, status in (
            ("https://evil.example", 403),
            ("null", 403),
            (server.address, 200),  # the server's own page
        ):
            found = server.client.post(CHAT, json=HI, headers={"origin": origin})
            assert found.status_code == status
            assert "access-control-allow-origin" not in found.headers
        # A name that its owner points at this machine.
        rebound = {"origin": "http://evil.example", "host": "evil.example"}
        assert server.client.post(CHAT, json=HI, headers=rebound).status_code == 403
    friend = "https://friend.example"
    with serving(access=Access(origins=(friend,), api_keys=(KEY,))) as server:
        asks = {
            "origin": friend,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        allowed = server.client.options(CHAT, headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == friend
        headers = {"origin": friend, "authorization": f"Bearer {KEY}"}
        found = server.client.post(CHAT, json=HI, headers=headers)
        assert found.headers["access-control-allow-origin"] == friend
        other = {"origin": "https://other.example", "x-api-key": KEY}
        assert server.client.post(CHAT, json=HI, headers=other).status_code == 403


def test_the_page_loads_nothing_else() -> None:
    with serving() as server:
        for path in ("/", "/page.js", "/page.css"):
            found = server.client.get(path)
            policy = found.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert "http://" not in found.text and "https://" not in found.text
        assert "style=" not in server.client.get("/").text


def test_bodies_that_are_too_long() -> None:
    with serving(access=Access(body_bytes=1000)) as server:
        found = server.client.post(CHAT, content=b"x" * 1001)
        assert found.status_code == 413
        assert "1000" in found.json()["error"]["message"]
        # By its header alone: nothing of it is sent.
        with _connect(server) as connection:
            connection.sendall(_raw(b"", "content-length: 99999999"))
            assert _read_all(connection).startswith(b"HTTP/1.1 413")
        # Without a length, in parts.
        with _connect(server) as connection:
            chunks = b"".join(b"100\r\n" + b"x" * 256 + b"\r\n" for _ in range(6))
            connection.sendall(_raw(chunks, "transfer-encoding: chunked"))
            assert _read_all(connection).startswith(b"HTTP/1.1 413")
        assert server.post(CHAT, **HI).status_code == 200


def _still_serves(server: Serving) -> bool:
    """Whether a request whose headers came in time has its answer."""
    try:
        return server.post(CHAT, **HI).status_code == 200
    except httpx.TransportError:  # this host stood still while they were sent
        return False


@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\nhost: x\r\nslow: "])
def test_headers_have_to_come(sent: bytes) -> None:
    with serving(limits=PortLimits(header_seconds=0.2)) as server:
        start = time.monotonic()
        with _connect(server) as connection:
            connection.sendall(sent)
            assert _read_all(connection) == b""
        assert time.monotonic() - start > 0.1
        until(lambda: _still_serves(server))


def test_bodies_have_to_come() -> None:
    with serving(access=Access(send_seconds=0.2)) as server, _connect(server) as slow:
        slow.sendall(_raw(b'{"', "content-length: 100"))
        assert _read_all(slow).startswith(b"HTTP/1.1 408")


def test_headers_that_are_too_long() -> None:
    with (
        serving(limits=PortLimits(header_bytes=2000)) as server,
        _connect(server) as connection,
    ):
        connection.sendall(_raw(b"", *(f"h{i}: {'x' * 100}" for i in range(30))))
        assert _read_all(connection).startswith(b"HTTP/1.1 400")


def test_idle_connections_make_room() -> None:
    with serving(limits=PortLimits(connections=5)) as server:
        idle = [_connect(server) for _ in range(12)]
        assert server.post(CHAT, **HI).status_code == 200
        closed = 0
        for connection in idle:
            connection.setblocking(False)
            try:
                closed += connection.recv(1) == b""
            except BlockingIOError:
                pass
            except ConnectionResetError:
                closed += 1
            connection.close()
        assert closed >= 7


def test_a_client_that_does_not_read_is_dropped() -> None:
    dropped = []

    async def play() -> None:
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # the buffers are full

        async def events() -> AsyncIterator[bytes]:
            yield b"data: x\n\n"

        def abort() -> None:
            dropped.append(True)
            gone.set()

        scope = {"type": "http", "extensions": {ABORT: abort}}
        access = Access(send_seconds=0.2, keep_alive_seconds=0.05)
        with pytest.raises(GoneError):
            await EventStream(scope, receive, send, access).run(events())

    asyncio.run(asyncio.wait_for(play(), LONG))
    assert dropped == [True]


def test_signs_of_life_while_nothing_comes() -> None:
    access = Access(keep_alive_seconds=0.05)
    body = HI | {"stream": True}
    lines, signs = [], 0
    with (
        serving("Hi.", access=access, held=True) as server,
        server.client.stream("POST", CHAT, json=body) as response,
    ):
        for line in response.iter_lines():
            lines.append(line)
            signs += line == ": keep-alive"
            if signs == 3:
                server.engine.go()
    assert signs >= 3
    assert lines[-2:] == ["data: [DONE]", ""]


def test_a_port_that_is_taken_is_wrong_usage() -> None:
    with (
        open_port("127.0.0.1", 0) as taken,
        pytest.raises(ValueError, match="--host and --port must be"),
    ):
        open_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match="--host and --port"):
        open_port("no.such.host.invalid", 0)


def test_pipelined_and_kept_connections() -> None:
    with serving() as server, httpx.Client(base_url=server.address) as client:
        for _ in range(3):
            assert client.post(CHAT, json=HI).status_code == 200
