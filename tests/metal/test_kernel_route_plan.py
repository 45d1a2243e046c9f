"""route_plan: the kernel and its twin against sorted lists."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ep.kernels import RouteTables, metal, ops
from tests.support import host, kernel_reference


def plan(
    module: ModuleType,
    ids: np.ndarray,
    ranks: list[int] | list[list[int]],
    slots: list[int] | list[list[int]],
    num_ranks: int,
) -> RouteTables:
    """With the maps [E], or [E R] with replicas."""
    maps = [np.array(m, np.int32).reshape(len(m), -1) for m in (ranks, slots)]
    return module.route_plan(
        mx.array(ids.astype(np.int32)),
        *(mx.array(m) for m in maps),
        num_ranks=num_ranks,
        num_slots=int(maps[1].max()) + 1,
    )


def check(
    module: ModuleType, ids: np.ndarray, ranks: list[int], num_ranks: int
) -> None:
    # Slots rank-major: the order of a stable sort of the experts by rank.
    slots = np.argsort(np.argsort(ranks, kind="stable")).tolist()
    got = kernel_reference.as_lists(plan(module, ids, ranks, slots, num_ranks))
    expected = kernel_reference.route_plan(
        ids, np.array(ranks), np.array(slots), num_ranks, len(slots)
    )
    assert got == expected


def test_hand_worked(module: ModuleType) -> None:
    """The example of RouteTables's docstring."""
    got = plan(module, np.array([[2, 0], [2, -1]]), [0, 0, 1, 1], [0, 1, 2, 3], 2)
    assert kernel_reference.as_lists(got) == {
        "slot_counts": [1, 0, 2, 0],
        "slot_offsets": [0, 1, 1, 3, 3],
        "positions": [[1, 0], [2, -1]],
        "rank_counts": [1, 2],
        "rank_offsets": [0, 1, 3],
        "row_tokens": [0, 0, 1, -1],
        "token_rows": [[0, 1], [-1, 2]],
    }


CASES = {
    "one token": (1, 2, [0, 0, 1], 2),
    "fewer than 8 ids": (3, 2, [0, 1, 2], 3),
    "several steps": (41, 3, [0, 1, 0, 1, 2, 2, 2, 0, 1, 0], 3),
    "a rank without experts": (13, 2, [0, 0, 3, 3], 4),
    "one rank": (33, 4, [0] * 6, 1),
    "one expert": (70, 1, [1], 2),
}


@pytest.mark.parametrize("case", CASES)
def test_against_sorting(scheduled_kernels: None, case: str) -> None:
    num_tokens, per_token, ranks, num_ranks = CASES[case]
    random = np.random.default_rng(0)
    for none in (0.0, 0.3, 1.0):
        ids = random.integers(0, len(ranks), (num_tokens, per_token))
        ids[random.random(ids.shape) < none] = -1
        check(metal, ids, ranks, num_ranks)


@given(data=st.data(), num_ranks=st.integers(1, 5), per_token=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_ops_against_sorting(
    data: st.DataObject, num_ranks: int, per_token: int
) -> None:
    ranks = data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=9))
    num_tokens = data.draw(st.integers(0, 12))
    size = num_tokens * per_token
    flat = data.draw(
        st.lists(st.integers(-1, len(ranks) - 1), min_size=size, max_size=size)
    )
    check(ops, np.array(flat, int).reshape(num_tokens, per_token), ranks, num_ranks)


# Ranks and slots of 4 experts with up to 3 replicas, those of fewer repeated.
REPLICA_RANKS = [[0, 1, 0], [1, 1, 1], [2, 0, 1], [2, 2, 2]]
REPLICA_SLOTS = [[0, 2, 0], [3, 3, 3], [5, 1, 4], [6, 6, 6]]


@pytest.mark.parametrize(("num_tokens", "per_token"), [(1, 2), (5, 1), (37, 3)])
def test_replicas(module: ModuleType, num_tokens: int, per_token: int) -> None:
    """Token t takes replica t % R: as if each replica were an expert of its own."""
    ids = np.random.default_rng(num_tokens).integers(-1, 4, (num_tokens, per_token))
    got = kernel_reference.as_lists(plan(module, ids, REPLICA_RANKS, REPLICA_SLOTS, 3))
    replica = np.arange(num_tokens)[:, None] % 3
    apart = np.where(ids < 0, -1, ids * 3 + replica)
    ranks, slots = (np.array(m).reshape(-1) for m in (REPLICA_RANKS, REPLICA_SLOTS))
    assert got == kernel_reference.route_plan(apart, ranks, slots, 3, 7)


def test_replicas_share_the_pairs(module: ModuleType) -> None:
    """All 6 tokens want expert 0, which is on ranks 0 and 1."""
    got = plan(module, np.zeros((6, 1)), [[0, 1]], [[0, 1]], 2)
    assert kernel_reference.as_lists(got)["rank_counts"] == [3, 3]
    assert kernel_reference.as_lists(got)["row_tokens"] == [0, 2, 4, 1, 3, 5]


def test_zero_tokens(module: ModuleType) -> None:
    check(module, np.zeros((0, 2), int), [0, 1, 1], 2)


def test_32_ranks(kernels: None) -> None:
    """All bits of the word that holds a token's ranks."""
    ranks = list(range(32)) * 2
    ids = np.random.default_rng(1).integers(-1, 64, (40, 6))
    check(metal, ids, ranks, 32)


def test_too_many_ranks() -> None:
    with pytest.raises(ValueError, match="at most 32 ranks; got 33"):
        plan(metal, np.zeros((1, 1)), [0], [0], 33)


def test_every_output_is_written(host_kernels: list[host.Launch]) -> None:
    plan(metal, np.full((9, 3), -1), [0, 1, 1], [0, 1, 2], 2)
    unwritten = {k: t.unwritten for k, t in host_kernels[0].traffic.items()}
    assert not any(unwritten.values())
