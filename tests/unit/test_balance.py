"""Replicas: where they go."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import eplb
from mlx_ep.placement import (
    LayerLoad,
    RankRoom,
    ReplicaChoice,
    balance,
    balance_while_it_pays,
    draw_steps,
    expected_busiest,
    rebalance_experts,
)

# The example in EPLB's documentation, with what it prints.
WEIGHT = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
PHY2LOG = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def gpu_loads(
    weight: np.ndarray, phy2log: np.ndarray, logcnt: np.ndarray, num_gpus: int
) -> np.ndarray:
    share = np.take_along_axis(weight / logcnt, phy2log, -1)
    return share.reshape(len(weight), num_gpus, -1).sum(-1)


def tables(skewed: bool, shape: tuple[int, int], count: int) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    if not skewed:
        return [random.integers(0, 1000, shape).astype(float) for _ in range(count)]
    powers = np.linspace(0.8, 1.4, count)
    zipf = [1e6 / np.arange(1, shape[1] + 1) ** power for power in powers]
    return [np.stack([random.permutation(z) for _ in range(shape[0])]) for z in zipf]


def test_the_baseline_gives_the_documented_example() -> None:
    assert eplb.rebalance_experts(WEIGHT, 16, 4, 2, 8)[0].tolist() == PHY2LOG


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(
    ("experts", "slots", "groups", "nodes", "gpus"),
    [(64, 80, 4, 2, 8), (64, 80, 3 - 2, 4, 16), (32, 32, 4, 4, 8), (12, 36, 4, 2, 6)],
)
def test_rebalance_experts(
    experts: int, slots: int, groups: int, nodes: int, gpus: int, skewed: bool
) -> None:
    """EPLB's invariants, and never a busier GPU than EPLB's."""
    for weight in tables(skewed, (3, experts), 6):
        args = (slots, groups, nodes, gpus)
        phy2log, log2phy, logcnt = rebalance_experts(weight, *args)
        assert phy2log.shape == (3, slots) and (logcnt >= 1).all()
        for layer in range(3):
            of_expert = [np.flatnonzero(phy2log[layer] == e) for e in range(experts)]
            assert [len(found) for found in of_expert] == logcnt[layer].tolist()
            for expert, found in enumerate(of_expert):
                row = log2phy[layer, expert]
                assert row[row >= 0].tolist() == found.tolist()
                assert (row[len(found) :] == -1).all()
                if groups % nodes == 0:  # copies stay within a node
                    assert len(set(found // (slots // nodes))) == 1
        ours = gpu_loads(weight, phy2log, logcnt, gpus).max(-1)
        old, _, old_counts = eplb.rebalance_experts(weight, *args)
        assert (ours <= gpu_loads(weight, old, old_counts, gpus).max(-1) + 1e-6).all()


def test_swaps_beat_eplb() -> None:
    distance = []
    for weight in tables(False, (8, 64), 5):
        loads = []
        for rebalance in (rebalance_experts, eplb.rebalance_experts):
            phy2log, _, logcnt = rebalance(weight, 80, 4, 2, 8)
            loads.append(gpu_loads(weight, phy2log, logcnt, 8))
        ours, theirs = ((load.max(-1) - load.mean(-1)) for load in loads)
        distance.append((ours / theirs).mean())
    assert np.mean(distance) <= 0.97


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_replicas": 15}, "num_replicas must be a multiple of num_gpus"),
        ({"num_replicas": 8}, "at least the 12 experts"),
        ({"num_groups": 5}, "experts must be a multiple of num_groups"),
        ({"num_nodes": 3}, "num_gpus must be a multiple of num_nodes"),
        ({"weight": -WEIGHT}, "0 or more"),
        ({"weight": WEIGHT * np.nan}, "finite"),
    ],
)
def test_wrong_numbers_are_said(change: dict[str, object], message: str) -> None:
    numbers = {"num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8}
    with pytest.raises(ValueError, match=message):
        rebalance_experts(**{"weight": WEIGHT, **numbers, **change})  # type: ignore[arg-type]


def clustered(num_steps: int, experts: int, k: int) -> np.ndarray:
    """Steps in which experts of one topic occur together, some more often."""
    random = np.random.default_rng(8)
    often = np.log(1 / np.arange(1, experts + 1) ** 0.8)[random.permutation(experts)]
    topic = random.permutation(experts) % 8
    of_step = random.integers(0, 8, num_steps)
    weight = often + np.where(topic == of_step[:, None], 2.0, 0.0)
    drawn = np.argsort(-(weight + random.gumbel(size=weight.shape)), axis=-1)[:, :k]
    steps = np.zeros((num_steps, experts), bool)
    steps[np.arange(num_steps)[:, None], drawn] = True
    return steps


def copies_of(layer: tuple[tuple[int, ...], ...], experts: int) -> list[int]:
    """Copies of each expert; none is twice on a rank."""
    assert all(len(set(rank)) == len(rank) for rank in layer)
    counts = [sum(e in rank for rank in layer) for e in range(experts)]
    assert min(counts) >= 1
    return counts


def test_expected_busiest_is_what_the_choice_gives() -> None:
    layer = balance(
        [LayerLoad.uniform(24, 4)], [RankRoom(10**6)] * 4, [1], replica_bytes=10
    ).layers[0]
    steps = draw_steps(LayerLoad.uniform(24, 4), 300)
    assert (steps.sum(1) == 4).all()
    holders = [[r for r, held in enumerate(layer) if e in held] for e in range(24)]
    choice = ReplicaChoice(holders, 4)
    chosen = [choice.experts(np.flatnonzero(s).tolist()).values() for s in steps]
    mean = np.mean([np.bincount(list(ranks)).max() for ranks in chosen])
    assert expected_busiest(layer, steps) == pytest.approx(mean)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_balance_of_uniform_routing(ranks: int) -> None:
    """More copies, fewer experts on the busiest rank; all of them: ceil(K / P)."""
    load, steps = LayerLoad.uniform(64, 8), draw_steps(LayerLoad.uniform(64, 8), 1000)
    expected = []
    for budget in (0, 16, 32, 64, 64 * ranks):
        placed = balance([load], [RankRoom(10**6)] * ranks, [1], replica_bytes=budget)
        held = [len(rank) for rank in placed.layers[0]]
        assert sum(copies_of(placed.layers[0], 64)) == 64 + placed.num_copies
        assert placed.num_copies == min(budget, 64 * (ranks - 1))
        assert max(held) - min(held) <= 2
        expected.append(expected_busiest(placed.layers[0], steps))
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] == -(-8 // ranks)


def test_what_was_recorded_beats_what_was_not() -> None:
    """Counts help, co-activations more; on steps that were not in the record."""
    steps = clustered(6000, 64, 8)
    seen, later = steps[:3000].astype(float), steps[3000:]
    found = []
    for load in (
        LayerLoad.uniform(64, 8),
        LayerLoad(seen.sum(0), None, 8),
        LayerLoad(seen.sum(0), seen.T @ seen, 8),
    ):
        placed = balance([load], [RankRoom(10**6)] * 4, [1], replica_bytes=16)
        found.append(expected_busiest(placed.layers[0], later))
    assert found[1] < 0.9 * found[0]
    assert found[2] < found[1]


def test_a_skewed_layer_gets_more_of_the_memory() -> None:
    even, skewed = LayerLoad.uniform(32, 4), LayerLoad(1 / np.arange(1.0, 33.0) ** 2)
    rooms = [RankRoom(10**6)] * 4
    placed = balance([even, skewed], rooms, [1, 1], replica_bytes=6, objective="rows")
    assert copies_of(placed.layers[0], 32) == [1] * 32
    assert copies_of(placed.layers[1], 32)[0] == 4  # all ranks have the first


def test_rooms_of_ranks_are_kept() -> None:
    """Slots, bytes and speed of unequal ranks."""
    ranks = [RankRoom(10_000, speed=2.0), RankRoom(500), RankRoom(2_000, slots=9)]
    placed = balance([LayerLoad.uniform(32, 4)] * 2, ranks, [10, 20])
    for rank, room in enumerate(ranks):
        held = [len(layer[rank]) for layer in placed.layers]
        assert held[0] * 10 + held[1] * 20 <= room.num_bytes
        assert max(held) <= (room.slots or 32)
    for layer in placed.layers:
        copies_of(layer, 32)
    assert placed.layers[0][0] == tuple(range(32))  # the fast one has room for all
    bare = balance([LayerLoad.uniform(32, 4)], [ranks[0], RankRoom(10**4)], [1],
                   replica_bytes=0)  # fmt: skip
    assert [len(held) for held in bare.layers[0]] == [22, 10]
    with pytest.raises(ValueError, match=r"room for \[3, 3\]"):
        balance([LayerLoad.uniform(32, 4)], [RankRoom(30)] * 2, [10])


def test_rows_are_balanced_too() -> None:
    weight = 1e6 / np.arange(1.0, 65.0) ** 1.2
    rooms = [RankRoom(10**6, slots=10)] * 8
    placed = balance([LayerLoad(weight)], rooms, [1], objective="rows")
    share = (weight / weight.sum())[None]
    busy = expected_busiest(placed.layers[0], share, [1.0] * 8)
    old, _, counts = eplb.rebalance_experts(weight[None], 80, 1, 1, 8)
    theirs = gpu_loads(weight[None], old, counts, 8).max() / weight.sum()
    assert busy <= theirs + 1e-12


def test_copies_stop_where_they_do_not_pay() -> None:
    placed, expected = balance_while_it_pays(
        [LayerLoad.uniform(64, 8)] * 3, [RankRoom(10**6)] * 2, [1] * 3
    )
    gains = 1 - np.array(expected[1:]) / np.array(expected[:-1])
    assert (gains[:-1] >= 0.01).all() and gains[-1] < 0.01
    assert placed.num_copies == 4 * 3 * (len(expected) - 2)
    none, _ = balance_while_it_pays([LayerLoad.uniform(64, 8)], [RankRoom(32)] * 2, [1])
    assert none.num_copies == 0
