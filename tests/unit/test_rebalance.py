"""When slots move, in one process: looks, plans, the order of moves, what is logged."""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_ep.api.install
from mlx_ep import EPConfig, Placement, parallelize
from mlx_ep.comm import GroupComm
from mlx_ep.moe import Rebalancer, RebalanceRule, RoutingRecorder
from mlx_ep.moe.rebalance import LOOK_EVERY
from mlx_ep.placement import Moves
from tests.support.tiny import QWEN3_MOE, make_model

E, LAYERS = 8, 3


class Model:
    """Layers of two ranks, whose passes all take the experts that they are told."""

    def __init__(self, rule: RebalanceRule) -> None:
        self.placements = [Placement.contiguous(E, 2)] * LAYERS
        self.placed: list[tuple[int, int]] = []  # (layer, transfers)
        self.recorder = RoutingRecorder(self.placements)
        self.recorder.start()
        self.rebalancer = Rebalancer(
            rule, GroupComm(), self.recorder, self.placements.__getitem__, self.place
        )
        self.observers = [self.recorder.observer(layer) for layer in range(LAYERS)]

    def place(self, layer: int, placement: Placement) -> int:
        moves = Moves.between(self.placements[layer], placement)
        self.placed.append((layer, len(moves.transfers)))
        self.placements[layer] = placement
        return 10 * len(moves.transfers)

    def run(self, passes: int, *of_layers: list[int]) -> None:
        for _ in range(passes):
            self.rebalancer.before_pass()
            for observe, ids in zip(self.observers, of_layers, strict=True):
                observe(mx.array([ids]))


def test_layers_with_the_fewest_moves_go_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model(RebalanceRule(every=20))
    # Layers 0 and 1 take two experts of one rank, layer 2 one of each.
    with caplog.at_level(logging.INFO, "mlx_ep"):
        model.run(20, [0, 1], [0, 1], [0, 4])
        assert not model.placed  # nothing moves before a plan
        model.run(4, [0, 1], [0, 1], [0, 4])
    assert {layer for layer, _ in model.placed} == {0, 1}
    transfers = [number for _, number in model.placed]
    assert transfers == sorted(transfers)
    for layer in (0, 1):  # experts 0 and 1 are parted
        of_rank = model.placements[layer].expert_ranks
        assert of_rank[0] != of_rank[1]
        assert [model.placements[layer].num_slots(rank) for rank in range(2)] == [4, 4]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "[Rebalance] start: forward_pass_id=19"
    assert f"layers=2 slots={sum(transfers)} bytes={10 * sum(transfers)}" in lines[1]
    assert model.rebalancer.num_rebalances == 1
    model.placed.clear()
    with caplog.at_level(logging.INFO, "mlx_ep"):
        model.run(40, [0, 1], [0, 1], [0, 4])
    assert not model.placed  # all is level now
    assert "[Rebalance] skip:" in caplog.records[-1].getMessage()


def test_a_low_balancedness_is_acted_upon(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(RebalanceRule(below=0.9))
    with caplog.at_level(logging.INFO, "mlx_ep"):
        model.run(2 * LOOK_EVERY, [0, 4], [1, 5], [2, 6])  # level
    assert not model.placed
    skips = [r.getMessage() for r in caplog.records]
    # Said once, not at every look.
    assert len(skips) == 1 and "balancedness 1.000 is not below 0.9" in skips[0]
    model.run(2 * LOOK_EVERY, [0, 1], [1, 5], [2, 6])
    assert [layer for layer, _ in model.placed] == [0]


def test_rules_that_cannot_be() -> None:
    for fields, match in (
        ({"every": -1}, "0 or more"),
        ({"below": 1.5}, "rebalance_below 0 to 1"),
    ):
        with pytest.raises(ValueError, match=match):
            RebalanceRule(**fields)  # type: ignore[arg-type]
    of = RebalanceRule.of
    assert not of(EPConfig(), 2).is_on
    with pytest.raises(ValueError, match="needs strategy='replicated'"):
        of(EPConfig(rebalance_below=0.5, strategy="gathered"), 2)
    with pytest.raises(ValueError, match="8 ranks at most; got 9"):
        of(EPConfig(rebalance_every=5), 9)
    with pytest.raises(ValueError, match="Whole experts"):
        of(EPConfig(rebalance_every=5, ep_size=1), 2)


def test_a_placed_layer_is_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots change their order; the numbers go with them, and peers can compare."""
    marks: list[tuple[int, ...]] = []
    monkeypatch.setattr(mlx_ep.api.install, "note_step", lambda *n: marks.append(n))
    plain: Any = make_model(QWEN3_MOE)
    tokens = mx.array([[1, 2, 3, 4]])
    expected = np.array(plain(tokens))
    model: Any = parallelize(plain, config=EPConfig(warmup=False))
    state = model.expert_parallel
    placement = Placement((tuple(reversed(range(10))),))
    assert state.place(1, placement) == 0  # nothing travels on one rank
    assert state.placement_of(1) == placement != state.placement_of(0)
    np.testing.assert_allclose(np.array(model(tokens)), expected, atol=1e-5)
    assert marks == [(1, int(placement.digest, 16))]
    with pytest.raises(ValueError, match="on the same ranks"):
        state.place(1, Placement.contiguous(10, 2))
    with pytest.warns(UserWarning, match="nothing to rebalance"):
        parallelize(make_model(QWEN3_MOE), config=EPConfig(rebalance_every=5))
