"""What ranks tell each other arrives as it was."""

from __future__ import annotations

import socket
import sys

import mlx.core as mx
import msgpack
import pytest

from mlx_ep.comm import GroupComm
from mlx_ep.server import doorbell
from mlx_ep.server.doorbell import Doorbell
from mlx_ep.server.messages import (
    INLINE,
    Details,
    DrawnHere,
    StepExchange,
    decode,
    encode,
)
from mlx_ep.server.prefix_cache import PrefixHit
from mlx_ep.server.requests import Request, Sampling
from mlx_ep.server.scheduler import Decision, Enter
from tests.support.ranks import run_ranks

SAMPLING = Sampling(temperature=0.5, seed=2**63 + 1, logit_bias={7: -1.5})
REQUEST = Request("é", (1, 2**27, 3), 9, SAMPLING, ((1, 2), (3,)), "start: /a/")
DETAILS: Details = {3: (-0.5, ((1, -0.5), (2, -3.0)), ""), 0: (None, (), "no")}
DECISIONS = [
    Decision(),
    Decision(stop=True),
    Decision(
        [3, 1], [Enter(2, 1, REQUEST, PrefixHit(5, 2))], {0: [(2, 7)]}, False, "dump",
    ),
    Decision(enter=[Enter(0, 0, Request("long", tuple(range(9000)), 1), None)]),
]  # fmt: skip


@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize("details", [{}, DETAILS], ids=["", "details"])
def test_a_payload_travels_as_data(decision: Decision, details: Details) -> None:
    payload = encode(decision, details)
    assert decode(payload) == (decision, details)
    assert (payload == b"") == (decision == Decision() and not details)
    if payload:
        assert isinstance(msgpack.unpackb(payload, strict_map_key=False), list)


def test_tokens_status_and_payloads_of_every_rank() -> None:
    rows = run_ranks(3, _tell)
    assert rows[0] == rows[1] == rows[2]
    for size, (heard, words) in zip((0, INLINE, INLINE + 1), rows[0], strict=True):
        for rank, told in enumerate(heard):
            assert told.status == [rank, 2, 2**31 - 1]
            assert told.tokens == {rank: 0, 3: 2**28 + rank}
            # Only rank 1 has more to say than fits.
            assert told.payload == bytes([rank]) * (size if rank == 1 else 5)
        assert words == [0, 0, 1, 2**28 + 3, 0, 0]  # of rank 2


def test_ranks_that_exchange_nothing_tell_the_same_over_sockets() -> None:
    """The long payload needs no second turn; a rank's own words are not waited for."""
    rows = run_ranks(3, _tell, True)
    assert [heard for heard, _ in rows[0]] == [heard for heard, _ in rows[2]]
    for rank, told in enumerate(rows):
        for size, (heard, words) in zip((0, INLINE, INLINE + 1), told, strict=True):
            assert [h.status[0] for h in heard] == [0, 1, 2]
            assert heard[1].payload == bytes([1]) * size
            assert heard[2].tokens == {2: 0, 3: 2**28 + 2}
            assert words[rank] == 1 and words[3] == 2**28 + rank + 1


@pytest.mark.skipif(sys.platform != "linux", reason="it has one loopback address")
def test_ranks_of_several_hosts_meet_at_rank_0s_own_address() -> None:
    """Each rank is a host with an address of its own; nobody listens at 127.0.0.1."""
    ranks = run_ranks(3, _tell_from_hosts)
    assert [told for told, _ in ranks] == [[[b"0"], [b"1" * 2**17], [b"2"]]] * 3
    ends = [set(ends) for _, ends in ranks]
    assert ends[0] == {("127.0.0.2", "127.0.0.3"), ("127.0.0.2", "127.0.0.4")}
    assert ends[1:] == [{("127.0.0.3", "127.0.0.2")}, {("127.0.0.4", "127.0.0.2")}]


def _tell_from_hosts(group: mx.distributed.Group) -> tuple[object, list[object]]:
    """What all have told, and both ends of every connection."""
    rank, create = group.rank(), socket.create_connection
    own = f"127.0.0.{rank + 2}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doorbell, "host_id", lambda: f"host {rank}")
        patch.setattr(doorbell, "rank_0_addresses", lambda: (own,))
        patch.setattr(
            socket,
            "create_connection",
            lambda address, limit: create(address, limit, (own, 0)),
        )
        bell = Doorbell(GroupComm(group))
    if rank == 0:
        bell.ring()
    else:
        bell.wait()
    told = bell.gather(str(rank).encode() * (2**17 if rank == 1 else 1))
    ends: list[object] = [
        (link._peer.getsockname()[0], link._peer.getpeername()[0])
        for link in bell._links
    ]
    bell.close()
    return [[part] for part in told], ends


def _tell(group: mx.distributed.Group, by_sockets: bool = False) -> list[object]:
    rank, comm = group.rank(), GroupComm(group)
    bell = Doorbell(comm) if by_sockets else None
    exchange = StepExchange(comm, 6, bell and bell.gather)
    of_rank = rank if by_sockets else 2
    told = []
    for size in (0, INLINE, INLINE + 1):
        drawn = DrawnHere((3, rank), mx.array([2**28 + rank, 0], mx.int32))
        payload = bytes([rank]) * (size if rank == 1 else 5)
        sent = exchange.send(drawn, [rank, 2, 2**31 - 1], payload)
        told.append((exchange.receive(sent), exchange.words(sent, of_rank).tolist()))
    if bell is not None:
        bell.close()
    return told
