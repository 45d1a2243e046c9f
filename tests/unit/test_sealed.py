"""Connections between ranks: only ranks of this run write to them or read them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_ep.comm import Entrance, SealedLink, link_to_rank_0, run_key
from mlx_ep.comm.control.wire import MOST_NEWCOMERS
from mlx_ep.comm.sealed import PIECE
from mlx_ep.server.doorbell import _reach

KEY = run_key("a token of this run")
Wire = tuple[socket.socket, socket.socket]


def _entrance() -> tuple[Entrance, tuple[str, int]]:
    entrance = Entrance(("127.0.0.1",))
    return entrance, ("127.0.0.1", entrance.port)


def _send_all(link: SealedLink, texts: list[bytes]) -> None:
    for text in texts:
        link.send(text)


def _join(address: tuple[str, int], rank: int, key: bytes = KEY) -> SealedLink:
    return link_to_rank_0(socket.create_connection(address, 60), key, rank)


@pytest.fixture
def links() -> Iterator[tuple[SealedLink, SealedLink, Wire]]:
    """Rank 0's side, rank 1's, and the wire of both, which a test may cut into."""
    entrance, address = _entrance()
    door = socket.create_server(("127.0.0.1", 0))
    with ThreadPoolExecutor() as pool:
        zero = pool.submit(entrance.links, KEY, 2, 60.0)
        one = pool.submit(_join, door.getsockname(), 1)
        left, _ = door.accept()
        right = socket.create_connection(address, 60)
        # Two openings, the name of the rank and the welcome, each awaited.
        for source, target in ((left, right), (right, left)) * 2:
            target.sendall(source.recv(1 << 12))
        first, second = zero.result()[0], one.result()
    yield first, second, (left, right)
    first.close()
    second.close()
    for end in (left, right, door):
        end.close()


def test_messages_of_any_length_arrive_in_their_order() -> None:
    entrance, address = _entrance()
    texts = [b"", b"!", bytes(range(256)) * 9, bytes(2 * PIECE), b"x" * (2 * PIECE + 1)]
    with ThreadPoolExecutor() as pool:
        zero = pool.submit(entrance.links, KEY, 3, 60.0)
        two, one = (_join(address, rank) for rank in (2, 1))
        links = zero.result()
        assert [link.rank for link in links] == [1, 2]
        for link, other in zip(links, (one, two), strict=True):
            sent = pool.submit(_send_all, link, texts)
            assert [other.receive() for _ in texts] == texts
            sent.result()
            other.send(b"and back")
            assert link.receive() == b"and back"
            link.close()
            with pytest.raises(RuntimeError, match="rank 0 has closed"):
                other.receive()
            other.close()


def test_what_was_changed_is_refused(
    links: tuple[SealedLink, SealedLink, Wire],
) -> None:
    zero, one, (left, right) = links
    one.send(b"a token")
    frame = bytearray(left.recv(1 << 12))
    frame[6] ^= 1
    right.sendall(frame)
    with pytest.raises(RuntimeError, match="from rank 1 is not what it sent"):
        zero.receive()


def test_what_is_sent_again_is_refused(
    links: tuple[SealedLink, SealedLink, Wire],
) -> None:
    zero, one, (left, right) = links
    one.send(b"a token")
    frame = left.recv(1 << 12)
    assert b"a token" not in frame  # nor can it be read
    right.sendall(frame)
    assert zero.receive() == b"a token"
    right.sendall(frame)
    with pytest.raises(RuntimeError, match="from rank 1 is not what it sent"):
        zero.receive()


def test_a_length_beyond_bounds_is_refused(
    links: tuple[SealedLink, SealedLink, Wire],
) -> None:
    zero, _, (_, right) = links
    right.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(RuntimeError, match="a frame of 4294967295 bytes"):
        zero.receive()


def test_strangers_keep_no_rank_out(caplog: pytest.LogCaptureFixture) -> None:
    entrance, address = _entrance()
    with ThreadPoolExecutor() as pool:
        zero = pool.submit(entrance.links, KEY, 2, 60.0)
        silent = [
            socket.create_connection(address, 60) for _ in range(MOST_NEWCOMERS + 9)
        ]
        loud = socket.create_connection(address, 60)
        loud.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(OSError):
            _join(address, 1, run_key("another token"))
        one = _join(address, 1)
        (link,) = zero.result()
        one.send(b"here")
        assert link.receive() == b"here"
        for end in (*silent, loud):
            end.close()
        one.close()
        link.close()
    assert caplog.text.count("turned away a connection from 127.0.0.1") == 1
    assert "connections of strangers from 127.0.0.1" in caplog.text
    with pytest.raises(OSError):  # nobody listens any more
        socket.create_connection(address, 1)


def test_a_rank_that_is_here_is_not_let_in_twice() -> None:
    entrance, address = _entrance()
    with ThreadPoolExecutor() as pool:
        zero = pool.submit(entrance.links, KEY, 3, 60.0)
        one = _join(address, 1)
        with pytest.raises(OSError):
            _join(address, 1)
        two = _join(address, 2)
        for link in (*zero.result(), one, two):
            link.close()


def test_a_rank_that_does_not_come_is_named() -> None:
    entrance, address = _entrance()
    with ThreadPoolExecutor() as pool:
        one = pool.submit(_join, address, 1)
        with pytest.raises(TimeoutError, match="rank 2 did not connect within"):
            entrance.links(KEY, 3, 2.0)
        one.result().close()


def test_the_secret_of_a_run_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    read = "read in the group's traffic"
    without = run_key(read)
    monkeypatch.setenv("MLX_EP_SECRET", "what all hosts were given")
    key = run_key(read)
    entrance, address = _entrance()
    with ThreadPoolExecutor() as pool:
        zero = pool.submit(entrance.links, key, 2, 5.0)
        with pytest.raises(OSError):
            _join(address, 1, without)
        one = _join(address, 1, key)
        for link in (*zero.result(), one):
            link.close()


def test_another_program_at_rank_0s_address_is_passed_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hosts may share an address, where something else listens at that port."""
    entrance, address = _entrance()
    stranger = socket.create_server(("127.0.0.1", 0))
    places = {"bridge": stranger.getsockname(), "rank 0": address}
    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda to, limit: connect(places[to[0]], limit)
    )
    with ThreadPoolExecutor() as pool:
        zero = pool.submit(entrance.links, KEY, 2, 30.0)
        one = pool.submit(_reach, ["bridge", "rank 0"], 0, KEY, 1)
        guest, _ = stranger.accept()
        guest.recv(1 << 12)
        guest.sendall(b"HTTP/1.1 400 Bad Request, and so on until it is long enough")
        guest.close()
        link, (first,) = one.result(), zero.result()
        link.send(b"here")
        assert first.receive() == b"here"
        for end in (link, first, stranger):
            end.close()
