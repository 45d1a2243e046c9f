"""Every rank has every expert: what that is, and when a server takes it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mlx_ep.config import EPConfig
from mlx_ep.loading import checkpoint_weights, find_model
from mlx_ep.placement import Placement, check_everywhere, everywhere
from mlx_ep.server.copies import CopiesRoom, copies_room, may_copy
from mlx_ep.server.pools import EngineOptions

OPTIONS = EngineOptions(max_num_seqs=8, kv_fraction=0.5, context=1000)


def _room(num_ranks: int = 2, memory: int = 10**12, **options: Any) -> CopiesRoom:
    config = EPConfig(strategy="auto", replica_memory="all")
    weights = checkpoint_weights(find_model("jargon-moe"), 0, num_ranks, config)
    changed = dataclasses.replace(OPTIONS, **options)
    return copies_room(weights.outline(), changed, num_ranks, memory)


def test_every_rank_has_every_expert_in_order() -> None:
    placement = everywhere(6, 3)
    assert placement.is_everywhere
    assert all(placement.has_all_in_order(rank) for rank in range(3))
    check_everywhere(placement)


@pytest.mark.parametrize(
    "experts", [((0, 1, 2), (3,)), ((0, 1, 2, 3), (3, 0))], ids=["shared", "some"]
)
def test_a_rank_that_lacks_experts_is_refused(experts: tuple[Any, ...]) -> None:
    placement = Placement(experts)
    assert not placement.is_everywhere
    held = ", ".join(str(len(of_rank)) for of_rank in experts)
    with pytest.raises(
        ValueError, match=f"all 4 experts on every rank; they have {held}"
    ):
        check_everywhere(placement)


def test_copies_fit_where_weights_and_caches_do() -> None:
    room = _room()
    least = room.weights + room.caches
    assert 0 < room.copies < room.weights
    assert room.memory == 10**12 // 2  # of which the fraction is for both
    assert _room(memory=2 * least).fits
    tight = _room(memory=2 * least - 2)
    assert not tight.fits
    assert "--replica-memory all" in str(tight)
    assert "--replica-memory 0" in str(room)


def test_caches_are_of_a_context_or_of_a_rank_s_share() -> None:
    one = _room(max_num_seqs=1).caches
    assert _room(max_num_seqs=2).caches == one  # one sequence on each rank
    assert _room(max_num_seqs=8).caches == 4 * one
    assert _room(num_ranks=4, max_num_seqs=8).caches == 2 * one


@pytest.mark.parametrize(
    ("fields", "num_ranks", "expected"),
    [
        ({}, 2, True),
        ({}, 1, False),
        ({"strategy": "auto"}, 2, True),
        ({"strategy": "gathered"}, 2, False),
        ({"rebalance_every": 100}, 2, False),
        ({"placement_file": "experts.json"}, 2, False),
        ({"ep_size": 1}, 2, False),
    ],
)
def test_who_said_where_experts_are_is_not_overruled(
    fields: dict[str, Any], num_ranks: int, expected: bool
) -> None:
    assert may_copy(EPConfig(**fields), num_ranks) is expected


def test_experts_that_are_everywhere_are_not_moved() -> None:
    with pytest.raises(ValueError, match="there is none to move"):
        EPConfig(replica_memory="all", rebalance_every=100)
