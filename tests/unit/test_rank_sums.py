"""Adding up what the ranks of a group made of a rank's tokens, by MLX's ops."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.rows import OPS, RowRoutes
from mlx_ep.rows.pack import pack
from tests.support.graphs import Graph

T, D = 3, 4


def parts(num_ranks: int) -> tuple[mx.array, mx.array]:
    """This rank's sums for all, and the rounded ones that came for its tokens."""
    peers = 1 if num_ranks == 2 else num_ranks
    partial = mx.random.normal((num_ranks * T, D), key=mx.random.key(1))
    back = mx.random.normal((peers * T, D), key=mx.random.key(2)).astype(mx.bfloat16)
    mx.eval(partial, back)
    return partial, back


def assert_one_pass(graph: Graph) -> None:
    """Numbers are read once, added and written: nothing else is made of them."""
    (addition,) = graph.last
    assert "AsType" in graph.labels[addition] and "Add" in graph.labels[addition]
    assert set(graph.labels) - {addition} == graph.named("Slice", "Split")


@pytest.mark.parametrize(
    ("num_ranks", "rank"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 2)]
)
def test_sums_of_ranks_are_added_in_rank_order(num_ranks: int, rank: int) -> None:
    partial, back = parts(num_ranks)
    total = OPS.add_ranks(partial, back, rank, num_ranks)
    expected = mx.zeros((T, D))
    for peer in range(num_ranks):
        chunk = slice(peer * T, (peer + 1) * T)
        came = back if num_ranks == 2 else back[chunk]
        expected += (partial[chunk] if peer == rank else came).astype(mx.float32)
    assert total.dtype == mx.float32
    assert mx.array_equal(total, expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_writes_a_copy_of_what_came(rank: int) -> None:
    """A copy in float32 doubles what the addition takes, and the slower rank counts."""
    assert_one_pass(Graph.of(OPS.add_ranks(*parts(2), rank, 2)))


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_that_came_are_added_without_a_copy_too(rank: int) -> None:
    partial, back = parts(2)
    needed = np.ones((T, 2), bool)
    needed[:, rank] = False
    packing = pack(needed)
    plan = RowRoutes(packing.counts, packing.counts, mx.zeros((0,), mx.int32), packing)
    total = OPS.add_rows(partial[:T], back, plan, rank)
    assert_one_pass(Graph.of(total))
    assert mx.array_equal(total, partial[:T] + back.astype(mx.float32))
