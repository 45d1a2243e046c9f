"""Connections of all ranks to rank 0, which only ranks of this run can use.

For what cannot be a collective, because a rank that waits must not take a core. Each
message is encrypted, authenticated and numbered as those between watches are
(`mlx_ep.comm.control.frames`); nothing is unpickled. The key comes from a random token
that rank 0 sends by a collective, and from MLX_EP_SECRET where that is set: whoever can
read the group's traffic still does not know it then. Rank 0 listens only until all
ranks are connected, and hears strangers beside each other, none of whom it waits for.

A rank that is gone or stopped is the watch's business: whoever waits here is ended by
its own, with the reason (docs/reliability.md).
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from contextlib import suppress

from mlx_ep.comm.control.frames import RefusedError, Session
from mlx_ep.comm.control.meeting import SECRET, secret_key

MOST_STRANGERS = 128  # heard at the same time; the oldest makes room
PIECE = 1 << 20  # bytes of a message in one frame
MOST_MESSAGE = 256 << 20  # bytes
_MORE, _LAST = b"\1", b"\0"


def run_key(token: str) -> bytes:
    """The secret of connections whose token rank 0 has sent to all."""
    return secret_key(os.environ.get(SECRET, "")) + token.encode()


class SealedLink:
    """One side of a connection between two ranks of a run.

    Args:
        peer: connected; `session` has shown that the other side is a rank.
        session: of this connection.
        rank: of the other side.
        texts: of frames that came with the greeting.
    """

    def __init__(
        self, peer: socket.socket, session: Session, rank: int, texts: list[bytes]
    ) -> None:
        self.rank = rank
        self._peer, self._session, self._texts = peer, session, texts
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
        peer.sendall(session.seal_bytes(str(rank).encode()))
        while not texts:
            texts = session.receive_bytes(_some(peer))
    except OSError:
        peer.close()
        raise
    except RefusedError as error:
        peer.close()
        raise ConnectionError(f"what answers is not rank 0: {error}") from error
    return SealedLink(peer, session, 0, texts[1:])


def links_to_others(
    listener: socket.socket, key: bytes, size: int, limit: float
) -> list[SealedLink]:
    """Rank 0's side: to ranks 1, 2, ... in this order. The listener is closed.

    Args:
        size: the number of ranks.
        limit: seconds for all of them.

    Raises:
        TimeoutError: some have not come.
    """
    door = _Door(listener, key, set(range(1, size)))
    deadline = time.monotonic() + limit
    try:
        while door.missing and (left := deadline - time.monotonic()) > 0:
            door.turn(left)
    finally:
        door.close()
    if door.missing:
        for link in door.links:
            link.close()
        names = ", ".join(map(str, sorted(door.missing)))
        raise TimeoutError(f"rank {names} did not connect within {limit:g} s")
    return sorted(door.links, key=lambda link: link.rank)


class _Door:
    """Who has come and has not shown yet that it is a rank."""

    def __init__(self, listener: socket.socket, key: bytes, missing: set[int]) -> None:
        self.missing, self.links = missing, list[SealedLink]()
        self._key, self._listener = key, listener
        self._guests: dict[socket.socket, Session] = {}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def turn(self, seconds: float) -> None:
        """Hear whoever says something within `seconds`."""
        for found, _ in self._selector.select(seconds):
            if found.fileobj is self._listener:
                self._admit()
            elif (guest := found.fileobj) in self._guests:
                assert isinstance(guest, socket.socket)
                try:
                    self._hear(guest)
                except (OSError, RefusedError):
                    self._drop(guest)

    def close(self) -> None:
        for guest in list(self._guests):
            self._drop(guest)
        self._selector.close()
        self._listener.close()

    def _admit(self) -> None:
        with suppress(OSError):  # it is gone already
            guest, _ = self._listener.accept()
            guest.setblocking(False)
            if len(self._guests) >= MOST_STRANGERS:
                self._drop(next(iter(self._guests)))
            self._guests[guest] = Session(self._key, is_server=True)
            self._selector.register(guest, selectors.EVENT_READ)

    def _hear(self, guest: socket.socket) -> None:
        """Raises:
        OSError, RefusedError: it is no rank.
        """
        session = self._guests[guest]
        was_open = session.is_open
        texts = session.receive_bytes(_some(guest))
        if session.is_open and not was_open:
            guest.sendall(session.opening)
        if not texts:
            return
        rank = int(texts[0])
        if rank not in self.missing:
            raise RefusedError("it is a rank that is here already")
        self.missing.remove(rank)
        del self._guests[guest]
        self._selector.unregister(guest)
        guest.setblocking(True)
        guest.sendall(session.seal_bytes(b"welcome"))
        self.links.append(SealedLink(guest, session, rank, texts[1:]))

    def _drop(self, guest: socket.socket) -> None:
        del self._guests[guest]
        self._selector.unregister(guest)
        guest.close()


def _some(peer: socket.socket) -> bytes:
    """Raises:
    OSError: the connection has ended.
    """
    data = peer.recv(1 << 12)
    if not data:
        raise ConnectionError("the connection was closed")
    return data
