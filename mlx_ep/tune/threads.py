"""How many threads NumPy's BLAS gets in each rank: one, unless more clearly pay."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_ep.comm import Comm, gather_objects, host_id
from mlx_ep.experts import limit_blas_threads
from mlx_ep.rows import Option
from mlx_ep.tune.cache import cache_key, read_findings, write_findings
from mlx_ep.tune.check import CHECKS_VERSION, Finding
from mlx_ep.tune.experts import ROWS_PER_SLOT, ExpertsProblem
from mlx_ep.tune.timing import in_turn

BLAS = Option("blas", "cpu")
# OpenBLAS's threads wait for one another by spinning: beside other load they take
# longer than one thread does, and what is quiet at warm-up is not quiet for ever. So
# the slowest sample of more threads has to take less than this share of the time of
# one thread: 1.5 times as fast.
CLEARLY_FASTER = 2 / 3
ROUNDS = 5


@dataclass(frozen=True)
class BlasThreads:
    """What was decided for this rank.

    Attributes:
        count: threads that BLAS uses; 0: what the user or the library says.
        seconds: of a call with so many threads: the median with one, the slowest with
            more; empty where nothing was measured.
    """

    count: int = 0
    seconds: Mapping[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.seconds:
            return ""
        (_, one), (more, slowest) = sorted(self.seconds.items())
        return (
            f"BLAS threads of this rank: {self.count} (one: {one * 1e3:.3g} ms a call, "
            f"{more}: {slowest * 1e3:.3g} ms at worst, which must be below "
            f"{CLEARLY_FASTER * one * 1e3:.3g} ms to be taken)."
        )


def share_cores(comm: Comm) -> int:
    """How many ranks this host has; NumPy's BLAS gets one thread in each.

    Every rank must call it. See `limit_blas_threads` for what more threads cost where
    something else wants the cores too.
    """
    host = host_id()
    sharing = gather_objects(comm, host).count(host)
    limit_blas_threads(1)
    return sharing


def choose_threads(
    problem: ExpertsProblem | None, sharing: int, warmup: bool
) -> BlasThreads:
    """Give BLAS all of the rank's cores where that is clearly faster, else one.

    Samples of both are taken in turn, of the largest case of the warm-up: whatever else
    runs hits both.

    Args:
        problem: one that runner `blas` does right; None: there is none.
        sharing: ranks on this host.
        warmup: whether anything is measured.
    """
    if not limit_blas_threads(1):
        return BlasThreads()
    most = cores_of_rank(sharing)
    if problem is None or not warmup or most < 2:
        return BlasThreads(1)
    what = {"blas_threads": most, "checks": CHECKS_VERSION, "ranks_on_host": sharing}
    key = cache_key({**problem.key, **what})
    found = read_findings(key) or {}
    if set(found) != {"1", str(most)}:
        found = {
            str(count): Finding((max(ROWS_PER_SLOT),), (seconds,))
            for count, seconds in _measure(problem, most).items()
        }
        write_findings(key, found)
    seconds = {int(name): finding.seconds[0] for name, finding in found.items()}
    count = decide_threads(seconds)
    limit_blas_threads(count)
    return BlasThreads(count, seconds)


def decide_threads(seconds: Mapping[int, float]) -> int:
    """By the median time with one thread and the slowest with more."""
    most = max(seconds)
    return most if seconds[most] < CLEARLY_FASTER * seconds[1] else 1


def cores_of_rank(sharing: int) -> int:
    """Cores that a rank has for itself; all of its own where it is pinned to some."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        own = len(os.sched_getaffinity(0))
        if own < cores:
            return own
    return max(1, cores // sharing)


def _measure(problem: ExpertsProblem, most: int) -> dict[int, float]:
    size = max(ROWS_PER_SLOT)
    solve = problem.solver(BLAS)

    def with_threads(count: int) -> Callable[[], None]:
        def call() -> None:
            limit_blas_threads(count)
            # sync: this is what is timed.
            mx.eval(solve(size))

        return call

    one: list[float] = []
    more: list[float] = []
    try:
        # Beside other load the first sample of more threads says enough, and is slow.
        while len(more) < ROUNDS and decide_threads(_summary(one, more, most)) == most:
            samples = in_turn({1: with_threads(1), most: with_threads(most)})
            one += samples[1]
            more += samples[most]
    finally:
        limit_blas_threads(1)
    return _summary(one, more, most)


def _summary(one: list[float], more: list[float], most: int) -> dict[int, float]:
    if not one:
        return {1: float("inf"), most: 0.0}
    return {1: statistics.median(one), most: max(more)}
