"""Threads of NumPy's BLAS: one in each rank, unless more are clearly faster."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import pytest

from mlx_ep.comm import GroupComm
from mlx_ep.experts import blas_threads
from mlx_ep.tune import BlasThreads, ExpertsProblem, share_cores, threads
from mlx_ep.tune.threads import choose_threads, decide_threads
from mlx_ep.tune.timing import in_turn
from tests.support.switches import E, make_layer, make_switch

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.skipif(
        blas_threads() is None, reason="NumPy has no OpenBLAS of its own"
    ),
]


@pytest.fixture
def own_threads(monkeypatch: pytest.MonkeyPatch):
    """The process's threads are as before, afterwards."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "GOTO_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "cores_of_rank", lambda sharing: 2)
    before = blas_threads()
    yield
    threads.limit_blas_threads(before)


def problem() -> ExpertsProblem:
    return ExpertsProblem(make_layer(make_switch()), E, 1)


@pytest.mark.parametrize(
    ("one", "more", "expected"), [(1.0, 0.66, 4), (1.0, 0.67, 1), (1.0, 5.0, 1)]
)
def test_more_threads_have_to_be_half_again_as_fast(one, more, expected) -> None:
    assert decide_threads({1: one, 4: more}) == expected


class Stub:
    """Stands for runner blas: a call takes so long with the threads that are set.

    The clock is its own: what else the machine does is no matter.
    """

    def __init__(self, seconds) -> None:
        self.seconds, self.calls, self.now = seconds, [], 0.0

    def clock(self) -> float:
        return self.now

    def solver(self, option):
        def solve(size):
            self.calls.append(blas_threads())
            self.now += next(self.seconds[self.calls[-1]])
            return [mx.zeros(1)]

        return solve


def forever(*values):
    while True:
        yield from values


@pytest.mark.usefixtures("own_threads")
@pytest.mark.parametrize(
    ("more", "expected", "most_calls"),
    [
        ((0.001,), 2, 2 * threads.ROUNDS),
        ((0.02,), 1, 2),  # one slow sample is enough
        ((0.001, 0.001, 0.02), 1, 6),  # also where others were fast
    ],
)
def test_threads_that_lose_under_load_are_not_taken(
    more, expected, most_calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Stub({1: forever(0.01), 2: forever(*more)})
    calls = stub.calls
    monkeypatch.setattr(
        ExpertsProblem, "solver", lambda self, option: stub.solver(option)
    )
    monkeypatch.setattr(threads, "in_turn", partial(in_turn, clock=stub.clock))
    found = choose_threads(problem(), 1, True)
    assert found.count == blas_threads() == expected
    assert calls == [1, 2] * (most_calls // 2)
    assert f"BLAS threads of this rank: {expected} (one: " in str(found)

    # The next start knows it.
    calls.clear()
    assert choose_threads(problem(), 1, True) == found and not calls


@pytest.mark.usefixtures("own_threads")
def test_one_thread_where_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share_cores(GroupComm(mx.distributed.init())) == 1 and blas_threads() == 1
    for found, warmup in ((problem(), False), (None, True)):
        assert choose_threads(found, 1, warmup) == BlasThreads(1)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")  # it is the user's
    assert choose_threads(problem(), 1, True) == BlasThreads()


def test_cores_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    for affinity, sharing, expected in (
        (16, 1, 16),
        (16, 4, 4),
        (4, 4, 4),
        (16, 32, 1),
    ):
        monkeypatch.setattr(
            "os.sched_getaffinity", lambda pid, n=affinity: set(range(n)), raising=False
        )
        assert threads.cores_of_rank(sharing) == expected
