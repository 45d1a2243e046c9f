"""Consecutive ranks of a ring as a group of their own, by messages of neighbours."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.comm import Comm, GroupComm, gather_objects
from mlx_ep.comm.line import LineComm
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.requires("ranks")

SHAPES = [(2, 3), (1,), (0, 4), (300, 700)]


def collectives(group, first, size):
    """On a rank of the line: sums, gathers and broadcasts are what they are called."""
    world = GroupComm(group)
    if not first <= world.rank < first + size:
        return
    line = LineComm(world, first, size)
    assert isinstance(line, Comm)
    assert (line.rank, line.size) == (world.rank - first, size)
    random = np.random.default_rng(0)  # alike on all ranks
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16", "int32", "uint8"):
            every = random.integers(0, 20, (size, *shape))
            x = mx.array(every[line.rank].astype(np.float32)).astype(getattr(mx, dtype))
            found = [line.all_reduce(x), line.all_gather(x)]
            found += [line.broadcast(x, root) for root in range(size)]
            # Started at once: some need not be used, others may be, in any order.
            for index in (1, 0, *range(2, len(found) - 1)):
                y = np.array(found[index].astype(mx.float32))
                expected = [every.sum(axis=0), np.concatenate(every), *every][index]
                np.testing.assert_array_equal(y, expected, f"{shape} {dtype} {index}")
                assert found[index].dtype == x.dtype
    assert gather_objects(line, line.rank) == list(range(size))
    with pytest.raises(ValueError, match="root must be a rank"):
        line.broadcast(x, size)
    with pytest.raises(ValueError, match="dtype bool"):
        line.all_reduce(mx.array([True]))
    with pytest.raises(RuntimeError, match=r"\[comm\] .* have no all_to_all:"):
        line.all_to_all(x)
    line.barrier()


def test_a_line_of_two_inside_a_ring_of_three():
    run_ranks(3, collectives, 1, 2)


@pytest.mark.slow
def test_a_line_of_a_whole_ring():
    run_ranks(4, collectives, 0, 4)
