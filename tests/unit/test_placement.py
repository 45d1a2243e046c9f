"""Every expert has one slot on one rank, whatever divides what."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.placement import Placement, runs


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("num_experts", [1, 2, 3, 7, 8, 10, 60, 64, 128])
def test_contiguous_covers_every_expert_once(num_experts: int, num_ranks: int) -> None:
    placement = Placement.contiguous(num_experts, num_ranks)
    held = [expert for rank in placement.rank_experts for expert in rank]
    assert held == list(range(num_experts))
    counts = [placement.num_slots(rank) for rank in range(num_ranks)]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_contiguous_examples() -> None:
    counts = [len(e) for e in Placement.contiguous(10, 4).rank_experts]
    assert counts == [3, 3, 2, 2]
    assert Placement.contiguous(2, 3).rank_experts == ((0,), (1,), ())


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(0, 2), (4, 0), (-1, 1)])
def test_contiguous_needs_experts_and_ranks(num_experts: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match="at least 1 expert and 1 rank"):
        Placement.contiguous(num_experts, num_ranks)


@pytest.mark.parametrize("rank_experts", [(), ((),), ((0, 0), (1,)), ((0,), (2,))])
def test_each_expert_exactly_once(rank_experts: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        Placement(rank_experts)


def test_maps_of_an_explicit_placement() -> None:
    placement = Placement(((3, 0), (), (1, 4, 2)))
    assert placement.num_experts == 5
    np.testing.assert_array_equal(placement.expert_ranks, [0, 2, 2, 0, 2])
    np.testing.assert_array_equal(placement.expert_slots, [1, 0, 2, 0, 1])
    ids = mx.array([[0, 1, -1], [4, 3, 2]], mx.int32)
    assert placement.local_slots(ids, 0).tolist() == [[1, -1, -1], [-1, 0, -1]]
    assert placement.local_slots(ids, 1).tolist() == [[-1, -1, -1], [-1, -1, -1]]
    assert placement.local_slots(ids, 2).tolist() == [[-1, 0, -1], [1, -1, 2]]


def test_describe() -> None:
    placement = Placement.contiguous(64, 2)
    assert placement.describe(1) == "experts 32..63 (32 of 64 per layer)"
    placement = Placement(((0, 1, 2, 7), (), (3, 4, 5, 6)))
    assert placement.describe(0) == "experts 0..2,7 (4 of 8 per layer)"
    assert placement.describe(1) == "experts none (0 of 8 per layer)"


def test_runs() -> None:
    assert runs([]) == []
    assert runs([4, 5, 6, 1, 3, 4]) == [(4, 3), (1, 1), (3, 2)]
