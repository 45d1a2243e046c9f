"""Replicas: which one serves an expert in a step."""

from __future__ import annotations

import io
import itertools
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.placement import (
    Placement,
    ReplicaChoice,
)
from mlx_ep.placement.level import level_rows
from mlx_ep.rows import serving_local_slots, serving_slots


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
        of = speeds or [1.0] * ranks
        reads = [busiest(list(chosen.values()), of) for chosen in (plain, levelled)]
        assert reads[0] == reads[1]
        busiest_rows = [
            max(sum(counts[e] for e in c if c[e] == r) / of[r] for r in range(ranks))
            for c in (plain, levelled)
        ]
        assert busiest_rows[1] <= busiest_rows[0]
        plain_rows.append(busiest_rows[0])
        levelled_rows.append(busiest_rows[1])
    assert np.mean(levelled_rows) < 0.99 * np.mean(plain_rows)
    assert level_rows(choice, dict.fromkeys(used, 1)) == choice.experts(used)


@pytest.mark.parametrize(("tokens", "most"), [(2, 1.02), (4, 1.01), (16, 1.001)])
def test_rows_of_two_ranks_are_level(tokens: int, most: float) -> None:
    """64 experts, half of them on both ranks: over half of the rows, on average."""
    random = np.random.default_rng(13)
    holders = [[0]] * 16 + [[0, 1]] * 32 + [[1]] * 16
    choice, over_half = ReplicaChoice(holders, 2), []
    for _ in range(100):
        ids = [e for _ in range(tokens) for e in random.permutation(64)[:8].tolist()]
        counts = Counter(ids)
        levelled = level_rows(choice, counts)
        rows = [sum(counts[e] for e in counts if levelled[e] == r) for r in (0, 1)]
        over_half.append(max(rows) / (4 * tokens))
    assert np.mean(over_half) <= most


def test_rows_are_levelled_where_asked() -> None:
    """All on both ranks, rows 4 3 1 1: the heaviest goes for one of the lightest."""
    placement = Placement(((0, 1, 2, 3), (0, 1, 2, 3)))
    ids = np.array([[0, 1], [0, 1], [0, 1], [0, 2], [3, -1]], np.int32)
    plain = [[0, 1], [0, 1], [0, 1], [0, 6], [7, -1]]
    assert placement.serve(ids).tolist() == plain
    levelled = placement.serve(ids, levels_rows=True)
    assert levelled.tolist() == [[4, 1], [4, 1], [4, 1], [4, 6], [3, -1]]
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
