"""Times calls on all ranks at once, by samples that rounds may take some time apart."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlx_ep.comm import Comm, broadcast_object
from mlx_ep.tune.timing import Clock, Name, Timed, in_turn

LONGER = 4  # times the samples of other calls


@dataclass
class Rounds:
    """What rounds say that the same calls, in the same order, take.

    A machine that does something else can be slow for seconds: for all samples of a
    call that are taken one after another. So each round has a mean of each call (a
    step of a model is a sum of many), and of the rounds a quantile counts.
    """

    _means: list[dict[Any, list[float]]] = field(default_factory=list)
    _lengths: list[int] = field(default_factory=list)
    _place: int = 0
    _series: int = 0

    def begin(self) -> None:
        """The next samples are those of the first calls again."""
        self._place = self._series = 0

    def add(self, samples: Mapping[Any, list[float]]) -> dict[Any, list[float]]:
        """The means of the next calls in this round and in those before.

        Raises:
            ValueError: the rounds before had other calls here.
        """
        if self._place == len(self._means):
            self._means.append({name: [] for name in samples})
        kept = self._means[self._place]
        if kept.keys() != samples.keys():
            raise ValueError(
                f"Every round must time the same calls; here it was {list(kept)}, now "
                f"it is {list(samples)}."
            )
        self._place += 1
        for name, found in samples.items():
            kept[name].append(float(np.mean(found)))
        return kept

    def length(self) -> int | None:
        """How far the next series went in the first round; None: this is it."""
        self._series += 1
        known = self._series <= len(self._lengths)
        return self._lengths[self._series - 1] if known else None

    def keep_length(self, length: int) -> None:
        """How far the series goes that `length` was asked for, in every round."""
        self._lengths.append(length)


@dataclass(frozen=True)
class Timer:
    """Times calls by samples that begin together on all ranks.

    Attributes:
        seconds: for all samples of a call; at least `least` are taken.
        longest: a series of growing calls stops before one would take longer.
        quantile: which sample counts, from the fastest, 0, over the median to the
            slowest, 1; with rounds, of their means. What else a machine does only
            adds to what a computation takes, and can double it.
        rounds: of which this is one; None: there are none.
    """

    comm: Comm
    seconds: float = 0.25
    longest: float = 0.4
    most: int = 25
    least: int = 3
    quantile: float = 0.5
    clock: Clock = time.perf_counter
    rounds: Rounds | None = None

    def typical(self, call: Timed) -> float:
        """Seconds of a call that returns when its work is done."""
        return self.together({"": call})[""]

    def together(self, calls: Mapping[Name, Timed]) -> dict[Name, float]:
        """Seconds of calls whose differences matter: samples of them in turn, equally
        many, so that a change of the machine's speed falls on all of them.
        """
        for call in calls.values():
            call()
        samples: Mapping[Any, list[float]] = in_turn(
            calls, before=self.comm.barrier, clock=self.clock
        )
        longest = max(seconds for (seconds,) in samples.values())
        wanted = int(self.seconds / max(longest, 1e-6))
        count = self.agreed(min(self.most, max(self.least, wanted)))
        if count > 1:
            more = in_turn(
                calls, rounds=count - 1, before=self.comm.barrier, clock=self.clock
            )
            samples = {name: samples[name] + more[name] for name in samples}
        if self.rounds is not None:
            samples = self.rounds.add(samples)
        return {
            name: float(np.quantile(samples[name], self.quantile)) for name in calls
        }

    def series(self, calls: Sequence[tuple[float, Timed]]) -> list[tuple[float, float]]:
        """Amounts with their seconds, as long as the next one is not too long.

        Without rounds measured twice, one time after the other: a slow phase of the
        machine should not fall on one amount alone. Of the two the quantile counts.
        """
        if self.rounds is not None:
            length = self.rounds.length()
            if length is not None:
                return [(size, self.typical(call)) for size, call in calls[:length]]
            found = self._once(calls)
            self.rounds.keep_length(len(found))
            return found
        half = replace(self, seconds=self.seconds / 2)
        first = half._once(calls)
        again = [half.typical(call) for _, (_, call) in zip(first, calls)]
        return [
            (size, float(np.quantile([seconds, second], self.quantile)))
            for (size, seconds), second in zip(first, again, strict=True)
        ]

    def _once(self, calls: Sequence[tuple[float, Timed]]) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        for size, call in calls:
            # At worst a call takes as much longer as it is larger; the best of such
            # guesses, so that one disturbed sample does not end the series.
            expected = min((t * size / done for done, t in found), default=0.0)
            if len(found) >= 2 and self.agreed(expected > self.longest):
                break
            found.append((size, self.typical(call)))
        return found

    def longer(self) -> Timer:
        """With more samples: for differences that count once for every layer."""
        return replace(self, seconds=LONGER * self.seconds, most=LONGER * self.most)

    def agreed(self, value: Any) -> Any:
        """Rank 0's value."""
        return broadcast_object(self.comm, value)
