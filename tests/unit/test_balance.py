"""Replicas: where they go, and which one serves an expert in a step."""

from __future__ import annotations

import io
import itertools

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import eplb
from mlx_ep.placement import (
    LayerLoad,
    Placement,
    RankRoom,
    ReplicaChoice,
    balance,
    balance_while_it_pays,
    draw_steps,
    expected_busiest,
    rebalance_experts,
)
from mlx_ep.placement.level import level_rows
from mlx_ep.rows import serving_local_slots, serving_slots

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


def random_holders(random: np.random.Generator, experts: int, ranks: int) -> list:
    return [
        sorted(random.choice(ranks, random.integers(1, ranks + 1), False).tolist())
        for _ in range(experts)
    ]


def busiest(ranks: list[int], speeds: list[float]) -> float:
    return max(ranks.count(r) / speed for r, speed in enumerate(speeds))


def test_the_choice_is_the_minimum() -> None:
    """Against every choice there is; also by exchanges, as on more than 8 ranks."""
    random = np.random.default_rng(2)
    for case in range(400):
        ranks, experts = int(random.integers(1, 5)), int(random.integers(1, 8))
        holders = random_holders(random, experts, ranks)
        speeds = random.integers(1, 4, ranks).astype(float) if case % 2 else [1.0] * 4
        speeds = [float(s) for s in speeds[:ranks]]
        ids = random.integers(-1, experts, random.integers(0, 9)).tolist()
        choice = ReplicaChoice(holders, ranks, speeds)
        chosen, distinct = choice.experts(ids), sorted({e for e in ids if e >= 0})
        assert sorted(chosen) == distinct
        assert all(chosen[e] in holders[e] for e in distinct)
        assert chosen == choice.experts(ids[::-1] + ids)  # of the set alone
        least = min(
            busiest(list(picked), speeds)
            for picked in itertools.product(*(holders[e] for e in distinct))
        )
        assert busiest(list(chosen.values()), speeds) == least
        exchanged = choice._exchanged([e for e in choice._order if e in distinct])
        assert busiest(list(exchanged.values()), speeds) == least
        if distinct and speeds == [1.0] * ranks:
            assert fewest_of_the_busiest(choice, ids) <= least


def fewest_of_the_busiest(choice, expert_ids):
    """Distinct experts that the busiest rank reads at least, for equal speeds."""
    distinct = {e for e in expert_ids if e >= 0}
    single = [0] * choice.num_ranks
    for expert in distinct:
        if len(choice.holders[expert]) == 1:
            single[choice.holders[expert][0]] += 1
    return max([-(-len(distinct) // choice.num_ranks), *single])


def test_the_choice_on_many_ranks() -> None:
    random = np.random.default_rng(3)
    holders = [sorted({e % 12, (e * 5 + 3) % 12}) for e in range(96)]
    choice = ReplicaChoice(holders, 12)
    for tokens in (1, 4, 16):
        ids = np.concatenate([random.permutation(96)[:8] for _ in range(tokens)])
        chosen = choice.experts(ids.tolist())
        assert all(rank in holders[e] for e, rank in chosen.items())
        least = fewest_of_the_busiest(choice, ids.tolist())
        assert least <= busiest(list(chosen.values()), [1.0] * 12) <= least + 1
        served = choice.rows(ids.reshape(tokens, 8))
        assert all(r in holders[e] for e, r in zip(ids, served.reshape(-1).tolist()))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_full_replicas_share_alike(ranks: int) -> None:
    choice = ReplicaChoice([range(ranks)] * 32, ranks)
    random = np.random.default_rng(ranks)
    for k in range(1, 13):
        chosen = list(choice.experts(random.permutation(32)[:k].tolist()).values())
        assert busiest(chosen, [1.0] * ranks) == -(-k // ranks)


def test_never_worse_than_one_copy_each() -> None:
    random = np.random.default_rng(4)
    one = [[e // 32] for e in range(128)]
    more = [
        sorted({*ranks, int(random.integers(4))}) if random.random() < 0.3 else ranks
        for ranks in one
    ]
    plain, choice = ReplicaChoice(one, 4), ReplicaChoice(more, 4)
    for _ in range(200):
        ids = np.concatenate([random.permutation(128)[:8] for _ in range(8)]).tolist()
        with_replicas = busiest(list(choice.experts(ids).values()), [1.0] * 4)
        assert with_replicas <= busiest(list(plain.experts(ids).values()), [1.0] * 4)


def test_levelled_reads_as_few_experts_and_never_more_rows() -> None:
    """Rows of the busiest rank: below those of `experts` by 1% and more on average."""
    random = np.random.default_rng(12)
    levelled_rows, plain_rows = [], []
    for case in range(200):
        ranks, experts = int(random.integers(2, 5)), int(random.integers(8, 40))
        holders = random_holders(random, experts, ranks)
        speeds = [float(s) for s in random.integers(1, 3, ranks)] if case % 2 else None
        choice = ReplicaChoice(holders, ranks, speeds)
        counts = random.integers(0, 9, experts)
        used = np.flatnonzero(counts).tolist()
        rows_of = {e: int(counts[e]) for e in used}
        plain, levelled = choice.experts(used), level_rows(choice, rows_of)
        assert sorted(levelled) == used
        assert all(rank in holders[e] for e, rank in levelled.items())
        assert sorted(plain.values()) == sorted(levelled.values())
        of = speeds or [1.0] * ranks
        busiest_rows = [
            max(sum(counts[e] for e in c if c[e] == r) / of[r] for r in range(ranks))
            for c in (plain, levelled)
        ]
        assert busiest_rows[1] <= busiest_rows[0]
        plain_rows.append(busiest_rows[0])
        levelled_rows.append(busiest_rows[1])
    assert np.mean(levelled_rows) < 0.99 * np.mean(plain_rows)
    assert level_rows(choice, dict.fromkeys(used, 1)) == choice.experts(used)


def test_rows_are_levelled_where_asked() -> None:
    """All on both ranks, rows 4 3 1 1: the two heaviest go to different ranks."""
    placement = Placement(((0, 1, 2, 3), (0, 1, 2, 3)))
    ids = np.array([[0, 1], [0, 1], [0, 1], [0, 2], [3, -1]], np.int32)
    plain = [[0, 1], [0, 1], [0, 1], [0, 6], [7, -1]]
    assert placement.serve(ids).tolist() == plain
    levelled = placement.serve(ids, levels_rows=True)
    assert levelled.tolist() == [[0, 5], [0, 5], [0, 5], [0, 6], [3, -1]]
    assert serving_slots(mx.array(ids), placement, True).tolist() == levelled.tolist()
    one = np.array([[3, 0]], np.int32)
    assert (placement.serve(one, True) == placement.serve(one)).all()


def test_rows_are_levelled() -> None:
    """Every pair has one holder; the busiest rank's rows meet Hall's bound."""
    random = np.random.default_rng(6)
    for case in range(60):
        ranks, experts = int(random.integers(1, 5)), int(random.integers(4, 12))
        holders = random_holders(random, experts, ranks)
        speeds = [float(s) for s in random.integers(1, 3, ranks)] if case % 2 else None
        choice = ReplicaChoice(holders, ranks, speeds)
        ids = random.integers(-1, experts, (30, 4)).astype(np.int32)
        served = choice.rows(ids)
        assert ((served >= 0) == (ids >= 0)).all()
        assert all(
            r in holders[e]
            for e, r in zip(ids.reshape(-1), served.reshape(-1).tolist())
            if e >= 0
        )
        if speeds is None:
            counts = np.bincount(ids[ids >= 0], minlength=experts)
            sets = [
                s for n in range(1, ranks + 1)
                for s in itertools.combinations(range(ranks), n)
            ]  # fmt: skip
            least = max(
                -(
                    -sum(counts[e] for e in range(experts) if {*holders[e]} <= {*s})
                    // len(s)
                )
                for s in sets
            )
            assert np.bincount(served[served >= 0]).max() == least


@pytest.mark.parametrize(
    ("holders", "speeds", "message"),
    [
        ([[0], []], None, "must have a rank"),
        ([[0], [2]], None, "ranks 0..1"),
        ([[0], [1]], [1.0], "2 numbers above 0"),
        ([[0], [1]], [1.0, 0.0], "2 numbers above 0"),
    ],
)
def test_wrong_choices_are_said(
    holders: list[list[int]], speeds: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ReplicaChoice(holders, 2, speeds)


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
    mean = np.mean([busiest(list(ranks), [1.0] * 4) for ranks in chosen])
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


@pytest.mark.parametrize("num_tokens", [1, 4, 80])
def test_local_slots_of_copies_are_looked_up_on_the_host(num_tokens: int) -> None:
    """As by MLX's ops; nothing is left to compute, so that no layer waits twice."""
    placement = Placement(((0, 1, 2, 5), (2, 3, 4, 0), (4, 1)))
    random = np.random.default_rng(num_tokens)
    ids = mx.array(random.integers(-1, 6, (num_tokens, 3)).astype(np.int32))
    served = serving_slots(ids, placement)
    for rank in range(3):
        found = serving_local_slots(ids, placement, rank)
        expected = placement.slots.local_slots(served, rank)
        assert found.tolist() == expected.tolist()
        graph = io.StringIO()
        mx.export_to_dot(graph, serving_local_slots(ids, placement, rank))
        assert "shape=rectangle" not in graph.getvalue()
