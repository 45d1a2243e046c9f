"""What ranks tell each other arrives as it was."""

from __future__ import annotations

import mlx.core as mx
import msgpack
import pytest

from mlx_ep.comm import GroupComm
from mlx_ep.server.messages import (
    INLINE,
    StepExchange,
    decode_decision,
    decode_details,
    encode_decision,
    encode_details,
)
from mlx_ep.server.prefix_cache import PrefixHit
from mlx_ep.server.requests import Request, Sampling
from mlx_ep.server.scheduler import Decision, Enter
from tests.support.ranks import run_ranks

SAMPLING = Sampling(temperature=0.5, seed=2**63 + 1, logit_bias={7: -1.5})
REQUEST = Request("é", (1, 2**27, 3), 9, SAMPLING, ((1, 2), (3,)), "start: /a/")
DECISIONS = [
    Decision(),
    Decision(stop=True),
    Decision(
        [3, 1], [Enter(2, 1, REQUEST, PrefixHit(5, 2))], {0: [(2, 7)]}, False, "dump",
    ),
    Decision(enter=[Enter(0, 0, Request("long", tuple(range(9000)), 1), None)]),
]  # fmt: skip


@pytest.mark.parametrize("decision", DECISIONS)
def test_a_decision_travels_as_data(decision: Decision) -> None:
    payload = encode_decision(decision)
    assert decode_decision(payload) == decision
    assert payload == b"" or isinstance(
        msgpack.unpackb(payload, strict_map_key=False), list
    )


def test_details_travel() -> None:
    details = {3: (-0.5, ((1, -0.5), (2, -3.0)), ""), 0: (None, (), "no")}
    assert decode_details(encode_details(details)) == details
    assert encode_details({}) == b""


def test_tokens_reasons_and_payloads_of_every_rank() -> None:
    rows = run_ranks(3, _tell)
    assert rows[0] == rows[1] == rows[2]
    for size, heard in zip((0, INLINE, INLINE + 1), rows[0], strict=True):
        for rank, told in enumerate(heard):
            assert told.status == [rank, 2, 2**31 - 1]
            assert told.tokens == {
                rank: (0, None), 3: (2**28 - 2, "stop"), 4: (5, "length"),
                5: (rank, "error"),
            }  # fmt: skip
            # Only rank 1 has more to say than fits.
            assert told.payload == bytes([rank]) * (size if rank == 1 else 5)


def _tell(group: mx.distributed.Group) -> list[object]:
    rank = group.rank()
    exchange = StepExchange(GroupComm(group), 6)
    tokens = {
        rank: (0, None), 3: (2**28 - 2, "stop"), 4: (5, "length"), 5: (rank, "error"),
    }  # fmt: skip
    return [
        exchange(tokens, [rank, 2, 2**31 - 1], bytes([rank]) * (n if rank == 1 else 5))
        for n in (0, INLINE, INLINE + 1)
    ]
