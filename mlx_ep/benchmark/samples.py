"""Samples: interleaved arms, a barrier before each, a time budget for all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mlx_ep.comm import Comm, broadcast_object, gather_objects
from mlx_ep.tune import in_turn

LEAST_SAMPLES = 3


@dataclass(frozen=True)
class Samples:
    """Seconds of one arm, in the order in which they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Budget:
    """How long one point (all arms at one number of tokens) may take.

    Attributes:
        seconds: for the samples of all arms together; at least three are taken of
            each, whatever they take.
        most: samples of each arm.
    """

    seconds: float = 30.0
    most: int = 50

    def count(self, round_seconds: float) -> int:
        """Samples of each arm, where one of each takes so long."""
        affordable = int(self.seconds / max(round_seconds, 1e-9))
        return max(min(affordable, self.most), min(LEAST_SAMPLES, self.most))


def sample(
    arms: Mapping[str, Callable[[], None]],
    prepare: Callable[[int], None],
    count: int,
    comm: Comm,
) -> dict[str, list[float]]:
    """Seconds of this rank, by arm, taken in turn: A B A B ...

    Args:
        arms: an arm returns when its work on this rank is done.
        prepare: called with the number of the sample before its turn, not timed.
        count: how many; the same on every rank.
        comm: the ranks; each sample begins with a barrier.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(count):
        prepare(index)
        for name, (sample,) in in_turn(arms, before=comm.barrier).items():
            seconds[name].append(sample)
    return seconds


def slowest(seconds: Mapping[str, Sequence[float]], comm: Comm) -> dict[str, Samples]:
    """Per arm and sample, the seconds of the rank that was done last.

    Every rank must call it. A rank that idles is done at once.
    """
    ranks = gather_objects(comm, {name: list(s) for name, s in seconds.items()})
    return {
        name: Samples(
            tuple(map(max, zip(*(rank[name] for rank in ranks), strict=True)))
        )
        for name in seconds
    }


def agreed_count(round_seconds: float, budget: Budget, comm: Comm) -> int:
    """Samples of each arm, from what one of each took on the slowest rank."""
    slowest_round = max(gather_objects(comm, round_seconds))
    return broadcast_object(comm, budget.count(slowest_round))


def ratio(samples: Samples, baseline: Samples) -> Samples:
    """Sample by sample, `samples` over `baseline`: neighbours saw the same machine."""
    pairs = zip(samples.seconds, baseline.seconds, strict=True)
    return Samples(tuple(ours / theirs for ours, theirs in pairs))


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers above 0.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    return math.exp(sum(map(math.log, values)) / len(values))
