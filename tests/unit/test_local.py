"""Strategy `local`: every rank has every expert, and nothing is sent."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_ep.api.install import _computes_as_one
from mlx_ep.comm import GroupComm
from mlx_ep.config import EPConfig
from mlx_ep.exchange import (
    STRATEGIES,
    CountedComm,
    ExchangeRequest,
    ExchangeShape,
    ExchangeTraffic,
    Local,
    backend_line,
    layer_traffic,
    sends_nothing,
)
from mlx_ep.metrics import Counters
from mlx_ep.moe import ExpertGroup
from mlx_ep.placement import Placement, everywhere
from mlx_ep.types import Routing, TokenCounts


def test_local_sends_nothing_and_takes_the_ranks_own_copies() -> None:
    """Slots out of order, -1 stays -1, and a rank that lacks experts is refused."""
    copied = Placement(((0, 1, 2), (2, 0, 1)))
    assert copied.is_everywhere
    assert everywhere(3, 2).has_all_in_order(1)

    comm = CountedComm(GroupComm(mx.distributed.init()), Counters())
    comm.rank = 1
    routing = Routing(mx.array([[0, 2], [1, -1]]), mx.ones((2, 2)))
    request = ExchangeRequest(routing, copied, comm, mx.float32)
    for name in ("local", "auto"):
        strategy = STRATEGIES.create(EPConfig(strategy=name))
        assert sends_nothing(strategy, copied)
        exchange = strategy.exchange(request)
        rows = exchange.dispatch(mx.ones((2, 4)))
        assert rows.slot_ids.tolist() == [[1, 0], [2, -1]]
        assert exchange.combine(rows.x) is rows.x
    assert comm.counters.collectives == 0
    shape = ExchangeShape(tokens=TokenCounts((3, 1)), width=64, top_k=2, itemsize=2)
    assert layer_traffic(Local(), shape) == ExchangeTraffic((), 3)
    shared = Placement.contiguous(3, 2)
    assert not sends_nothing(STRATEGIES.create(EPConfig(strategy="auto")), shared)
    with pytest.raises(ValueError, match=r"all 3 experts .* they have 2, 1\. Use"):
        ExpertGroup.from_config(comm, shared, EPConfig(strategy="local"))


def test_no_expert_is_apart_from_another() -> None:
    line = backend_line(EPConfig(strategy="local"), 2)
    assert line == "MoE EP backend: disabled  TP=1  DP=2  EP=1"


@pytest.mark.parametrize(
    ("strategy", "experts", "expected"),
    [
        ("local", ((0, 1, 2), (0, 1, 2)), True),
        ("auto", ((0, 1, 2), (0, 1, 2)), True),
        ("local", ((0, 1, 2), (2, 0, 1)), False),
        ("auto", ((0, 1), (2,)), False),
        ("gathered", ((0, 1, 2), (0, 1, 2)), False),
    ],
)
def test_ranks_that_run_their_experts_as_one_rank_alone(
    strategy: str, experts: tuple[tuple[int, ...], ...], expected: bool
) -> None:
    """Then what runs the experts is tried with complete rows, as on one rank."""
    chosen = STRATEGIES.create(EPConfig(strategy=strategy))
    assert _computes_as_one(chosen, Placement(experts)) is expected
