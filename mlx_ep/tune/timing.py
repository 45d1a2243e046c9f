"""How long calls take: the loops that everything which times something shares."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Timed = Callable[[], object]
Clock = Callable[[], float]  # seconds
Name = TypeVar("Name", bound=Hashable)


def seconds_of(call: Timed, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, which returns when its work is done."""
    start = clock()
    call()
    return clock() - start


def in_turn(
    calls: Mapping[Name, Timed],
    *,
    rounds: int = 1,
    seconds: float = 0.0,
    before: Callable[[], object] | None = None,
    clock: Clock = time.perf_counter,
) -> dict[Name, list[float]]:
    """Samples of several calls, taken in turn: what else the machine does hits all.

    Args:
        calls: each returns when its work is done.
        rounds: the fewest samples of each call.
        seconds: a call is repeated until its samples are so long together.
        before: called before each sample, such as a barrier; not timed.
        clock: that samples are read from.
    """
    found: dict[Name, list[float]] = {name: [] for name in calls}
    while waiting := [
        name
        for name, samples in found.items()
        if len(samples) < rounds or sum(samples) < seconds
    ]:
        for name in waiting:
            if before is not None:
                before()
            found[name].append(seconds_of(calls[name], clock))
    return found
