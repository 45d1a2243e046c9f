"""Packing by hand, then its invariants; what joins is what was split."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ep.placement import Placement
from mlx_ep.rows import (
    get_dispatch_layout,
    join,
    join_rows,
    limit_to_capacity,
    pack,
    pad_routing,
    routing_from_words,
    routing_words,
    split_rows,
    with_zeros,
)
from mlx_ep.types import Routing, TokenCounts


def masks(num_ranks: int) -> st.SearchStrategy[np.ndarray]:
    row = st.lists(st.booleans(), min_size=num_ranks, max_size=num_ranks)
    return st.lists(row, max_size=9).map(
        lambda rows: np.array(rows, bool).reshape(len(rows), num_ranks)
    )


def test_pack_by_hand() -> None:
    # t0 for r1; t1 for r0 and r1; t2 for r0.
    packing = pack(np.array([[0, 1], [1, 1], [1, 0]], bool))
    # (t1,r0) (t2,r0) | (t0,r1) (t1,r1)
    assert packing.tokens.tolist() == [1, 2, 0, 1]
    assert packing.counts == (2, 2)
    assert packing.positions.tolist() == [[-1, 0, 1], [0, 1, -1]]


@pytest.mark.parametrize(
    ("mask", "tokens", "counts", "positions"),
    [
        ([[1], [1]], [0, 1], (2,), [[0, 1]]),  # one rank
        ([[0, 0, 1]], [0], (0, 0, 1), [[-1], [-1], [0]]),  # zeros in front
        ([[1, 0, 1], [1, 0, 0]], [0, 1, 0], (2, 0, 1), [[0, 1], [-1, -1], [0, -1]]),
        ([[0, 0], [0, 0]], [], (0, 0), [[-1, -1], [-1, -1]]),  # nobody needs anything
        ([[1, 1], [1, 1]], [0, 1, 0, 1], (2, 2), [[0, 1], [0, 1]]),  # everybody all
    ],
)
def test_pack_more_by_hand(
    mask: list[list[int]],
    tokens: list[int],
    counts: tuple[int, ...],
    positions: list[list[int]],
) -> None:
    packing = pack(np.array(mask, bool))
    assert packing.tokens.tolist() == tokens
    assert packing.counts == counts
    assert packing.positions.tolist() == positions


def test_pack_without_tokens() -> None:
    packing = pack(np.zeros((0, 3), bool))
    assert packing.tokens.shape == (0,)
    assert packing.counts == (0, 0, 0)
    assert packing.positions.shape == (3, 0)


@given(masks(3))
def test_positions_and_tokens_are_inverse(mask: np.ndarray) -> None:
    packing = pack(mask)
    assert sum(packing.counts) == mask.sum() == len(packing.tokens)
    starts = np.cumsum((0, *packing.counts))
    for (token, rank), needed in np.ndenumerate(mask):
        position = packing.positions[rank, token]
        assert needed == (position >= 0)
        if needed:
            assert packing.tokens[starts[rank] + position] == token
    for rank in range(3):  # within a rank, tokens keep their order
        assert (np.diff(packing.tokens[starts[rank] : starts[rank + 1]]) > 0).all()


def test_exchange_without_processes() -> None:
    """Pack on each rank, transpose the lists, unpack: every row arrives once."""
    random = np.random.default_rng(0)
    tokens = (4, 0, 7)
    masks = [random.random((count, 3)) < 0.6 for count in tokens]
    packings = [pack(mask) for mask in masks]
    chunks = [np.split(p.tokens, np.cumsum(p.counts)[:-1]) for p in packings]
    for owner in range(3):
        received = [(home, t) for home in range(3) for t in chunks[home][owner]]
        expected = [
            (home, t)
            for home in range(3)
            for t in np.flatnonzero(masks[home][:, owner])
        ]
        assert received == expected


def test_layout_by_hand() -> None:
    placement = Placement(((0, 3), (), (2, 1)))
    # t0 twice the same rank, t1 the same expert twice, t2 one of none, t3 no expert.
    ids = mx.array([[0, 3, 2], [1, 1, 1], [-1, 0, -1], [-1, -1, -1]], mx.int32)
    layout = get_dispatch_layout(ids, placement)
    needed = [[1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert layout.token_in_rank.astype(mx.int32).tolist() == needed
    assert layout.rows_per_rank.tolist() == [2, 0, 2]
    assert layout.rows_per_expert.tolist() == [2, 1, 1, 1]


def test_layout_without_tokens() -> None:
    ids = mx.zeros((0, 2), mx.int32)
    layout = get_dispatch_layout(ids, Placement.contiguous(3, 2))
    assert layout.rows_per_rank.tolist() == [0, 0]
    assert layout.rows_per_expert.tolist() == [0, 0, 0]


def test_capacity_by_hand() -> None:
    ids = np.array([[0, 1, 2], [0, 1, 0], [3, 1, 0], [-1, -1, 0]], np.int32)
    kept, dropped = limit_to_capacity(ids, 2)
    # Choice by choice: expert 0 is full after (t0,k0) (t1,k0), 1 after (t0,k1) (t1,k1).
    assert kept.tolist() == [[0, 1, 2], [0, 1, -1], [3, -1, -1], [-1, -1, -1]]
    assert dropped == 4


@given(
    st.lists(st.lists(st.integers(-1, 3), min_size=2, max_size=2), max_size=12),
    st.integers(1, 4),
)
def test_capacity_keeps_the_first_of_each_expert(
    lists: list[list[int]], capacity: int
) -> None:
    ids = np.array(lists, np.int32).reshape(len(lists), 2)
    kept, dropped = limit_to_capacity(ids, capacity)
    seen: dict[int, int] = {}
    for k in range(2):
        for token in range(len(ids)):
            expert = int(ids[token, k])
            seen[expert] = seen.get(expert, 0) + 1
            fits = expert < 0 or seen[expert] <= capacity
            assert kept[token, k] == (expert if fits else -1)
    assert dropped == (kept != ids).sum()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_rows_and_words_survive_together(dtype: mx.Dtype, num_tokens: int) -> None:
    x = mx.random.normal((num_tokens, 7)).astype(dtype)
    ids = mx.random.randint(-1, 9, (num_tokens, 3)).astype(mx.int32)
    gates = mx.random.normal((num_tokens, 3))
    rows, together = split_rows(join_rows(x, Routing(ids, gates)), 7, dtype)
    assert rows.dtype == dtype and mx.array_equal(rows, x)
    apart = routing_from_words(routing_words(Routing(ids, gates)))
    for back in (together, apart):
        assert mx.array_equal(back.expert_ids, ids)
        assert mx.array_equal(back.gates, gates)


def test_special_values_travel_as_bits() -> None:
    x = mx.array([[-0.0, float("inf"), float("nan"), 1e-45]], mx.float32)
    routing = Routing(mx.array([[3, -1]]), mx.array([[0.5, -0.0]]))
    rows, back = split_rows(join_rows(x, routing), 4, mx.float32)
    assert back.gates.view(mx.uint32).tolist() == [[0x3F000000, 0x80000000]]
    assert rows.view(mx.uint32).tolist() == x.view(mx.uint32).tolist()


@pytest.mark.parametrize(
    ("width", "dtype", "moved"),
    [
        (8, mx.bfloat16, mx.uint64),
        (6, mx.float16, mx.uint32),
        (7, mx.bfloat16, mx.bfloat16),
        (2, mx.float32, mx.uint64),
        (3, mx.float32, mx.float32),
    ],
)
def test_rows_are_joined_as_words(width, dtype, moved, monkeypatch) -> None:
    seen, concatenate = [], mx.concatenate

    def watched(parts):
        seen.append(parts[0].dtype)
        return concatenate(parts)

    bits = {2: mx.uint16, 4: mx.uint32}[dtype.size]
    # NaN of every kind, and -0.0: nothing may look at the numbers.
    numbers = [0xFFFFFFFF, 0x7F817FC1, 0x80008000, 0x00010001]
    x = mx.array(numbers, mx.uint32).view(dtype).reshape(-1)
    x = mx.tile(x, 7 * width)[: 5 * width].reshape(5, width)
    monkeypatch.setattr(mx, "concatenate", watched)
    got = with_zeros(join([x[1:4], x[:0], x[4:]]), 2)
    assert seen == [moved, moved]
    expected = concatenate([x[1:], mx.zeros((2, width), dtype)])
    assert mx.array_equal(got.view(bits), expected.view(bits))


def test_padding_has_no_expert() -> None:
    routing = Routing(mx.array([[4, 5]]), mx.array([[0.5, 0.25]]))
    padded = pad_routing(routing, 3)
    assert padded.expert_ids.tolist() == [[4, 5], [-1, -1], [-1, -1]]
    assert padded.gates.tolist() == [[0.5, 0.25], [0, 0], [0, 0]]
    assert pad_routing(routing, 1) is routing


@settings(max_examples=50)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 7))
def test_rounds_cover_every_token_once(per_rank: list[int], limit: int) -> None:
    tokens = TokenCounts(tuple(per_rank))
    rounds = [tokens.of_round(i, limit) for i in range(tokens.num_rounds(limit))]
    for rank, num_tokens in enumerate(per_rank):
        parts = [r.per_rank[rank] for r in rounds]
        assert sum(parts) == num_tokens
        assert all(part == limit for part in parts[: num_tokens // limit])
    assert max(r.largest for r in rounds) <= limit
    assert tokens.num_rounds(None) == 1 and tokens.of_round(0, None) == tokens
