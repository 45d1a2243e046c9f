"""Movement by the kernels: the same plans, rows and sums as by MLX's ops.

The kernels run as everywhere in this folder; where many cases are drawn, their twins
stand for them.
"""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ep.kernels import ops
from mlx_ep.placement import Part, Placement
from mlx_ep.rows import (
    OPS,
    MetalMovement,
    Movement,
    Mover,
    OpsMovement,
    Option,
    RowRoutes,
    has_one_rank_per_expert,
    movement_of,
    movement_options,
)
from mlx_ep.rows import device as device_module
from mlx_ep.rows.mover import OnDevice
from mlx_ep.types import TokenCounts
from tests.support.cases import Case, routing_cases

D, E, K = 24, 7, 3


def placement_of(num_ranks: int, num_experts: int = E) -> Placement:
    """Dealt out in turn, so that slots are not in the order of the experts."""
    return Placement(
        tuple(tuple(range(r, num_experts, num_ranks)) for r in range(num_ranks))
    )


def everyone(case: Case) -> mx.array:
    most = max(case.tokens)
    padded = [
        np.pad(ids, [(0, most - len(ids)), (0, 0)], constant_values=-1)
        for ids in case.expert_ids
    ]
    return mx.array(np.concatenate(padded).astype(np.int32))


def check_rank(movement: Movement, case: Case, placement: Placement, rank: int) -> None:
    """Plan, pack and sum of one rank, against the movement by ops."""
    tokens, num_ranks = TokenCounts(case.tokens), placement.num_ranks
    plans: list[RowRoutes] = [
        m.plan_rows(everyone(case), placement, rank, tokens) for m in (OPS, movement)
    ]
    expected, got = plans
    assert got.send_counts == expected.send_counts
    assert got.recv_counts == expected.recv_counts
    assert got.arriving.tolist() == expected.arriving.tolist()
    num_tokens, num_sent = case.tokens[rank], sum(got.send_counts)
    x = mx.random.normal((num_tokens, D), key=mx.random.key(1)).astype(mx.bfloat16)
    own = mx.random.normal((num_tokens, D), key=mx.random.key(2))
    back = mx.random.normal((num_sent, D), key=mx.random.key(3)).astype(mx.bfloat16)
    for num_rows in (num_sent, num_sent + 2):
        rows = [
            m.pack(x, plan, num_rows)
            for m, plan in zip((OPS, movement), plans, strict=True)
        ]
        assert rows[0].shape == rows[1].shape == (num_rows, D)
        assert mx.array_equal(rows[0][:num_sent], rows[1][:num_sent])
    sums = [
        m.add_rows(own, back, plan, rank)
        for m, plan in zip((OPS, movement), plans, strict=True)
    ]
    assert sums[1].dtype == mx.float32 and sums[1].shape == (num_tokens, D)
    assert mx.array_equal(*sums)
    partial = mx.random.normal((num_ranks * num_tokens, D), key=mx.random.key(4))
    chunks = 1 if num_ranks == 2 else num_ranks
    shape = (chunks * num_tokens, D)
    back = mx.random.normal(shape, key=mx.random.key(5)).astype(mx.bfloat16)
    if num_ranks > 2:  # the own chunk is not read
        back[rank * num_tokens : (rank + 1) * num_tokens] = float("nan")
    sums = [m.add_ranks(partial, back, rank, num_ranks) for m in (OPS, movement)]
    assert mx.array_equal(*sums) and sums[1].shape == (num_tokens, D)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_kernels_move_alike(kernels: None, num_ranks: int) -> None:
    movement, placement = MetalMovement(), placement_of(num_ranks)
    for case in routing_cases(num_ranks, E, K)[:8]:
        check_rank(movement, case, placement, num_ranks - 1)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_rank_and_routing(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    _use_twins(monkeypatch)
    movement, placement = MetalMovement(), placement_of(num_ranks)
    for case in routing_cases(num_ranks, E, K):
        for rank in range(num_ranks):
            check_rank(movement, case, placement, rank)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_placement_and_routing(data: st.DataObject) -> None:
    num_ranks, num_experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    owners = data.draw(
        st.lists(
            st.integers(0, num_ranks - 1), min_size=num_experts, max_size=num_experts
        )
    )
    held = [tuple(e for e, o in enumerate(owners) if o == r) for r in range(num_ranks)]
    ids = [
        np.array(
            data.draw(
                st.lists(
                    st.lists(st.integers(-1, num_experts - 1), min_size=2, max_size=2),
                    max_size=4,
                )
            ),
            np.int32,
        ).reshape(-1, 2)
        for _ in range(num_ranks)
    ]
    case = Case("drawn", ids, [np.ones(i.shape, np.float32) for i in ids])
    with pytest.MonkeyPatch.context() as monkeypatch:
        _use_twins(monkeypatch)
        rank = data.draw(st.integers(0, num_ranks - 1))
        check_rank(MetalMovement(), case, Placement(tuple(held)), rank)


def _use_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("twins")
    vars(module).update({**vars(device_module.metal), **vars(ops)})
    monkeypatch.setattr(device_module, "metal", module)


def test_pairs(kernels: None) -> None:
    outputs = mx.random.normal((9, D), key=mx.random.key(0)).astype(mx.float16)
    ids = mx.array([[0, 3, -1], [-1, -1, -1], [8, 8, 2]], mx.int32)
    gates = mx.where(ids >= 0, mx.random.uniform(shape=ids.shape), 0.0)
    got, expected = (
        m.sum_pairs(outputs, ids, gates) for m in (MetalMovement(), OpsMovement())
    )
    assert got.dtype == expected.dtype == mx.float32
    assert mx.allclose(got, expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- the explicit rule


def test_an_expert_on_several_ranks_is_not_for_the_kernels() -> None:
    whole = placement_of(2)
    split = Placement(((0, 1), (0, 1)), (Part(0, 4, 8), Part(4, 8, 8)))
    assert has_one_rank_per_expert(whole) and not has_one_rank_per_expert(split)
    assert MetalMovement.why_not(D, whole) == ""
    assert "lives on several ranks" in MetalMovement.why_not(D, split)
    assert "narrower than 8" in MetalMovement.why_not(7, whole)
    many = Placement(tuple((r,) for r in range(33)))
    assert "more than 32 ranks" in MetalMovement.why_not(D, many)
    ids, tokens = mx.zeros((2, 1), mx.int32), TokenCounts((1, 1))
    with pytest.raises(ValueError, match="got a placement with experts on several"):
        MetalMovement().plan_rows(ids, split, 0, tokens)
    # The ops send a token to every part.
    assert OPS.plan_rows(ids, split, 0, tokens).send_counts == (0, 1)


def test_options_without_metal() -> None:
    found = {str(o): why for o, why in movement_options(D, placement_of(2)).items()}
    assert found["ops on cpu"] == ""
    assert "through Metal" in found["ops on metal"]
    assert "through Metal" in found["metal on metal"]


# ---------------------------------------------------------------- the choice


def test_a_mover_takes_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Mover()("rows", 5) is OPS
    kernel, host = Option("metal", "metal"), Option("ops", "cpu")
    mover = Mover(lambda job, tokens: kernel if tokens > 64 else host)
    assert isinstance(mover("rows", 65), MetalMovement)
    assert mover("ranks", 65) is mover("rows", 100)  # made once
    assert isinstance(mover("rows", 64), OpsMovement)


def test_ops_on_the_cpu_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLX computes on the GPU by default, its ops are sent to the CPU."""
    monkeypatch.setattr(Option, "stream", property(lambda self: mx.cpu))
    movement = movement_of(Option("ops", "cpu"))
    assert isinstance(movement, OnDevice) and isinstance(movement, Movement)
    check_rank(movement, routing_cases(2, E, K)[2], placement_of(2), 1)
    ids = mx.array([[0, -1]], mx.int32)
    gates = mx.array([[2.0, 0.0]])
    assert movement.sum_pairs(mx.ones((1, D)), ids, gates).tolist() == [[2.0] * D]
