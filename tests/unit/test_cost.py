"""The cost model against hand-computed cases, limits and simulation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from math import comb

import numpy as np
import pytest

from mlx_ep.config import EPConfig
from mlx_ep.cost.expected import (
    expected_distinct,
    expected_pairs,
    experts_of_ranks,
    sampled_counts,
)
from mlx_ep.cost.layer import SORTED_ROWS, TILE_ROWS, dense_seconds
from mlx_ep.cost.profile import OWN_BLOCK, cost_key, overridden
from mlx_ep.cost.records import CollectiveTable, MatrixCost
from mlx_ep.cost.shape import MatrixTotal
from mlx_ep.cost.step import ARMS, layer_cost, step_cost
from mlx_ep.placement import Placement
from mlx_ep.types import Packing
from tests.support.round_numbers import JACCL, LAYER, MODEL, PROFILE, RING


def exact_busiest(num_experts: int, top_k: int, num_ranks: int) -> float:
    """E[max over ranks] of the experts that one token uses, by counting choices."""
    sizes = [p.stop - p.start for p in experts_of_ranks(num_experts, num_ranks)]
    total = 0.0
    for split in product(range(top_k + 1), repeat=num_ranks):
        if sum(split) == top_k:
            ways = np.prod([comb(n, k) for n, k in zip(sizes, split, strict=True)])
            total += max(split) * ways / comb(num_experts, top_k)
    return total


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_experts, top_k", [(384, 8), (128, 8), (8, 2), (10, 3)])
def test_busiest_rank_of_one_token(num_experts, top_k, num_ranks) -> None:
    exact = exact_busiest(num_experts, top_k, num_ranks)
    found = expected_distinct(num_experts, top_k, 1, num_ranks)
    assert found == pytest.approx(exact, rel=0.01)
    # Each expert of one token is one pair.
    assert expected_pairs(num_experts, top_k, 1, num_ranks) == found


def test_busier_of_two_ranks_reads_5_of_8_experts() -> None:
    assert expected_distinct(384, 8, 1, 2) == pytest.approx(5.1, abs=0.02)
    assert expected_distinct(384, 8, 1, 1) == 8


@pytest.mark.parametrize("tokens", [3, 16, 100])
def test_distinct_experts_against_simulation(tokens) -> None:
    """Of the whole layer E (1 - (1 - K/E)^T); of the busier rank, by brute force."""
    num_experts, top_k = 64, 4
    every = num_experts * (1 - (1 - top_k / num_experts) ** tokens)
    assert expected_distinct(num_experts, top_k, tokens, 1) == pytest.approx(
        every, rel=0.01
    )
    random = np.random.default_rng(5)
    busiest, pairs = [], []
    for _ in range(1500):
        ids = np.argsort(random.random((tokens, num_experts)))[:, :top_k]
        halves = [ids[ids < 32], ids[ids >= 32]]
        busiest.append(max(len(np.unique(half)) for half in halves))
        pairs.append(max(half.size for half in halves))
    assert expected_distinct(num_experts, top_k, tokens, 2) == pytest.approx(
        np.mean(busiest), rel=0.01
    )
    assert expected_pairs(num_experts, top_k, tokens, 2) == pytest.approx(
        np.mean(pairs), rel=0.02
    )


def test_counts_are_choices_of_k_different_experts() -> None:
    counts = sampled_counts(10, 3, 7)
    assert counts.shape[1] == 10 and (counts.sum(axis=1) == 21).all()
    assert counts.max() <= 7
    assert (sampled_counts(10, 3, 1) <= 1).all()
    assert not sampled_counts(10, 3, 0).any()


@pytest.mark.parametrize("num_experts, num_ranks", [(10, 3), (2, 4), (8, 2)])
def test_ranks_share_all_experts(num_experts, num_ranks) -> None:
    parts = experts_of_ranks(num_experts, num_ranks)
    covered = [e for part in parts for e in range(num_experts)[part]]
    assert covered == list(range(num_experts)) and len(parts) == num_ranks
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_one_token_reads_its_experts_once() -> None:
    cost = layer_cost(PROFILE, LAYER, "single", tokens=1)
    # 2 experts of 10 kB at 1 GB/s; arithmetic is 2 x 2 x 15000 / 1e12 = 60 ns.
    assert cost.experts == pytest.approx(2 * 10_000 / 1e9)
    assert cost.seconds == cost.experts
    assert (cost.distinct_experts, cost.pairs, cost.collectives) == (2, 2, 0)


def test_many_tokens_are_bound_by_arithmetic() -> None:
    fast = overridden(PROFILE, {"memory_bandwidth": 1e15})
    tokens = 4096
    cost = layer_cost(fast, LAYER, "single", tokens=tokens)
    counts = sampled_counts(8, 2, tokens)
    assert counts.mean() > SORTED_ROWS
    padded = np.ceil(counts / TILE_ROWS) * TILE_ROWS
    rows = padded.sum(axis=1).mean()
    assert cost.experts == pytest.approx(2 * rows * 15_000 / 1e12)
    assert tokens * 2 <= rows < tokens * 2 * 1.02


def test_tensor_parallelism_halves_experts_and_sums_once() -> None:
    single = layer_cost(PROFILE, LAYER, "single", tokens=1)
    split = layer_cost(PROFILE, LAYER, "tp", tokens=1, num_ranks=2)
    assert split.experts == pytest.approx(single.experts / 2)
    # One all_sum of a token of 100 numbers of 2 bytes.
    assert split.communication == pytest.approx(30e-6 + 200 / 6e9)
    assert split.collectives == 1 and split.collective_bytes == 200


def test_replicated_experts_wait_for_the_busier_rank() -> None:
    cost = layer_cost(PROFILE, LAYER, "ep-replicated", tokens=1, num_ranks=2)
    busiest = exact_busiest(8, 2, 2)
    assert cost.experts == pytest.approx(busiest * 10_000 / 1e9, rel=0.01)
    # One all_sum of a token of 100 float32 numbers.
    assert cost.communication == pytest.approx(30e-6 + 400 / 6e9)
    same = layer_cost(PROFILE, LAYER, "ep-tensor", tokens=1, num_ranks=2)
    assert same == cost


def test_crossing_is_paid_for_each_collective() -> None:
    slow = overridden(PROFILE, {"links.jaccl.crossing_seconds": 180e-6})
    for arm in ("tp", "ep-replicated", "ep-gathered", "ep-all-to-all"):
        one, other = (
            layer_cost(p, LAYER, arm, tokens=64, num_ranks=2) for p in (PROFILE, slow)
        )
        more = other.communication - one.communication
        assert more == pytest.approx(other.collectives * 180e-6)


def test_sharded_arms_move_what_the_strategies_say() -> None:
    gathered = layer_cost(PROFILE, LAYER, "ep-gathered", tokens=64, num_ranks=2)
    # 32 tokens a rank: rows with routing in one, then 64 float32 sums scattered.
    assert gathered.collective_bytes == 32 * (200 + 2 * 8) + 4 * 64 * 100
    assert gathered.collectives == 2
    swapped = layer_cost(PROFILE, LAYER, "ep-all-to-all", tokens=64, num_ranks=2)
    assert swapped.collective_bytes == 32 * (200 + 2 * 8) + 32 * 200
    config = EPConfig(strategy="auto", dispatch_dtype="int8")
    eighth = layer_cost(
        PROFILE, LAYER, "ep-gathered", tokens=64, num_ranks=2, config=config
    )
    # 100 values are 25 words, and a scale.
    assert eighth.collective_bytes == 32 * (104 + 2 * 8) + 4 * 64 * 100
    assert eighth.communication < gathered.communication
    same = layer_cost(
        PROFILE, LAYER, "ep-replicated", tokens=64, num_ranks=2, config=config
    )
    assert same == layer_cost(PROFILE, LAYER, "ep-replicated", tokens=64, num_ranks=2)
    shared = replace(LAYER, shared=MatrixTotal(10_000, 20_000))
    whole, part = (
        layer_cost(PROFILE, shared, arm, tokens=64, num_ranks=2).shared
        for arm in ("ep-replicated", "ep-gathered")
    )
    assert whole == pytest.approx(max(20_000 / 1e9, 2 * 64 * 10_000 / 1e12))
    assert part <= whole


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_more_of_anything_takes_no_less(arm, num_ranks) -> None:
    def seconds(profile=PROFILE, layer=LAYER, tokens=16):
        return layer_cost(
            profile, layer, arm, tokens=tokens, num_ranks=num_ranks
        ).seconds

    times = [seconds(tokens=t) for t in (1, 4, 16, 64, 256)]
    assert times == sorted(times)
    assert seconds(layer=replace(LAYER, expert_bytes=20_000)) > seconds()
    for name in ("memory_bandwidth", "links.jaccl.bandwidth", "matmul_rate"):
        assert seconds(overridden(PROFILE, {name: 1e6})) >= seconds()
    for name in ("block_seconds", "route_seconds", "links.jaccl.latency"):
        assert seconds(overridden(PROFILE, {name: 1.0})) >= seconds()


@pytest.mark.parametrize("arm", ARMS)
def test_one_rank_is_a_single_machine_whatever_the_arm(arm) -> None:
    layer = [layer_cost(PROFILE, LAYER, a, tokens=5) for a in (arm, "single")]
    assert layer[0] == layer[1]
    step = [
        step_cost(PROFILE, MODEL, a, tokens=5, phase="decode") for a in (arm, "single")
    ]
    assert step[0] == step[1]


def test_measured_runners_are_taken_and_the_fastest_by_itself() -> None:
    slow = MatrixCost(rows=(1.0, 2.0), seconds=(1e-9, 2e-9), call_seconds=1e-3)
    fast = MatrixCost(rows=(1.0, 2.0), seconds=(3e-9, 3.1e-9), visit_seconds=1e-6)
    costs = {
        cost_key("gather", LAYER.packing): slow,
        cost_key("blas", LAYER.packing): fast,
    }
    profile = replace(PROFILE, experts=costs)
    one = layer_cost(profile, LAYER, "single", tokens=1, runner="gather")
    assert one.experts == pytest.approx(1e-3 + 2 * 15_000 * 1e-9)
    other = layer_cost(profile, LAYER, "single", tokens=1, runner="blas")
    assert other.experts == pytest.approx(2 * (1e-6 + 15_000 * 3e-9))
    assert layer_cost(profile, LAYER, "single", tokens=1).runner == "blas"
    with pytest.raises(ValueError, match="no runner 'metal'"):
        layer_cost(profile, LAYER, "single", tokens=1, runner="metal")
    # Another dtype of the scales is the same packing, other bits are not.
    float32 = replace(LAYER, packing=Packing.affine(4, dtype="float32"))
    assert layer_cost(profile, float32, "single", tokens=1).runner == "blas"
    eight = replace(LAYER, packing=Packing.affine(8))
    assert layer_cost(profile, eight, "single", tokens=1).runner == "limits"


def test_a_single_machine_runs_the_block_of_mlx_lm_where_that_was_measured() -> None:
    slow = MatrixCost(rows=(1.0, 2.0), seconds=(5e-9, 6e-9))
    fast = MatrixCost(rows=(1.0, 2.0), seconds=(1e-9, 2e-9))
    costs = {
        cost_key(OWN_BLOCK, LAYER.packing): slow,
        cost_key("blas", LAYER.packing): fast,
    }
    profile = replace(PROFILE, experts=costs)
    for arm in ("single", "tp"):
        assert layer_cost(profile, LAYER, arm, tokens=1, num_ranks=2).runner == "mlx-lm"
    for arm in ("ep-replicated", "ep-gathered"):
        found = layer_cost(profile, LAYER, arm, tokens=2, num_ranks=2)
        assert found.runner == "blas"


@pytest.mark.parametrize("tokens", [1, 3, 80])
def test_copies_of_experts_make_the_busiest_rank_less_busy(tokens: int) -> None:
    """Rows and experts are those that the package serves with the same placement."""
    layer = replace(LAYER, num_experts=8, top_k=2)
    placement = Placement(((0, 1, 2, 3, 4, 5), (4, 5, 6, 7, 0)))
    cost = partial(
        layer_cost, PROFILE, layer, "ep-replicated", tokens=tokens, num_ranks=2
    )
    plain, placed = cost(), cost(placement=placement)
    random, busiest = np.random.default_rng(3), []
    owners = np.repeat([0, 1], [6, 5])
    for _ in range(1500 if tokens < 10 else 300):
        ids = np.argsort(random.random((tokens, 8)), axis=1)[:, :2].astype(np.int32)
        slots = placement.serve(ids)
        ranks = owners[slots]
        busiest.append(
            [
                max(len(set(slots[ranks == rank])) for rank in (0, 1)),
                max((ranks == rank).sum() for rank in (0, 1)),
            ]
        )
    distinct, pairs = np.mean(busiest, axis=0)
    assert placed.distinct_experts == pytest.approx(distinct, rel=0.03)
    assert placed.pairs == pytest.approx(pairs, rel=0.03)
    if tokens < 10:
        assert placed.distinct_experts < plain.distinct_experts
        assert placed.experts < plain.experts
    else:
        assert placed.pairs < plain.pairs


def test_waiting_for_the_device_is_counted_once() -> None:
    """The package's `gather` waits, mlx-lm's own block does not."""
    waits = overridden(PROFILE, {"sync_seconds": 1e-3})

    def fixed(arm, runner, profile=waits):
        return layer_cost(
            profile, LAYER, arm, tokens=1, num_ranks=2, runner=runner
        ).fixed

    assert fixed("ep-replicated", "gather") == 1e-3
    assert fixed("ep-replicated", "metal") == fixed("tp", "gather") == 0.0
    cost = MatrixCost(rows=(1.0,), seconds=(1e-9,), call_seconds=1.5e-3)
    measured = replace(waits, experts={cost_key("gather", LAYER.packing): cost})
    assert fixed("ep-replicated", "gather", measured) == 0.0
    for arm, call in (("single", 0.5e-3), ("ep-replicated", 1.5e-3)):
        found = layer_cost(measured, LAYER, arm, tokens=1)
        assert found.experts == pytest.approx(call + 2 * 15_000 * 1e-9)


def test_matrix_cost_between_and_beyond_measurements() -> None:
    cost = MatrixCost(rows=(1.0, 4.0, 16.0), seconds=(2.0, 1.0, 14.0))
    # The dip at 4 rows is noise: more rows are no less work.
    assert list(cost.per_weight(np.array([0, 1, 4, 10, 16, 28]))) == [
        0.0, 2.0, 2.0, 8.0, 14.0, 26.0,
    ]  # fmt: skip
    counts = np.array([[0, 1, 4], [0, 0, 0]])
    whole = MatrixCost(
        rows=(1.0, 4.0), seconds=(1.0, 4.0),
        call_seconds=100.0, visit_seconds=10.0, pair_seconds=0.5,
    )  # fmt: skip
    assert list(whole.of_experts(counts, 2, 3)) == [100 + 20 + 5 * 2 * 0.5 + 15, 0.0]


@pytest.mark.parametrize(
    "rows, seconds", [((), ()), ((2.0, 1.0), (1.0, 1.0)), ((1.0,), (1.0, 2.0))]
)
def test_matrix_cost_refuses(rows, seconds) -> None:
    with pytest.raises(ValueError, match=r"rows must ascend|one number for each"):
        MatrixCost(rows=rows, seconds=seconds)


def test_link_follows_from_latency_and_bandwidth() -> None:
    assert JACCL.seconds("all_reduce", 6000, 2) == pytest.approx(31e-6)
    assert JACCL.seconds("all_reduce", 6000, 4) == pytest.approx(31e-6)
    assert JACCL.seconds("all_gather", 6000, 4) == pytest.approx(31e-6)
    assert JACCL.seconds("reduce_scatter", 6000, 4) == pytest.approx(30.25e-6)
    assert JACCL.seconds("all_to_all", 6000, 2) == pytest.approx(30.5e-6)
    # JACCL has no all-to-all of 3 ranks: everything is gathered.
    assert JACCL.seconds("all_to_all", 6000, 3) == pytest.approx(31e-6)
    assert JACCL.seconds("all_reduce", 6000, 1) == 0.0
    # A ring of 4: 3 steps there, 3 back, with a quarter of the bytes each.
    assert RING.seconds("all_reduce", 4000, 4) == pytest.approx(600e-6 + 6e-6)
    assert RING.seconds("all_gather", 4000, 4) == pytest.approx(300e-6 + 12e-6)
    # The ring has no reduce-scatter: it sums everything.
    scattered = RING.seconds("reduce_scatter", 4000, 4)
    assert scattered == RING.seconds("all_reduce", 4000, 4)
    assert RING.seconds("all_to_all", 4000, 4) > RING.seconds("all_to_all", 4000, 2)
    with pytest.raises(ValueError, match="must be one of all_reduce"):
        JACCL.seconds("all_sum", 1, 2)


def test_measured_collectives_hold_for_their_number_of_ranks() -> None:
    table = CollectiveTable(ranks=2.0, bytes=(0.0, 100.0), seconds=(1.0, 2.0))
    link = replace(JACCL, tables={"all_to_all": table})
    assert link.seconds("all_to_all_v", 50, 2) == 1.5
    assert link.seconds("all_to_all", 300, 2) == 4.0
    assert link.seconds("all_to_all", 300, 3) < 1.0
    assert link.seconds("all_reduce", 6000, 2) == pytest.approx(31e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"arm": "pipeline"}, "An arm must be one of single"),
        ({"tokens": -1}, "tokens must be 0 or more"),
        ({"num_ranks": 0}, "num_ranks 1 or more"),
        ({"link": "mpi"}, "has no link 'mpi'; it has jaccl, ring"),
        ({"phase": "both"}, "phase must be prefill or decode"),
    ],
)
def test_refuses(arguments, message) -> None:
    given = {"arm": "tp", "tokens": 1, "num_ranks": 2, "phase": "decode", **arguments}
    with pytest.raises(ValueError, match=message):
        step_cost(PROFILE, MODEL, given.pop("arm"), **given)


def test_dense_matrices_are_read_or_multiplied() -> None:
    matrices, plain = MatrixTotal(1000, 2000), Packing.plain("bfloat16")
    assert dense_seconds(PROFILE, matrices, plain, 1) == pytest.approx(2e-6)
    many = dense_seconds(PROFILE, matrices, plain, 10_000)
    assert many == pytest.approx(2 * 10_000 * 1000 / 1e12)
    assert dense_seconds(PROFILE, MatrixTotal(), plain, 5) == 0.0
    cost = MatrixCost(rows=(1.0, 3.0), seconds=(1e-9, 2e-9))
    measured = replace(PROFILE, dense={"bfloat16": cost})
    assert dense_seconds(measured, matrices, plain, 2) == pytest.approx(1.5e-6)
