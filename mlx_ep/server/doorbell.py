"""How ranks without work wait: in a read of a socket, until rank 0 rings.

A collective would be waited for too, but MPI and JACCL do that with a whole core, and
the limit of a step would count. Here a waiting rank costs nothing and is awake within
the time of one small packet.

Ranks whose layers exchange nothing tell each other what they drew in the same way
(`gather`): so a rank whose sequences are few waits without taking a core from others.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from contextlib import suppress

import psutil

from mlx_ep.comm import Comm, broadcast_object, gather_objects, host_id, raise_problems

CONNECT_LIMIT = 10.0  # s, for each address
_RING = b"!"
_SIZE = struct.Struct("<I")
TRIED = 20  # times that `gather` is timed
SLOW_GATHER = 1e-3  # s; from here on the network between the hosts is another one


class Doorbell:
    """A connection of every rank to rank 0; every rank makes one at the same time.

    Raises:
        ValueError: on every rank: one cannot reach rank 0.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._peers: list[socket.socket] = []
        if comm.size == 1:
            return
        is_one_host = len(set(gather_objects(comm, host_id()))) == 1
        listener, place = None, None
        if comm.rank == 0:
            addresses = ["127.0.0.1"] if is_one_host else _own_addresses()
            bound = addresses[0] if is_one_host else ""
            listener = socket.create_server((bound, 0), backlog=comm.size)
            listener.settimeout(CONNECT_LIMIT)
            token = secrets.token_hex(16)
            place = [addresses, listener.getsockname()[1], token]
        place = broadcast_object(comm, place)
        problem = ""
        try:
            self._connect(listener, *place)
        except OSError as error:
            problem = f"rank {comm.rank} has no connection to rank 0: {error}"
        raise_problems(gather_objects(comm, problem))

    def ring(self) -> None:
        """Rank 0: a step begins."""
        for peer in self._peers:
            with suppress(OSError):  # who is gone ends all, by its watch
                peer.sendall(_RING)

    def wait(self) -> None:
        """Another rank: until rank 0 rings.

        Raises:
            RuntimeError: rank 0 is gone.
        """
        if self._peers[0].recv(1) != _RING:
            raise RuntimeError("rank 0 has closed its connection.")

    def gather(self, data: bytes) -> list[bytes]:
        """What every rank has given, on all ranks, in their order; all call it alike.

        Raises:
            RuntimeError: a rank is gone.
        """
        if self._comm.rank:
            self._send(self._peers[0], data)
            rank_0 = self._peers[0]
            return [_frame(rank_0) for _ in range(self._comm.size)]
        parts = {0: data}
        for peer in self._peers:  # accepted in any order
            rank: int = _SIZE.unpack(_exactly(peer, _SIZE.size))[0]
            parts[rank] = _frame(peer)
        ordered = [parts[rank] for rank in range(self._comm.size)]
        whole = b"".join(_SIZE.pack(len(part)) + part for part in ordered)
        for peer in self._peers:
            with suppress(OSError):  # likewise
                peer.sendall(whole)
        return ordered

    def gather_seconds(self) -> float:
        """What `gather` takes, the median of some; the same number on every rank."""
        taken = []
        for _ in range(TRIED):
            start = time.perf_counter()
            self.gather(bytes(1024))
            taken.append(time.perf_counter() - start)
        seconds: float = broadcast_object(self._comm, sorted(taken)[TRIED // 2])
        return seconds

    def _send(self, peer: socket.socket, data: bytes) -> None:
        """Raises:
        RuntimeError: rank 0 is gone.
        """
        head = _SIZE.pack(self._comm.rank) + _SIZE.pack(len(data))
        try:
            peer.sendall(head + data)
        except OSError as error:
            raise RuntimeError(f"rank 0 has closed its connection: {error}") from error

    def close(self) -> None:
        for peer in self._peers:
            peer.close()

    def _connect(
        self,
        listener: socket.socket | None,
        addresses: list[str],
        port: int,
        token: str,
    ) -> None:
        """Raises:
        OSError: a rank and rank 0 do not meet.
        """
        if listener is None:
            self._peers = [_reach(addresses, port)]
            self._peers[0].sendall(token.encode())
        else:
            with listener:
                while len(self._peers) < self._comm.size - 1:
                    peer, _ = listener.accept()
                    peer.settimeout(CONNECT_LIMIT)
                    if _received(peer, len(token)) == token.encode():
                        self._peers.append(peer)
                    else:
                        peer.close()
        for peer in self._peers:
            peer.settimeout(None)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _reach(addresses: list[str], port: int) -> socket.socket:
    problem: OSError | None = None
    for address in addresses:
        try:
            return socket.create_connection((address, port), CONNECT_LIMIT)
        except OSError as error:
            problem = error
    raise problem or OSError("rank 0 has no address")


def _received(peer: socket.socket, size: int) -> bytes:
    text = b""
    with suppress(OSError):
        while len(text) < size and (more := peer.recv(size - len(text))):
            text += more
    return text


def _frame(peer: socket.socket) -> bytes:
    """The length of a text, and the text."""
    return _exactly(peer, _SIZE.unpack(_exactly(peer, _SIZE.size))[0])


def _exactly(peer: socket.socket, size: int) -> bytes:
    """Raises:
    RuntimeError: the connection has ended before.
    """
    text = bytearray()
    try:
        while len(text) < size and (more := peer.recv(size - len(text))):
            text += more
    except OSError as error:
        raise RuntimeError(f"a rank has closed its connection: {error}") from error
    if len(text) < size:
        raise RuntimeError("a rank has closed its connection.")
    return bytes(text)


def _own_addresses() -> list[str]:
    """This host's IPv4 addresses, the loopback left out."""
    entries = [e for found in psutil.net_if_addrs().values() for e in found]
    found = {e.address for e in entries if e.family == socket.AF_INET}
    return sorted(a for a in found if not a.startswith("127."))
