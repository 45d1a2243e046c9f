"""How the watch of another rank finds that of rank 0, without ever waiting for it."""

from __future__ import annotations

import errno
import itertools
import os
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mlx_ep.comm.control.frames import RefusedError
from mlx_ep.comm.control.meeting import Meeting, read_meeting
from mlx_ep.comm.control.wire import Wire, is_here

ATTEMPT = 2.0  # seconds for one address; on the wrong subnet nobody answers
PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5)  # seconds between attempts, the last again


class Seeker:
    """Tries the addresses of a meeting in turn until rank 0 has answered.

    Args:
        hello: what this rank says first.
        on_welcome: gets the wire to rank 0, and what that said after its welcome.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        meeting: Meeting,
        hello: dict[str, Any],
        on_welcome: Callable[[Wire, list[dict[str, Any]]], None],
    ) -> None:
        self._selector, self._meeting = selector, meeting
        self._hello, self._on_welcome = hello, on_welcome
        self._wire: Wire | None = None
        self._attempts = itertools.count()
        self._next = 0.0
        self._is_connected = False
        self.trouble = "nobody has said yet where rank 0 is"

    def tick(self) -> None:
        """Goes on; called a few times a second."""
        now = time.monotonic()
        wire = self._wire
        # Once it has answered it may have taken us in: a second try would be two of us.
        is_unanswered = wire is not None and not wire.session.is_open
        if wire is not None and is_unanswered and now - wire.started > ATTEMPT:
            self._give_up("it did not answer")
        if self._wire is None and now >= self._next:
            self._try()

    def close(self) -> None:
        if self._wire is not None:
            self._give_up("")

    def _try(self) -> None:
        number = next(self._attempts)
        pause = PAUSES[min(number, len(PAUSES) - 1)]
        self._next = time.monotonic() + pause
        meeting = self._meeting
        addresses, ports = meeting.addresses, meeting.ports
        secret = bytes.fromhex(meeting.secret)
        if meeting.kind == "file":
            found = read_meeting(meeting.path)
            if found is None:
                self.trouble = "rank 0 has not started"
                return
            ports, secret = (found[0],), found[1]
        if not addresses or not secret:
            return
        places = list(itertools.product(addresses, ports))
        address, port = places[number % len(places)]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.setblocking(False)
        self._where = f"{address}:{port}"
        try:
            code = connection.connect_ex((address, port))
        except OSError as error:  # a name that nobody knows
            code = error.errno or errno.EINVAL
        if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            connection.close()
            self.trouble = f"{self._where}: {os.strerror(code)}"
            return
        self._wire = Wire(connection, secret, is_server=False)
        self._is_connected = False
        self._selector.register(connection, selectors.EVENT_WRITE, self._connected)

    def _connected(self) -> None:
        assert self._wire is not None
        code = self._wire.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._give_up(os.strerror(code))
            return
        self._wire.is_here = is_here(self._wire.socket)
        self._wire.flush()
        self._selector.modify(self._wire.socket, selectors.EVENT_READ, self._hear)

    def _hear(self) -> None:
        wire = self._wire
        assert wire is not None
        was_open = wire.session.is_open
        try:
            messages = wire.receive()
        except RefusedError as error:
            self._give_up(str(error))
            return
        if wire.session.is_open and not was_open:
            wire.send(self._hello)
        if wire.is_gone:
            self._give_up("it hung up")
        elif messages:
            self._selector.unregister(wire.socket)
            self._wire = None
            self._on_welcome(wire, messages[1:])

    def _give_up(self, why: str) -> None:
        assert self._wire is not None
        with suppress(KeyError, ValueError):
            self._selector.unregister(self._wire.socket)
        self._wire.close()
        self._wire = None
        self.trouble = f"{self._where}: {why}"
