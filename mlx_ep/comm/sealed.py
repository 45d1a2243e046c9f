"""Connections of all ranks to rank 0, which only ranks of this run can use.

For what cannot be a collective, because a rank that waits must not take a core. Each
message is encrypted, authenticated and numbered as those between watches are
(`mlx_ep.comm.control.frames`), and ranks come in by such a door as theirs (`wire`);
nothing is unpickled. The key comes from a random token that rank 0 sends by a
collective, and from MLX_EP_SECRET where that is set: whoever can read the group's
traffic still does not know it then. Rank 0 listens until all ranks are connected.

A rank that is gone or stopped is the watch's business: whoever waits here is ended by
its own, with the reason (docs/reliability.md).
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import time
from collections.abc import Sequence
from typing import Any

from mlx_ep.comm.control.frames import RefusedError, Session
from mlx_ep.comm.control.meeting import PORTS_TRIED, SECRET, secret_key
from mlx_ep.comm.control.wire import Door, Wire, serve

TICK = 0.5  # seconds between looks for newcomers that took too long
PIECE = 1 << 20  # bytes of a message in one frame
MOST_MESSAGE = 256 << 20  # bytes
_MORE, _LAST = b"\1", b"\0"

_log = logging.getLogger("mlx_ep")


def run_key(token: str) -> bytes:
    """The secret of connections whose token rank 0 has sent to all."""
    return secret_key(os.environ.get(SECRET, "")) + token.encode()


class SealedLink:
    """One side of a connection between two ranks of a run.

    Args:
        peer: connected; `session` has shown that the other side is a rank.
        session: of this connection.
        rank: of the other side.
        texts: of frames that came with its greeting.
    """

    def __init__(
        self,
        peer: socket.socket,
        session: Session,
        rank: int,
        texts: Sequence[bytes] = (),
    ) -> None:
        self.rank = rank
        self._peer, self._session, self._texts = peer, session, list(texts)
        peer.settimeout(None)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        """Raises:
        RuntimeError: the other rank is gone, or the message is too long.
        """
        if len(data) > MOST_MESSAGE:
            raise RuntimeError(
                f"a message between ranks has at most {MOST_MESSAGE} bytes; this one "
                f"has {len(data)}."
            )
        starts = range(0, max(len(data), 1), PIECE)
        frames = [
            self._session.seal_bytes(
                (_LAST if at + PIECE >= len(data) else _MORE) + data[at : at + PIECE]
            )
            for at in starts
        ]
        try:
            self._peer.sendall(b"".join(frames))
        except OSError as error:
            raise self._gone(str(error)) from error

    def receive(self) -> bytes:
        """The next message.

        Raises:
            RuntimeError: the other rank is gone, or the message was changed, replayed
                or is too long.
        """
        parts: list[bytes] = []
        size = 0
        while True:
            text = self._next()
            parts.append(text[1:])
            size += len(text) - 1
            if text[:1] == _LAST:
                return b"".join(parts)
            if size > MOST_MESSAGE:
                raise RuntimeError(f"rank {self.rank} sent a message without an end.")

    def close(self) -> None:
        self._peer.close()

    def _next(self) -> bytes:
        while not self._texts:
            try:
                data = self._peer.recv(1 << 16)
                self._texts += self._session.receive_bytes(data)
            except OSError as error:
                raise self._gone(str(error)) from error
            except RefusedError as error:
                raise RuntimeError(
                    f"what came from rank {self.rank} is not what it sent: {error}."
                ) from error
            if not data:
                raise self._gone("")
        return self._texts.pop(0)

    def _gone(self, why: str) -> RuntimeError:
        text = f"rank {self.rank} has closed its connection"
        return RuntimeError(f"{text}: {why}" if why else f"{text}.")


def link_to_rank_0(peer: socket.socket, key: bytes, rank: int) -> SealedLink:
    """This rank's side; the timeout of `peer` bounds each wait.

    Raises:
        OSError: rank 0 does not answer, or another answers in its place.
    """
    session, texts = Session(key, is_server=False), list[bytes]()
    try:
        peer.sendall(session.opening)
        while not session.is_open:
            session.receive_bytes(_some(peer))
        peer.sendall(session.seal({"kind": "hello", "rank": rank}))
        while not texts:
            texts = session.receive_bytes(_some(peer))
    except OSError:
        peer.close()
        raise
    except RefusedError as error:
        peer.close()
        raise ConnectionError(f"what answers is not rank 0: {error}") from error
    return SealedLink(peer, session, 0, texts[1:])


class Entrance:
    """Where rank 0 lets the others in, until all of them are.

    Args:
        addresses: where to listen, at the same port of each.

    Raises:
        OSError: no port is free at all of them.
    """

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self._selector = selectors.DefaultSelector()
        self._missing: set[int] = set()
        self._links: list[SealedLink] = []
        for attempt in range(PORTS_TRIED):
            try:
                self._door = Door(
                    self._selector, addresses, (0,), self._on_hello, self._log
                )
                break
            except OSError:  # the port of the first one is taken at another one
                if attempt + 1 == PORTS_TRIED:
                    raise
        self.port = self._door.port

    def links(self, key: bytes, size: int, limit: float) -> list[SealedLink]:
        """To ranks 1, 2, ... in this order. Nobody listens any more afterwards.

        Args:
            key: see `run_key`.
            size: the number of ranks.
            limit: seconds for all of them.

        Raises:
            TimeoutError: some have not come.
        """
        self._missing = set(range(1, size))
        deadline = time.monotonic() + limit
        self._door.open(key)
        try:
            while self._missing and (left := deadline - time.monotonic()) > 0:
                serve(self._selector, min(left, TICK))
                self._door.tick()
        finally:
            self._door.close()
            self._selector.close()
        if self._missing:
            for link in self._links:
                link.close()
            names = ", ".join(map(str, sorted(self._missing)))
            raise TimeoutError(f"rank {names} did not connect within {limit:g} s")
        return sorted(self._links, key=lambda link: link.rank)

    def _on_hello(self, wire: Wire, messages: list[dict[str, Any]]) -> None:
        rank = messages[0]["rank"]
        if rank not in self._missing:
            self._log(f"rank {rank} came a second time")
            wire.close()
            return
        self._missing.remove(rank)
        wire.send({"kind": "welcome"})
        self._links.append(SealedLink(wire.socket, wire.session, rank))

    def _log(self, text: str) -> None:
        _log.warning("connections between ranks: %s", text)


def _some(peer: socket.socket) -> bytes:
    """Raises:
    OSError: the connection has ended.
    """
    data = peer.recv(1 << 12)
    if not data:
        raise ConnectionError("the connection was closed")
    return data
