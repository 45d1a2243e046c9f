"""What ranks tell each other arrives as it was."""

from __future__ import annotations

import mlx.core as mx
import msgpack
import pytest

from mlx_ep.comm import GroupComm
from mlx_ep.server.doorbell import Doorbell
from mlx_ep.server.messages import INLINE, Details, StepExchange, decode, encode
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


def _tell(group: mx.distributed.Group, by_sockets: bool = False) -> list[object]:
    rank, comm = group.rank(), GroupComm(group)
    bell = Doorbell(comm) if by_sockets else None
    exchange = StepExchange(comm, 6, bell and bell.gather)
    of_rank = rank if by_sockets else 2
    told = []
    for size in (0, INLINE, INLINE + 1):
        words = mx.zeros(6, mx.int32)
        words[rank], words[3] = 1, 2**28 + rank + 1
        payload = bytes([rank]) * (size if rank == 1 else 5)
        sent = exchange.send(words, [rank, 2, 2**31 - 1], payload)
        told.append((exchange.receive(sent), exchange.words(sent, of_rank).tolist()))
    if bell is not None:
        bell.close()
    return told
