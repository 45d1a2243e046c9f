"""A rank computes its own pairs, no others, and sums them as the reference does."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_ep.experts import group_by_slot, run_experts, run_slots
from mlx_ep.metrics import Counters
from mlx_ep.models.blocks import switch_runner
from mlx_ep.placement import Placement
from mlx_ep.types import Rows
from tests.support.reference import moe_sum, swiglu_expert

D, F = 24, 20


def test_group_by_slot_by_hand() -> None:
    pairs = group_by_slot(np.array([[2, -1, 1], [-1, -1, -1], [0, 2, -1]], np.int32))
    # (r2,s0) (r0,s1) (r0,s2) (r2,s2)
    assert pairs.rows.tolist() == [2, 0, 0, 2]
    assert pairs.slots.tolist() == [0, 1, 2, 2]
    assert pairs.position.tolist() == [[2, 4, 1], [4, 4, 4], [0, 3, 4]]


@given(st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), max_size=12))
def test_group_by_slot_is_a_sorted_bijection(ids: list[list[int]]) -> None:
    slot_ids = np.array(ids, np.int32).reshape(len(ids), 3)
    pairs = group_by_slot(slot_ids)
    assert (np.diff(pairs.slots) >= 0).all()
    assert len(pairs.rows) == (slot_ids >= 0).sum()
    for (row, k), position in np.ndenumerate(pairs.position):
        if slot_ids[row, k] < 0:
            assert position == len(pairs.rows)
        else:
            assert pairs.rows[position] == row
            assert pairs.slots[position] == slot_ids[row, k]
    used = pairs.position[slot_ids >= 0]
    assert sorted(used) == list(range(len(pairs.rows)))


def _routing(kind: str, num_rows: int, num_experts: int) -> np.ndarray:
    random = np.random.default_rng(7)
    if kind == "all one expert":
        return np.full((num_rows, 3), 2, np.int32)
    if kind == "some without expert":
        return random.integers(-1, num_experts, (num_rows, 3)).astype(np.int32)
    if kind == "no expert at all":
        return np.full((num_rows, 3), -1, np.int32)
    return np.argsort(random.random((num_rows, num_experts)))[:, :3].astype(np.int32)


@pytest.mark.parametrize(
    "kind", ["distinct", "all one expert", "some without expert", "no expert at all"]
)
@pytest.mark.parametrize("num_rows", [1, 5, 40])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 9])
def test_partial_sums_of_all_ranks_are_the_reference(
    kind: str, num_rows: int, num_ranks: int
) -> None:
    num_experts = 7
    mx.random.seed(3)
    switch = SwitchGLU(D, F, num_experts)
    x = mx.random.normal((num_rows, D))
    gates = mx.random.uniform(shape=(num_rows, 3))
    ids = _routing(kind, num_rows, num_experts)
    placement = Placement.contiguous(num_experts, num_ranks)

    total, computed = np.zeros((num_rows, D)), 0
    for rank, experts in enumerate(placement.rank_experts):
        local = SwitchGLU(D, F, max(len(experts), 1))
        for name in ("gate_proj", "up_proj", "down_proj"):
            local[name].weight = switch[name].weight[mx.array(experts, mx.int32)]
        counters = Counters()
        slot_ids = placement.local_slots(mx.array(ids), rank)
        rows = Rows(x, slot_ids, gates)
        partial = run_experts(rows, switch_runner(local), counters)
        assert partial.dtype == mx.float32
        total += np.array(partial)
        own = np.isin(ids, experts) & (ids >= 0)
        assert counters.pairs_computed == own.sum()
        computed += counters.pairs_computed
        outputs = np.array(run_slots(rows, switch_runner(local), counters))
        assert (outputs[~own] == 0).all()
    assert computed == (ids >= 0).sum()

    experts = [
        swiglu_expert(*(np.array(switch[n].weight[e]) for n in _PROJECTIONS))
        for e in range(num_experts)
    ]
    expected = moe_sum(np.array(x), ids, np.array(gates), experts)
    np.testing.assert_allclose(total, expected, rtol=0, atol=1e-5)


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def test_slots_are_summed_in_ascending_order() -> None:
    """Float32 addition is not associative: the order is part of the contract."""
    outputs = {0: 1e8, 1: 1.0, 2: -1e8}

    def runner(rows: mx.array, slots: mx.array) -> mx.array:
        values = [outputs[slot] for slot in slots.tolist()]
        return mx.array(values, mx.float32)[:, None]

    slot_ids = mx.array([[2, 0, 1], [1, 2, 0]], mx.int32)
    rows = Rows(mx.zeros((2, 1)), slot_ids, mx.ones((2, 3)))
    expected = np.float32(np.float32(1e8) + np.float32(1)) - np.float32(1e8)
    assert run_experts(rows, runner, Counters()).tolist() == [[expected], [expected]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_sum_is_deterministic(seed: int) -> None:
    mx.random.seed(seed)
    switch = SwitchGLU(D, F, 4)
    slot_ids = mx.random.randint(-1, 4, (9, 3)).astype(mx.int32)
    rows = Rows(mx.random.normal((9, D)), slot_ids, mx.random.uniform(shape=(9, 3)))
    first, second = (
        np.array(run_experts(rows, switch_runner(switch), Counters())) for _ in "ab"
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("slots", [[2, -1, 0], [-1, 1, -1], [1, 1, 0], [-1, -1, -1]])
def test_one_row_is_summed_as_among_others(slots: list[int]) -> None:
    """Bit for bit, in slot order, although a shorter way leads there."""
    mx.random.seed(0)
    switch = SwitchGLU(64, 32, 4)
    x = mx.random.normal((2, 64))
    gates = mx.random.uniform(shape=(2, 3))
    ids = mx.array([slots, [3, 3, 3]], mx.int32)
    runner, counters = switch_runner(switch), Counters()
    both = run_experts(Rows(x, ids, gates), runner, counters)
    one = run_experts(Rows(x[:1], ids[:1], gates[:1]), runner, counters)
    # The second row visits slots of its own: the first one's products are alike.
    assert one[0].tolist() == both[0].tolist()
