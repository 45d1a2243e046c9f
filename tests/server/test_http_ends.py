"""Clients that go away, queues that are full, engines that end."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from mlx_ep.server.listener import PortLimits
from mlx_ep.server.requests import Request
from tests.support.http_serving import Endless, Serving, serving
from tests.support.waiting import until

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5000}
# What nobody ends would be said for longer than anybody waits here.
LONG = HI | {"max_tokens": 90_000}
SLOWLY: dict[str, Any] = {"step_seconds": 0.002, "context": 10**5}


def _endless(request: Request) -> Endless:
    return Endless("word word ")


def _send(server: Serving, **fields: Any) -> socket.socket:
    """A request whose answer nobody reads yet."""
    parts = urlsplit(server.address)
    body = json.dumps({**LONG, **fields}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    found = socket.create_connection((parts.hostname or "", parts.port or 0))
    found.sendall(head.encode() + body)
    return found


def _wait_for(server: Serving, running: int) -> None:
    state = server.engine.state
    until(lambda: state().running == running, state)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}])
def test_a_client_that_goes_away_frees_its_places(fields: dict[str, Any]) -> None:
    count = fields.get("n", 1)
    with serving(_endless, **SLOWLY) as server:
        connection = _send(server, **fields)
        _wait_for(server, count)
        connection.close()
        _wait_for(server, 0)
        assert len(server.engine.cancelled) == count
        metrics = server.client.get("/metrics").text
        assert f"mlx_ep_cancelled_answers_total {count}.0" in metrics


def test_a_full_queue_is_429() -> None:
    with serving(_endless, places=1, queue=1, **SLOWLY) as server:
        state = server.engine.state
        first = _send(server)
        _wait_for(server, 1)
        second = _send(server)
        until(lambda: state().waiting == 1, state)
        found = server.post(CHAT, **HI)
        assert (found.status_code, found.headers["retry-after"]) == (429, "7")
        assert found.json()["error"]["code"] == "queue_full"
        # Of several answers the first had room: it is not left behind.
        second.close()
        until(lambda: state().waiting == 0, state)
        assert server.post(CHAT, **HI, n=2).status_code == 429
        first.close()
        server.engine.wait_until_idle()


def test_the_engine_hears_of_what_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is being read, and one that may follow an answer being sent."""
    with serving("Hello there.") as server:
        expected, submit = server.engine.expected, server.engine.submit
        seen: list[int] = []

        def note(*arguments: Any) -> None:
            seen.append(sum(expected))
            submit(*arguments)

        monkeypatch.setattr(server.engine, "submit", note)
        server.chat("hi", n=2)
        assert seen == [1, 1]
        until(lambda: len(expected) == 4, lambda: expected)
        assert expected == [1, -1, 1, -1]
        # One that is refused is read, and has no answer.
        assert server.post(CHAT, messages=[]).status_code == 400
        assert expected == [1, -1] * 3
    with serving(_endless, **SLOWLY) as server:  # nor has one that is cancelled
        connection = _send(server, stream=True)
        _wait_for(server, 1)
        connection.close()
        _wait_for(server, 0)
        assert server.engine.expected == [1, -1]


def test_a_failed_rank_is_told_to_everybody() -> None:
    reason = "rank 1 was killed (SIGKILL)"
    with serving(_endless, **SLOWLY) as server:
        stream = {"stream": True}
        bodies = [
            (CHAT, LONG),
            (CHAT, LONG | stream),
            ("/v1/responses", {"input": "x", "max_output_tokens": 90_000} | stream),
            ("/v1/messages", LONG | stream),
        ]
        with ThreadPoolExecutor(4) as pool:
            posts = [
                pool.submit(server.client.post, path, json=body)
                for path, body in bodies
            ]
            _wait_for(server, 4)
            server.engine.fail(reason)
            whole, *streams = [post.result() for post in posts]
        assert whole.status_code == 503
        assert reason in whole.json()["error"]["message"]
        for found in streams:
            assert found.status_code == 200
            assert reason in found.text.strip().split("\n\n")[-1]
            assert '"error"' in found.text.strip().split("\n\n")[-1]
        health = server.client.get("/health")
        assert (health.status_code, health.json()["reason"]) == (503, reason)
        assert server.post(CHAT, **HI).status_code == 503
        assert "mlx_ep_up 0.0" in server.client.get("/metrics").text


def test_draining() -> None:
    with serving("Hello there.", held=True) as server:
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(server.post(CHAT, **HI))
        )
        thread.start()
        _wait_for(server, 1)
        server.engine.drain()
        found = server.client.get("/health")
        assert (found.status_code, found.json()["reason"]) == (503, "the server drains")
        refused = server.post(CHAT, **HI)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        server.engine.go()
        thread.join()
        assert answers[0].json()["choices"][0]["finish_reason"] == "stop"


def _mixed_client(server: Serving, number: int) -> str:
    """How one of many clients fares."""
    rng = random.Random(number)
    kind = rng.random()
    if kind < 0.2:  # goes away at some time
        connection = _send(server, stream=rng.random() < 0.5)
        time.sleep(rng.uniform(0, 0.1))
        connection.close()
        return "gone"
    if kind < 0.35:
        found = server.client.post(CHAT, content=rng.choice([b"{", b"[1]", b"\0"]))
        assert found.status_code == 400
        return "bad"
    body = {**HI, "max_tokens": rng.randrange(1, 40), "stream": rng.random() < 0.5}
    if kind < 0.5:  # reads slowly
        with server.client.stream("POST", CHAT, json=body) as response:
            for _ in response.iter_bytes(200):
                time.sleep(0.002)
            return str(response.status_code)
    found = server.client.post(CHAT, json=body)
    if body["stream"]:
        assert found.text.endswith("data: [DONE]\n\n")
    return str(found.status_code)


@pytest.mark.parametrize("count", [200])
def test_many_clients_of_all_kinds(count: int) -> None:
    options = SLOWLY | {"step_seconds": 0.001, "places": 16, "queue": 300}
    with serving(_endless, **options) as server:
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda i: _mixed_client(server, i), range(count)))
        server.engine.wait_until_idle()
        assert found.count("200") > count / 3
        assert set(found) == {"200", "gone", "bad"}
        assert len(server.engine.cancelled) <= found.count("gone")
        assert server.post(CHAT, **{**HI, "max_tokens": 2}).status_code == 200


@pytest.mark.slow
def test_a_thousand_idle_connections() -> None:
    limits = PortLimits(connections=1024, header_seconds=60.0)
    with serving("Hello there.", limits=limits) as server:
        parts = urlsplit(server.address)
        address = (parts.hostname or "", parts.port or 0)
        idle = [socket.create_connection(address) for _ in range(1000)]
        try:
            start = time.monotonic()
            for _ in range(20):
                assert server.post(CHAT, **HI).status_code == 200
            assert time.monotonic() - start < 10
        finally:
            for connection in idle:
                connection.close()
