"""Placements that differ by layer, what moves between them, and a few exchanges."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mlx_ep import Placement
from mlx_ep.placement import (
    LayerLoad,
    Moves,
    draw_steps,
    expected_busiest,
    improve,
    keep_slots,
    read_placement,
    with_replicas,
    write_placement,
)
from tests.support.placements import random_placement


def test_moves_by_hand() -> None:
    moves = Moves.between(Placement(((0, 1), (2, 3))), Placement(((0, 2), (3, 1))))
    assert moves.kept == ((0, -1), (1, -1))
    assert [tuple(t) for t in moves.transfers] == [(0, 1, 1, 1), (1, 0, 0, 1)]
    assert moves.most_of_a_pair == 1


def test_moves_take_from_the_rank_that_sends_least() -> None:
    old = Placement(((0, 1), (0, 1), ()))
    moves = Moves.between(old, Placement(((0, 1), (0, 1), (1, 0))))
    assert sorted(t.source for t in moves.transfers) == [0, 1]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_moves_cover_every_slot_once(num_ranks: int) -> None:
    random = np.random.default_rng(num_ranks)
    for _ in range(100):
        old, new = (random_placement(random, 6, num_ranks) for _ in range(2))
        moves = Moves.between(old, new)
        filled = {(t.target, t.target_slot): t for t in moves.transfers}
        assert len(filled) == len(moves.transfers)
        for rank, experts in enumerate(new.rank_experts):
            for slot, expert in enumerate(experts):
                kept = moves.kept[rank][slot]
                if kept >= 0:
                    assert old.rank_experts[rank][kept] == expert
                    assert (rank, slot) not in filled
                    continue
                transfer = filled[rank, slot]
                assert transfer.source != rank
                assert old.rank_experts[transfer.source][transfer.source_slot] == expert


def test_moves_between_other_sizes_are_refused() -> None:
    plain = Placement.contiguous(4, 2)
    for other in (Placement.contiguous(5, 2), Placement.contiguous(4, 3)):
        with pytest.raises(ValueError, match=re.escape("(experts, ranks) (4, 2)")):
            Moves.between(plain, other)
    with pytest.raises(ValueError, match="whole experts"):
        Moves.between(plain, Placement.from_groups([4], [(4, 4)]))


def test_what_stays_keeps_its_slot() -> None:
    old = Placement(((0, 1, 2), (3, 4, 5)))
    new = keep_slots(old, [(1, 2, 5), (4, 3, 0, 1)])
    assert new.rank_experts == ((5, 1, 2), (3, 4, 0, 1))
    assert keep_slots(old, [(2,), (0, 1, 3, 4, 5)]).rank_experts[0] == (2,)


def skewed(num_experts: int, seed: int) -> LayerLoad:
    used = np.random.default_rng(seed).permutation(1 / np.arange(1, num_experts + 1))
    return LayerLoad(used, None, 4)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_exchanges_lower_what_the_busiest_rank_reads(num_ranks: int) -> None:
    load = skewed(32, num_ranks)
    # The most used experts are together.
    order = np.argsort(-load.used).tolist()
    size = 32 // num_ranks
    held = [sorted(order[r * size : (r + 1) * size]) for r in range(num_ranks)]
    held[-1] += order[num_ranks * size :]
    held[0] += held[-1][:2]  # two have a copy
    old = Placement(tuple(map(tuple, held)))
    found = improve(old, load, most_exchanges=6)
    new = found.placement
    assert [new.num_slots(r) for r in range(num_ranks)] == list(map(len, held))
    steps = draw_steps(load, 4000, seed=9)
    before, after = (expected_busiest(p.rank_experts, steps) for p in (old, new))
    assert after < 0.95 * before
    assert found.after < found.before
    # An exchange moves two experts at most; all others keep their slots.
    assert 0 < len(Moves.between(old, new).transfers) <= 12


def test_a_level_layer_is_left_alone() -> None:
    plain = Placement.contiguous(16, 4)
    found = improve(plain, LayerLoad.uniform(16, 4))
    assert found.placement is plain and found.before == found.after


def test_the_first_exchange_is_the_best_of_all() -> None:
    """Against every exchange there is, by the sum that is made small."""
    load = skewed(6, 1)
    old = Placement(((0, 1, 2, 3), (3, 4, 5)))

    def total(placement: Placement) -> float:
        moments, masks = load.moments("activated"), [0] * 6
        for rank, experts in enumerate(placement.rank_experts):
            for expert in experts:
                masks[expert] |= 1 << rank
        sums = 0.0
        for ranks in (1, 2, 3):
            inside = [e for e in range(6) if masks[e] & ~ranks == 0]
            sums += moments[np.ix_(inside, inside)].sum() / ranks.bit_count() ** 2
        return float(sums)

    def exchanged() -> list[Placement]:
        found = []
        for rank, other in ((0, 1), (1, 0)):
            held, there = old.rank_experts[rank], old.rank_experts[other]
            for slot in range(len(held)):
                for new in set(range(6)) - set(held):
                    ranks = [list(experts) for experts in old.rank_experts]
                    ranks[rank][slot] = new
                    found.append(ranks)
                    if new in there and held[slot] not in there:
                        both = [list(experts) for experts in ranks]
                        both[other][there.index(new)] = held[slot]
                        found.append(both)
        whole = [r for r in found if len({e for held in r for e in held}) == 6]
        return [Placement(tuple(map(tuple, ranks))) for ranks in whole]

    made = improve(old, load, most_exchanges=1, least_gain=-1.0).placement
    assert total(made) == pytest.approx(min(map(total, exchanged())))
    assert total(made) < total(old)


def layered() -> Placement:
    layers = (Placement(((0, 1), (2, 3))), Placement(((0, 1, 2), (2, 3, 0))))
    return Placement(((0, 1), (2, 3)), layers=layers)


def test_layers_of_a_placement() -> None:
    placement = layered()
    assert placement.of_layer(1).has_replicas and not placement.of_layer(0).has_replicas
    plain = Placement(((0, 1), (2, 3)))
    assert plain.of_layer(7) is plain
    assert placement.digest != plain.digest
    assert placement.describe(0) == (
        "experts 0..1 (2 of 4 per layer); 2 copies in all layers, 0 to 2 of a layer"
    )
    for other in (Placement.contiguous(5, 2), Placement.contiguous(4, 1)):
        with pytest.raises(ValueError, match="4 whole experts on 2 ranks"):
            Placement(((0, 1), (2, 3)), layers=(other,))


def test_a_file_with_layers(tmp_path: Path) -> None:
    write_placement(file := tmp_path / "p.json", layered())
    assert read_placement(file, 4, 2) == layered()
    text = file.read_text()
    file.write_text(text.replace('"layers": [', '"layers": [3, '))
    with pytest.raises(ValueError, match="one list per rank"):
        read_placement(file, 4, 2)
    file.write_text('{"format": "mlx_ep placement", "version": 1, "experts": 4, '
                    '"ranks": [["0-1"], ["2-3"]], "layers": 2}')  # fmt: skip
    with pytest.raises(ValueError, match="one entry per layer"):
        read_placement(file, 4, 2)


def test_a_skewed_layer_has_more_copies() -> None:
    """One budget, three layers; what a checkpoint is read by stays in its slots."""
    hot = np.full(16, 1.0)
    hot[:3] = 200.0
    loads = [LayerLoad(np.ones(16), None, 4), LayerLoad(hot, None, 4)]
    loads.append(LayerLoad(np.ones(16), None, 4))
    base = Placement.contiguous(16, 2)
    placement = with_replicas(base, [10] * 3, loads, 60, None)
    copies = [layer.num_copies for layer in placement.layers]
    assert copies[1] != copies[0] == copies[2] and sum(copies) <= 12
    for layer in placement.layers:
        for first, held in zip(base.rank_experts, layer.rank_experts, strict=True):
            assert held[: len(first)] == first
    for rank in range(2):
        held_copies = sum(p.num_slots(rank) - 8 for p in placement.layers)
        assert held_copies * 10 <= 60
