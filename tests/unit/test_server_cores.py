"""Ranks on one host compute on cores of their own, while several of them do."""

from __future__ import annotations

import os
import sys
import threading

import mlx.core as mx
import pytest

from mlx_ep.comm import GroupComm
from mlx_ep.server import cores
from mlx_ep.server.cores import CoreShare, own_cores, share_cores

FOUR = [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([("a", FOUR), ("a", FOUR)], [[0, 1], [2, 3]]),
        ([("a", FOUR), ("b", FOUR), ("a", FOUR)], [[0, 1], [], [2, 3]]),
        ([("a", FOUR), ("a", FOUR), ("a", FOUR)], [[0], [1], [2, 3]]),
        ([("a", [3, 5]), ("a", [3, 5])], [[3], [5]]),
        ([("a", [0]), ("a", [0])], [[], []]),  # fewer cores than ranks
        ([("a", [0, 1]), ("a", [2, 3])], [[], []]),  # somebody has bound them
        ([("a", []), ("a", [])], [[], []]),  # no CPU computes
    ],
)
def test_cores_of_a_host_are_shared(
    told: list[tuple[str, list[int]]], expected: list[list[int]]
) -> None:
    assert [own_cores(told, rank) for rank in range(len(told))] == expected


@pytest.mark.parametrize("count", range(1, 9))
def test_every_core_is_somebodys(count: int) -> None:
    told = [("host", list(range(8)))] * count
    found = [core for rank in range(count) for core in own_cores(told, rank)]
    assert found == ([] if count == 1 else list(range(8)))


@pytest.mark.skipif(sys.platform != "linux", reason="no binding elsewhere")
def test_threads_keep_to_their_cores_and_leave_them() -> None:
    assert sys.platform == "linux"
    every = os.sched_getaffinity(0)
    own = {min(every)}
    ready, done = threading.Event(), threading.Event()

    def wait() -> None:
        ready.set()
        done.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait()
    assert thread.native_id is not None
    gone = 2**22 + 1  # above the largest id of a thread
    share = CoreShare(own, every, [gone, thread.native_id])
    try:
        assert os.sched_getaffinity(thread.native_id) == every
        share.keep(True)
        assert os.sched_getaffinity(thread.native_id) == own
        share.keep(False)
        assert os.sched_getaffinity(thread.native_id) == every
        assert os.sched_getaffinity(0) == every
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="no binding elsewhere")
def test_a_rank_binds_its_main_thread_and_none_of_pythons_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sys.platform == "linux"
    monkeypatch.setattr(cores, "gather_objects", lambda comm, mine: [mine, mine])
    comm, main = GroupComm(mx.distributed.init()), threading.main_thread().native_id
    every = os.sched_getaffinity(0)
    half = set(sorted(every)[: len(every) // 2]) or every
    done = threading.Event()
    http = threading.Thread(target=done.wait)
    http.start()
    assert main is not None and http.native_id is not None
    share = share_cores(comm, True)
    try:
        share_cores(comm, False).keep(True)
        assert os.sched_getaffinity(main) == every
        share.keep(True)
        assert os.sched_getaffinity(main) == half
        assert os.sched_getaffinity(http.native_id) == every
    finally:
        share.keep(False)
        done.set()
        http.join()
    assert os.sched_getaffinity(main) == every
