"""choose_replicas: the kernel and its twin make the choice of the host."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from mlx_ep.kernels import metal
from mlx_ep.placement import LayerLoad, Placement, RankRoom, balance
from mlx_ep.rows import serve
from mlx_ep.rows.serve import replica_tables, serving_slots


def placed(experts: int, ranks: int, copies: int) -> Placement:
    load, rooms = [LayerLoad.uniform(experts, 4)], [RankRoom(10**6)] * ranks
    return Placement(balance(load, rooms, [1], replica_bytes=copies).layers[0])


def steps(
    experts: int, shapes: list[tuple[int, int]], seed: int = 0
) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(-1, experts, shape).astype(np.int32) for shape in shapes]


def check(module: ModuleType, placement: Placement, ids: np.ndarray) -> None:
    got = module.choose_replicas(mx.array(ids), replica_tables(placement))
    np.testing.assert_array_equal(np.array(got), placement.serve(ids))


def test_hand_worked(module: ModuleType) -> None:
    """The example of `placement.choice`: 4 and 5 are on both ranks, 3 and 2 read."""
    placement = Placement(((0, 1, 2, 4, 5), (3, 4, 5)))
    ids = np.array([[0, 1, 2, 4, 5, -1]], np.int32)
    got = module.choose_replicas(mx.array(ids), replica_tables(placement))
    assert np.array(got).tolist() == [[0, 1, 2, 6, 7, -1]]


@pytest.mark.parametrize(
    ("experts", "ranks", "copies"),
    [(5, 2, 3), (40, 3, 25), (33, 4, 99), (16, 8, 40), (12, 1, 0), (9, 5, 9)],
)
def test_the_choice_of_the_host(
    module: ModuleType, experts: int, ranks: int, copies: int
) -> None:
    placement = placed(experts, ranks, copies)
    for ids in steps(experts, [(1, 4), (2, 1), (5, 4), (11, 3), (1, 1)]):
        check(module, placement, ids)
    check(module, placement, np.zeros((0, 4), np.int32))
    check(module, placement, np.full((3, 2), -1, np.int32))


def test_schedules(scheduled_kernels: None) -> None:
    placement = placed(40, 6, 40)
    for ids in steps(40, [(1, 8), (7, 5)], 1):
        check(metal, placement, ids)


def test_too_many_are_refused(kernels: None) -> None:
    tables = replica_tables(placed(20, 9, 4))
    with pytest.raises(ValueError, match=r"at most 8 ranks.*got 9"):
        metal.choose_replicas(mx.zeros((1, 2), mx.int32), tables)


def test_used_only_where_it_is_right(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal the kernel serves decode; where it chooses otherwise, the host does."""
    monkeypatch.setattr(serve, "uses_metal", lambda: True)
    placement, ids = placed(12, 3, 6), steps(12, [(2, 4)])[0]
    serve._checked_tables.cache_clear()
    calls, right = [], metal.choose_replicas

    def counted(*args: mx.array) -> mx.array:
        calls.append(args[0].shape)
        return right(*args)

    monkeypatch.setattr(metal, "choose_replicas", counted)
    got = serving_slots(mx.array(ids), placement)
    np.testing.assert_array_equal(np.array(got), placement.serve(ids))
    assert len(calls) == serve.CHECKED_STEPS + 1 and calls[-1] == (2, 4)
    serve._checked_tables.cache_clear()
    monkeypatch.setattr(
        metal, "choose_replicas", lambda ids, tables: right(ids, tables) * 0
    )
    with pytest.warns(UserWarning, match="does not choose as the host does"):
        got = serving_slots(mx.array(ids), placement)
    np.testing.assert_array_equal(np.array(got), placement.serve(ids))
    serve._checked_tables.cache_clear()
