"""Every expert has one slot on one rank, whatever divides what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ep.placement import (
    ExpertSizes,
    Part,
    Placement,
    apportion,
    place,
    read_placement,
    runs,
    write_placement,
)


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("num_experts", [1, 2, 3, 7, 8, 10, 60, 64, 128])
def test_contiguous_covers_every_expert_once(num_experts: int, num_ranks: int) -> None:
    placement = Placement.contiguous(num_experts, num_ranks)
    held = [expert for rank in placement.rank_experts for expert in rank]
    assert held == list(range(num_experts))
    counts = [placement.num_slots(rank) for rank in range(num_ranks)]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_contiguous_examples() -> None:
    counts = [len(e) for e in Placement.contiguous(10, 4).rank_experts]
    assert counts == [3, 3, 2, 2]
    assert Placement.contiguous(2, 3).rank_experts == ((0,), (1,), ())


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(0, 2), (4, 0), (-1, 1)])
def test_contiguous_needs_experts_and_ranks(num_experts: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match="at least 1 expert and 1 rank"):
        Placement.contiguous(num_experts, num_ranks)


@pytest.mark.parametrize("rank_experts", [(), ((0, 0), (1,)), ((0,), (2,))])
def test_each_expert_is_held(rank_experts: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="none twice on a rank"):
        Placement(rank_experts)


def test_a_dense_model_has_no_experts_to_place() -> None:
    assert Placement(((), ())).is_dense
    assert not Placement(((0,), ())).is_dense


def test_maps_of_an_explicit_placement() -> None:
    placement = Placement(((3, 0), (), (1, 4, 2)))
    assert placement.num_experts == 5
    np.testing.assert_array_equal(placement.expert_ranks, [0, 2, 2, 0, 2])
    np.testing.assert_array_equal(placement.expert_slots, [1, 0, 2, 0, 1])
    ids = mx.array([[0, 1, -1], [4, 3, 2]], mx.int32)
    assert placement.local_slots(ids, 0).tolist() == [[1, -1, -1], [-1, 0, -1]]
    assert placement.local_slots(ids, 1).tolist() == [[-1, -1, -1], [-1, -1, -1]]
    assert placement.local_slots(ids, 2).tolist() == [[-1, 0, -1], [1, -1, 2]]


def test_describe() -> None:
    placement = Placement.contiguous(64, 2)
    assert placement.describe(1) == "experts 32..63 (32 of 64 per layer)"
    placement = Placement(((0, 1, 2, 7), (), (3, 4, 5, 6)))
    assert placement.describe(0) == "experts 0..2,7 (4 of 8 per layer)"
    assert placement.describe(1) == "experts none (0 of 8 per layer)"


def test_runs() -> None:
    assert runs([]) == []
    assert runs([4, 5, 6, 1, 3, 4]) == [(4, 3), (1, 1), (3, 2)]


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [0, 1, 7, 60, 128])
def test_apportion_gives_everything_away(total: int, num_ranks: int) -> None:
    weights = [512, 128, 64, 63, 1][:num_ranks]
    counts = apportion(total, weights)
    assert sum(counts) == total
    assert counts == sorted(counts, reverse=True)  # as the weights are


def test_apportion_examples() -> None:
    assert apportion(10, [1, 1, 1, 1]) == [3, 3, 2, 2]
    assert apportion(128, [512, 128, 64]) == [94, 23, 11]
    assert apportion(5, [0, 3, 0]) == [0, 5, 0]
    assert apportion(5, [9, 1], limits=[2, 9]) == [2, 3]
    with pytest.raises(ValueError, match="cannot be divided"):
        apportion(5, [9, 1], limits=[2, 2])


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=6),
    expert=st.integers(1, 50),
    data=st.data(),
)
def test_no_rank_overflows_if_any_split_fits(
    sizes: list[int], expert: int, data: st.DataObject
) -> None:
    room = sum(size // expert for size in sizes)
    num_experts = data.draw(st.integers(1, max(room, 1) + 2))
    of_model = ExpertSizes(num_experts, expert, 7, (8,))
    memory = [size + 7 for size in sizes]
    if num_experts > room:
        with pytest.raises(ValueError, match=f"room for {room}"):
            place(of_model, len(sizes), memory=memory)
        assert place(of_model, len(sizes), memory=memory, must_fit=False)
        return
    placement = place(of_model, len(sizes), memory=memory)
    assert placement.num_experts == num_experts
    for rank, limit in enumerate(memory):
        assert 7 + placement.num_slots(rank) * expert <= limit


@given(
    memory=st.lists(st.integers(1, 4000), min_size=4, max_size=4),
    num_experts=st.integers(1, 12),
    ep_size=st.sampled_from([1, 2]),
)
def test_shared_width_fits_the_memory(
    memory: list[int], num_experts: int, ep_size: int
) -> None:
    """Units of 32 columns of 96; an expert of 30 bytes, so 10 bytes a unit."""
    sizes = ExpertSizes(num_experts, 30, 100, (96,), unit=32)
    if 4 // ep_size > 3:  # more ranks than units
        with pytest.raises(ValueError, match="multiples of the quantization group"):
            place(sizes, 4, ep_size=ep_size, memory=memory)
        return
    groups = [memory[:2], memory[2:]]
    # What fits, by trying every number of experts and every split of 3 units.
    room = [
        max(
            n
            for n in range(num_experts + 1)
            if n == 0
            or any(
                first <= 2
                and a >= 100 + n * first * 10
                and b >= 100 + n * (3 - first) * 10
                for first in (1, 2)
            )
        )
        for a, b in groups
    ]
    if sum(room) < num_experts:
        with pytest.raises(ValueError, match="must hold"):
            place(sizes, 4, ep_size=ep_size, memory=memory)
        return
    placement = place(sizes, 4, ep_size=ep_size, memory=memory)
    assert placement.parts is not None
    for rank, limit in enumerate(memory):
        held = placement.num_slots(rank) * placement.parts[rank].columns // 32 * 10
        assert not held or 100 + held <= limit


@pytest.mark.parametrize("num_experts", [1, 3, 10])
@pytest.mark.parametrize(
    ("num_ranks", "ep_size", "width", "unit"),
    [(4, 2, 96, 32), (3, 1, 96, 32), (6, 2, 7, 1), (4, 4, 8, 8), (5, 1, 11, 2)],
)
def test_parts_cover_every_expert_once(
    num_experts: int, num_ranks: int, ep_size: int, width: int, unit: int
) -> None:
    sizes = ExpertSizes(num_experts, 1, 0, (width,), unit)
    if width % unit:
        with pytest.raises(ValueError, match=r"is 5\.5 of them"):
            place(sizes, num_ranks, ep_size=ep_size)
        return
    placement = place(sizes, num_ranks, ep_size=ep_size)
    seen = np.zeros((num_experts, width), int)
    for rank, experts in enumerate(placement.rank_experts):
        part = placement.part(rank) or Part(0, width, width)
        assert part.columns % unit == 0
        seen[list(experts), part.start : part.stop] += 1
    assert (seen == 1).all()


def test_maps_of_shared_widths() -> None:
    placement = Placement.from_groups([2, 1], [(5, 3), (4, 4)])
    assert placement.parts == ((0, 5, 8), (5, 8, 8), (0, 4, 8), (4, 8, 8))
    assert placement.num_experts == 3
    np.testing.assert_array_equal(placement.expert_ranks, [0, 0, 2])
    np.testing.assert_array_equal(placement.expert_slots, [0, 1, 0])
    ids = mx.array([[2, 0, -1]], mx.int32)
    found = [placement.local_slots(ids, rank).tolist() for rank in range(4)]
    assert found == [[[-1, 0, -1]]] * 2 + [[[0, -1, -1]]] * 2
    assert placement.describe(1) == "experts 0..1 (2 of 3 per layer), width 5..7 of 8"


@pytest.mark.parametrize(
    ("rank_experts", "parts", "match"),
    [
        (((0,), (0,)), (Part(0, 4, 8),), "as many parts"),
        (((0,), (0,)), (Part(0, 4, 8), Part(5, 8, 8)), "without gap or overlap"),
        (((0,), (0,)), (Part(0, 4, 8), Part(3, 8, 8)), "without gap or overlap"),
        (((0,), (0,)), (Part(0, 8, 8), Part(8, 8, 8)), "without gap or overlap"),
        (((0,), (1,)), (Part(0, 4, 8), Part(4, 8, 8)), "without gap or overlap"),
        (((0,), (2,)), (Part(0, 8, 8), Part(0, 8, 8)), r"each of the experts 0\.\.E-1"),
    ],
)
def test_parts_make_up_the_width(
    rank_experts: tuple[tuple[int, ...], ...], parts: tuple[Part, ...], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        Placement(rank_experts, parts)


def test_place_refuses() -> None:
    sizes = ExpertSizes(8, 1, 0, (96,), unit=64)
    with pytest.raises(ValueError, match="one of 1, 2, 4; got 3"):
        place(sizes, 4, ep_size=3)
    with pytest.raises(ValueError, match=r"the width of 96 is 1\.5 of them"):
        place(sizes, 2, ep_size=1)
    with pytest.raises(ValueError, match="2 of them; got 3"):
        place(sizes, 2, memory=[1, 2, 3])
    with pytest.raises(ValueError, match="this model has 32, 96"):
        place(ExpertSizes(8, 1, 0, (32, 96)), 2, ep_size=1)


def test_digest_tells_placements_apart() -> None:
    same = Placement(((0, 1), (2,)))
    assert same.digest == Placement.from_counts([2, 1]).digest
    others = [
        Placement(((1, 0), (2,))),
        Placement(((0,), (1, 2))),
        Placement.from_groups([3], [(4, 4)]),
        Placement.from_groups([3], [(5, 3)]),
    ]
    assert len({p.digest for p in (same, *others)}) == 5


# ---------------------------------------------------------------- files


def test_placement_file_round_trip(tmp_path: Path) -> None:
    placement = Placement(((3, 0), (), (1, 4, 5, 2)))
    write_placement(tmp_path / "p.json", placement)
    assert read_placement(tmp_path / "p.json", 6, 3) == placement
    with pytest.raises(ValueError, match="cannot say how ranks share the width"):
        write_placement(tmp_path / "p.json", Placement.from_groups([3], [(4, 4)]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "another"}, '"format": "mlx_ep placement"'),
        ({"version": 2}, '"version": 1'),
        ({"experts": 5}, 'the model\'s 4 experts per layer; its "experts" is 5'),
        ({"layer": []}, "keys that are not known: layer"),
        ({"ranks": {}}, "one list per rank"),
        ({"ranks": [["0-3"]]}, "is for 1 ranks; this run has 2"),
        ({"ranks": [["0-1"], [3]]}, "1 are missing: 2"),
        ({"ranks": [["0-2", 1], [2, 3]]}, "rank 0 has more than once: 1"),
        ({"ranks": [["0-2"], [4]]}, "0 to 3, .* got 4"),
        ({"ranks": [["0-99999999999"], []]}, "got '0-99999999999'"),
        ({"ranks": [["3-0"], []]}, "got '3-0'"),
        ({"ranks": [[True], []]}, "got True"),
        ({"ranks": [[-1], []]}, "got -1"),
        ({"ranks": [[[0]], []]}, r"got \[0\]"),
    ],
)
def test_placement_file_is_checked(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    content = {"format": "mlx_ep placement", "version": 1, "experts": 4}
    content["ranks"] = [["0-2"], [3]]
    file = tmp_path / "p.json"
    file.write_text(json.dumps(content))
    assert read_placement(file, 4, 2).rank_experts == ((0, 1, 2), (3,))
    file.write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=match):
        read_placement(file, 4, 2)


@pytest.mark.parametrize(
    ("text", "match"), [("{", "not valid JSON"), ("[]", "must hold a JSON object")]
)
def test_placement_file_that_is_none(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_placement(tmp_path / "p.json", 4, 2)
    with pytest.raises(ValueError, match="Every rank reads its own copy"):
        read_placement(tmp_path / "absent.json", 4, 2)
