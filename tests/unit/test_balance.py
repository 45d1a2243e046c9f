"""Replicas: where they go, and which one serves an expert in a step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks import eplb
from mlx_ep.placement import ReplicaChoice, rebalance_experts

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
            assert choice.bound(ids) <= least


def test_the_choice_on_many_ranks() -> None:
    random = np.random.default_rng(3)
    holders = [sorted({e % 12, (e * 5 + 3) % 12}) for e in range(96)]
    choice = ReplicaChoice(holders, 12)
    for tokens in (1, 4, 16):
        ids = np.concatenate([random.permutation(96)[:8] for _ in range(tokens)])
        chosen = choice.experts(ids.tolist())
        assert all(rank in holders[e] for e, rank in chosen.items())
        least = choice.bound(ids.tolist())
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
