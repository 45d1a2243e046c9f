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

from mlx_ep.comm import (
    Comm,
    Entrance,
    SealedLink,
    broadcast_object,
    gather_objects,
    host_id,
    link_to_rank_0,
    raise_problems,
    rank_0_addresses,
    run_key,
)

CONNECT_LIMIT = 10.0  # s
_RING = b"!"
_SIZE = struct.Struct("<I")
TRIED = 20  # times that `gather` is timed
SLOW_GATHER = 1e-3  # s; from here on the network between the hosts is another one


class Doorbell:
    """A connection of every rank to rank 0; every rank makes one at the same time.

    What travels is authenticated (`mlx_ep.comm.sealed`).

    Raises:
        ValueError: on every rank: one cannot reach rank 0.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._links: list[SealedLink] = []  # of rank 0 to all others, in their order
        if comm.size == 1:
            return
        is_one_host = len(set(gather_objects(comm, host_id()))) == 1
        entrance, place = None, None
        if comm.rank == 0:
            addresses = ("127.0.0.1",) if is_one_host else rank_0_addresses()
            entrance = Entrance(addresses)
            place = [list(addresses), entrance.port, secrets.token_hex(32)]
        place = broadcast_object(comm, place)
        problem = ""
        try:
            self._connect(entrance, *place)
        except OSError as error:
            problem = f"rank {comm.rank} has no connection to rank 0: {error}"
        raise_problems(gather_objects(comm, problem))

    def ring(self) -> None:
        """Rank 0: a step begins."""
        for link in self._links:
            with suppress(RuntimeError):  # who is gone ends all, by its watch
                link.send(_RING)

    def wait(self) -> None:
        """Another rank: until rank 0 rings.

        Raises:
            RuntimeError: rank 0 is gone.
        """
        if self._links[0].receive() != _RING:
            raise RuntimeError("rank 0 is at another step.")

    def gather(self, data: bytes) -> list[bytes]:
        """What every rank has given, on all ranks, in their order; all call it alike.

        Raises:
            RuntimeError: a rank is gone.
        """
        if self._comm.rank:
            self._links[0].send(data)
            return _parts(self._links[0].receive(), self._comm.size)
        ordered = [data, *(link.receive() for link in self._links)]
        whole = b"".join(_SIZE.pack(len(part)) + part for part in ordered)
        for link in self._links:
            link.send(whole)
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

    def close(self) -> None:
        for link in self._links:
            link.close()

    def _connect(
        self,
        entrance: Entrance | None,
        addresses: list[str],
        port: int,
        token: str,
    ) -> None:
        """Raises:
        OSError: a rank and rank 0 do not meet.
        """
        key, size = run_key(token), self._comm.size
        if entrance is not None:
            self._links = entrance.links(key, size, CONNECT_LIMIT)
        else:
            self._links = [_reach(addresses, port, key, self._comm.rank)]


def _reach(addresses: list[str], port: int, key: bytes, rank: int) -> SealedLink:
    """To rank 0 at the first address where it answers.

    Hosts may have an address in common, such as that of a bridge between containers,
    where another program listens, or this host itself.

    Raises:
        OSError: rank 0 answers nowhere.
    """
    problem: OSError | None = None
    for address in addresses:
        try:
            limit = CONNECT_LIMIT / len(addresses)
            peer = socket.create_connection((address, port), limit)
            return link_to_rank_0(peer, key, rank)
        except OSError as error:
            problem = error
    raise problem or OSError("rank 0 has no address")


def _parts(whole: bytes, num_ranks: int) -> list[bytes]:
    parts, at = [], 0
    for _ in range(num_ranks):
        size: int = _SIZE.unpack_from(whole, at)[0]
        at += _SIZE.size
        parts.append(whole[at : at + size])
        at += size
    return parts
