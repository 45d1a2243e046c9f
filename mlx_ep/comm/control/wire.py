"""Connections between watches: one end each, and the listener that lets ranks in.

A stranger costs a line of the log, whatever it does: nobody waits for it, its bytes are
bounded, and so is the number of those who have not shown yet that they know the secret.
"""

from __future__ import annotations

import resource
import selectors
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mlx_ep.comm.control.frames import MOST, RefusedError, Session

HELLO_LIMIT = 3.0  # seconds for a newcomer to show that it is a rank
SILENCE_HERE = 60.0  # seconds, of a process on this host
MOST_NEWCOMERS = 128  # at once; one of the address that has most of them goes first
ACCEPTED_AT_ONCE = 64  # before the ranks that are in have their turn again


def serve(selector: selectors.BaseSelector, seconds: float) -> None:
    """Calls what is registered for each socket that is ready, within some seconds."""
    for key, _ in selector.select(seconds):
        # One that an earlier call of this round closed has no number any more, or its
        # number is that of a new one: what is registered now is looked up by number.
        if selector.get_map().get(key.fd) is key:
            key.data()


class Wire:
    """One end of a connection, which never blocks."""

    def __init__(
        self, connection: socket.socket, secret: bytes, is_server: bool
    ) -> None:
        connection.setblocking(False)
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.is_here = is_here(connection)
        self.session = Session(secret, is_server)
        self.started = time.monotonic()
        self.silent = 0.0  # seconds without a word, as the watch counts them
        self.is_gone = False
        self._out = bytearray(self.session.opening)

    def patience(self, silence: float) -> float:
        """Seconds without a word after which the other end is taken for gone.

        Args:
            silence: where a host or a network can go away; on one host neither can, and
                a process that got no time for so long is an overloaded host's.
        """
        return max(silence, SILENCE_HERE) if self.is_here else silence

    @property
    def has_unsent(self) -> bool:
        return bool(self._out) and not self.is_gone

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message as soon as it can; nothing to a peer that is gone."""
        if self.is_gone or len(self._out) > MOST:
            return  # it has not read for long: its silence will end it
        self._out += self.session.seal(message)
        self.flush()

    def flush(self) -> None:
        """Sends what the network takes now."""
        while self.has_unsent:
            try:
                sent = self.socket.send(self._out)
            except BlockingIOError:
                return
            except OSError:  # found on reading, where the peer's last words come first
                self._out.clear()
                return
            del self._out[:sent]

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived; `is_gone` says whether more can come.

        Raises:
            RefusedError: as `Session.receive`.
        """
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError:  # reset: like an end
            data = b""
        if not data:
            self.is_gone = True
            return []
        self.silent = 0.0
        was_open = self.session.is_open
        messages = self.session.receive(data)
        if self.session.is_open and not was_open:
            self._out += self.session.opening if not self._is_client() else b""
            self.flush()
        return messages

    def close(self) -> None:
        self.is_gone = True
        self.socket.close()

    def _is_client(self) -> bool:
        return not self.session._is_server


class Door:
    """Where the watch of rank 0 lets the others in.

    Args:
        addresses: where to listen; the ports are tried in turn, 0 is any.
        on_hello: gets the wire of each newcomer that knows the secret, and what it
            said, its hello first.
        log: gets a line for the first stranger and one for all at the end.

    Raises:
        OSError: no port of an address is free.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        addresses: tuple[str, ...],
        ports: tuple[int, ...],
        on_hello: Callable[[Wire, list[dict[str, Any]]], None],
        log: Callable[[str], None],
    ) -> None:
        self._selector = selector
        self._on_hello, self._log = on_hello, log
        self._secret = b""
        self._newcomers: deque[tuple[Wire, str]] = deque()
        self._strangers: Counter[str] = Counter()
        self._listeners: list[socket.socket] = []
        self.port = 0
        try:
            for address in addresses:
                listener = _listen(address, (self.port,) if self.port else ports)
                self.port = listener.getsockname()[1]
                self._listeners.append(listener)
        except OSError:
            self.close()
            raise

    def open(self, secret: bytes) -> None:
        """Lets those in who know the secret."""
        self._secret = secret
        for listener in self._listeners:
            self._selector.register(
                listener, selectors.EVENT_READ, lambda it=listener: self._accept(it)
            )

    def tick(self) -> None:
        """Turns those away who took too long."""
        now = time.monotonic()
        while self._newcomers and now - self._newcomers[0][0].started > HELLO_LIMIT:
            self._turn_away(*self._newcomers[0], "it said nothing of use in time")
        for wire, _ in self._newcomers:
            wire.flush()

    def close(self) -> None:
        for listener in self._listeners:
            with suppress(KeyError, ValueError):
                self._selector.unregister(listener)
            listener.close()
        self._listeners.clear()
        for wire, address in list(self._newcomers):
            self._turn_away(wire, address, "all ranks are here")
        if sum(self._strangers.values()) > 1:
            self._log(
                f"turned away {sum(self._strangers.values())} connections of strangers "
                f"from {', '.join(sorted(self._strangers)[:8])}"
            )
        self._strangers.clear()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, origin = listener.accept()
            except (
                OSError
            ):  # nobody waits, or it left already, or no descriptor is left
                return
            wire = Wire(connection, self._secret, is_server=True)
            if len(self._newcomers) >= MOST_NEWCOMERS:
                busiest = Counter(address for _, address in self._newcomers)
                most = busiest.most_common(1)[0][0]
                oldest = next(it for it in self._newcomers if it[1] == most)
                self._turn_away(*oldest, "too many came at once")
            self._newcomers.append((wire, origin[0]))
            self._selector.register(
                connection,
                selectors.EVENT_READ,
                lambda wire=wire, address=origin[0]: self._hear(wire, address),
            )

    def _hear(self, wire: Wire, address: str) -> None:
        try:
            messages = wire.receive()
        except RefusedError as error:
            self._turn_away(wire, address, str(error))
            return
        if wire.is_gone:
            self._turn_away(wire, address, "it left without a word")
        elif messages:
            self._newcomers.remove((wire, address))
            self._selector.unregister(wire.socket)
            self._on_hello(wire, messages)

    def _turn_away(self, wire: Wire, address: str, why: str) -> None:
        self._newcomers.remove((wire, address))
        self._selector.unregister(wire.socket)
        wire.close()
        if not self._strangers:
            self._log(f"turned away a connection from {address}: {why}")
        self._strangers[address] += 1


def is_here(connection: socket.socket) -> bool:
    """Whether both ends are on this host; known once it is connected."""
    with suppress(OSError):
        return bool(connection.getpeername()[0] == connection.getsockname()[0])
    return False


def _listen(address: str, ports: tuple[int, ...]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    problem: OSError | None = None
    for port in ports:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(1024)
        except OSError as error:
            listener.close()
            problem = error
            continue
        listener.setblocking(False)
        return listener
    assert problem is not None
    raise problem


def allow_newcomers() -> None:
    """Lets this process have more connections than a door lets in at once."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 1024 if most == resource.RLIM_INFINITY else min(most, 1024)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, most))
