"""route_plan: the kernel and its twin against sorted lists."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ep.kernels import RoutePlan, metal, ops
from tests.metal import host, reference


def plan(
    module: ModuleType,
    ids: np.ndarray,
    ranks: list[int],
    slots: list[int],
    num_ranks: int,
) -> RoutePlan:
    maps = mx.array(ranks, mx.int32), mx.array(slots, mx.int32)
    return module.route_plan(
        mx.array(ids.astype(np.int32)), *maps, num_ranks=num_ranks, num_slots=len(slots)
    )


def check(
    module: ModuleType, ids: np.ndarray, ranks: list[int], num_ranks: int
) -> None:
    # Slots rank-major: the order of a stable sort of the experts by rank.
    slots = np.argsort(np.argsort(ranks, kind="stable")).tolist()
    got = reference.as_lists(plan(module, ids, ranks, slots, num_ranks))
    expected = reference.route_plan(
        ids, np.array(ranks), np.array(slots), num_ranks, len(slots)
    )
    assert got == expected


def test_hand_worked(module: ModuleType) -> None:
    """The example of RoutePlan's docstring."""
    got = plan(module, np.array([[2, 0], [2, -1]]), [0, 0, 1, 1], [0, 1, 2, 3], 2)
    assert reference.as_lists(got) == {
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
