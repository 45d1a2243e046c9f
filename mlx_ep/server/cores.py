"""Ranks that share a host's CPU, and no layer's exchange, keep to cores of their own.

One thread builds a pass and another computes it, and each wakes the other hundreds of
times a pass. Across cores a thread that is woken waits for its core to wake up too, or
for the thread of another rank; on one core it does not.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress

import mlx.core as mx

from mlx_ep.comm import Comm, gather_objects, host_id


class CoreShare:
    """Some threads of this process, which can keep to some cores.

    Args:
        own: numbers of the cores that they keep to, if they are to.
        all_cores: that they may run on else.
        threads: native ids.
    """

    def __init__(
        self, own: Iterable[int], all_cores: Iterable[int], threads: Iterable[int]
    ) -> None:
        self._own, self._all = frozenset(own), frozenset(all_cores)
        self._threads = tuple(threads)
        self._is_kept = False

    def keep(self, is_wanted: bool) -> None:
        """Keep to the own cores, or no longer; free where nothing changes."""
        if is_wanted == self._is_kept or sys.platform != "linux":
            return
        self._is_kept = is_wanted
        for thread in self._threads:
            # One may have ended, or a container may have taken cores away.
            with suppress(OSError):
                os.sched_setaffinity(thread, self._own if is_wanted else self._all)


def share_cores(comm: Comm, is_wanted: bool) -> CoreShare:
    """The share of the threads that compute; of none where there is nothing to share.

    Every rank must call it, after something has been computed. Threads of Python beside
    the main one, such as HTTP's, are left where they are.
    """
    cores: list[int] = []
    if sys.platform == "linux" and is_wanted and mx.default_device().type == mx.cpu:
        cores = sorted(os.sched_getaffinity(0))
    told = [(host, free) for host, free in gather_objects(comm, [host_id(), cores])]
    own = own_cores(told, comm.rank)
    if not own:
        return CoreShare((), (), ())
    beside = {t.native_id for t in threading.enumerate()}
    beside.discard(threading.main_thread().native_id)
    ids = {int(name) for name in os.listdir("/proc/self/task")}
    return CoreShare(own, cores, sorted(ids - beside))


def own_cores(told: Sequence[tuple[str, Sequence[int]]], rank: int) -> list[int]:
    """The part of its host's cores that a rank keeps to; empty: it shares none. Pure.

    Ranks that somebody has bound to different cores stay there.

    Args:
        told: of each rank, its host and the cores that it may run on.
    """
    host, cores = told[rank]
    beside = [r for r, (other, _) in enumerate(told) if other == host]
    is_free = all(told[r][1] == cores for r in beside)
    count = len(beside)
    if count == 1 or not is_free or len(cores) < count:
        return []
    place = beside.index(rank)
    return list(cores[place * len(cores) // count : (place + 1) * len(cores) // count])
