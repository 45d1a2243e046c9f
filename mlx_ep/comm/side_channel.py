"""The connections beside the group, over which ranks learn of each other's end.

They are TCP, in a star around rank 0, where every other rank has one connection:

    rank 1 --- rank 0 --- rank 3
                 |
               rank 2

What travels are lines of JSON, each an object with a kind; what they mean is up to
`mlx_ep.comm.liveness`. Rank 0 listens and gives all ranks an invitation by the one
collective used here: its addresses, its port and two random tokens. A rank tries the
addresses, those on its own subnets first, and says hello with its number and the first
token; rank 0 answers welcome with the second. So neither takes a stranger, such as
another service at the same private address, for a rank of this run.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import psutil

OPEN_TIMEOUT = 10.0  # for all ranks to connect, once rank 0 has said where
CONNECT_TIMEOUT = 1.0  # for one address; on the wrong subnet nobody answers
INVITATION_SIZE = 1024  # bytes for rank 0's addresses, port and tokens


@dataclass
class Peer:
    """A rank at the other end of a connection; `missed` counts beats without a word."""

    rank: int
    socket: socket.socket
    buffer: bytes = b""
    missed: int = 0

    def send(self, **message: object) -> None:
        """Sends one message, or nothing if the peer is gone."""
        # That is found on reading, where the peer's last message comes first.
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that are complete by now; None once the connection has ended."""
        try:
            data = self.socket.recv(65536)
        except OSError:  # reset: like an end
            data = b""
        if not data:
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]


def open_star(group: mx.distributed.Group) -> Iterator[Peer]:
    """Connects the ranks of a group, each of which must run through it.

    Yields:
        On rank 0 every other rank once it has connected, elsewhere rank 0.

    Raises:
        RuntimeError: A rank could not be connected.
    """
    if group.rank() != 0:
        yield connect(_share_invitation(group, {}), group.rank())
        return
    with socket.create_server(("", 0)) as listener:
        invitation = {
            "addresses": [i.ip.compressed for i in _interfaces()][:32],
            "port": listener.getsockname()[1],
            "tokens": [secrets.token_hex(16), secrets.token_hex(16)],
        }
        yield from _accept_all(
            listener, _share_invitation(group, invitation), group.size()
        )


def connect(invitation: dict[str, Any], rank: int) -> Peer:
    """Finds rank 0 at one of its addresses: own subnets first, only with its token.

    Raises:
        RuntimeError: Rank 0 was at none of them.
    """
    own = [interface.network for interface in _interfaces()]
    addresses = sorted(
        map(ipaddress.IPv4Address, invitation["addresses"]),
        key=lambda address: not any(address in network for network in own),
    )
    for address in addresses:
        with suppress(OSError):
            connection = socket.create_connection(
                (str(address), invitation["port"]), timeout=CONNECT_TIMEOUT
            )
            peer = Peer(0, connection)
            peer.send(kind="hello", rank=rank, token=invitation["tokens"][0])
            if _receive_line(connection).get("token") == invitation["tokens"][1]:
                return peer
            connection.close()
    raise RuntimeError(
        f"[comm] rank {rank} could not reach rank 0 on TCP port {invitation['port']} "
        f"of {', '.join(invitation['addresses'])}; is a firewall on?"
    )


def hang_up(peers: Iterable[Peer], seconds: float) -> None:
    """Waits until each peer has read what was sent and hung up as well.

    To leave at once with data unread would reset the connection, and a reset may throw
    away what the peer has not read yet.

    Args:
        peers: The peers; nothing is sent to them any more.
        seconds: The longest wait for all of them together.
    """
    deadline = time.monotonic() + seconds
    peers = list(peers)
    for peer in peers:
        with suppress(OSError):
            peer.socket.shutdown(socket.SHUT_WR)
    for peer in peers:
        with suppress(OSError):
            peer.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            while peer.socket.recv(65536) and time.monotonic() < deadline:
                pass


def _share_invitation(
    group: mx.distributed.Group, invitation: dict[str, Any]
) -> dict[str, Any]:
    """Gives every rank what rank 0 knows, by the one collective used here."""
    data = json.dumps(invitation).encode() if invitation else b""
    assert len(data) <= INVITATION_SIZE
    # int32 rather than uint8: an integer that every backend surely sums.
    padded = mx.array([*data, *[0] * (INVITATION_SIZE - len(data))], mx.int32)
    total = mx.distributed.all_sum(padded, group=group)
    # sync: once per run, at its start.
    received = bytes(total.tolist()).rstrip(b"\0")  # type: ignore[arg-type]
    shared: dict[str, Any] = json.loads(received)
    return shared


def _accept_all(
    listener: socket.socket, invitation: dict[str, Any], num_ranks: int
) -> Iterator[Peer]:
    """Rank 0: lets each other rank in once, and turns strangers away."""
    missing = set(range(1, num_ranks))
    deadline = time.monotonic() + OPEN_TIMEOUT
    while missing:
        listener.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise RuntimeError(
                f"[comm] of {num_ranks} ranks, {sorted(missing)} did not "
                f"connect to rank 0 within {OPEN_TIMEOUT:g} s (TCP port "
                f"{invitation['port']} of {', '.join(invitation['addresses'])}); "
                "is a firewall on?"
            ) from None
        hello = _receive_line(connection)
        rank = hello.get("rank")
        if hello.get("token") != invitation["tokens"][0] or rank not in missing:
            connection.close()
            continue
        peer = Peer(rank, connection)
        peer.send(kind="welcome", token=invitation["tokens"][1])
        missing.remove(rank)
        yield peer


def _receive_line(connection: socket.socket) -> dict[str, Any]:
    """The first message of a connection; empty if it is none of ours."""
    connection.settimeout(CONNECT_TIMEOUT)
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < 256:
            byte = connection.recv(1)  # one by one: what follows is not for us
            if not byte:
                return {}
            line += byte
        message = json.loads(line)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _interfaces() -> list[ipaddress.IPv4Interface]:
    """This host's IPv4 addresses with their subnets, loopback first."""
    found = [
        ipaddress.IPv4Interface(f"{entry.address}/{entry.netmask or 32}")
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    return sorted(found, key=lambda interface: not interface.ip.is_loopback)
