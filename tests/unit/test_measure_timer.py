"""Times of calls that are sampled in rounds, some time apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mlx_ep.comm import init
from mlx_ep.measure.timer import Rounds, Timer


class Machine:
    """A clock that calls move on; a call takes as many times longer as it is slow."""

    def __init__(self) -> None:
        self.now, self.slow = 0.0, 1.0

    def clock(self) -> float:
        return self.now

    def call(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds * self.slow

        return run


def test_a_slow_round_does_not_count() -> None:
    """Of what is timed in rounds the fast ones count, of each call."""
    machine, rounds = Machine(), Rounds()
    timer = Timer(init(), 1.0, most=4, quantile=0.0, clock=machine.clock, rounds=rounds)
    for machine.slow in (2.0, 1.0, 2.0):
        rounds.begin()
        one = timer.typical(machine.call(0.5))
        both = timer.together({"a": machine.call(1.0), "b": machine.call(3.0)})
    assert one == pytest.approx(0.5)
    assert both == pytest.approx({"a": 1.0, "b": 3.0})


def test_a_round_counts_by_its_mean() -> None:
    """One fast sample among slow ones does not make a round a fast one."""
    machine, rounds = Machine(), Rounds()
    speeds: Iterator[float]

    def run() -> None:
        machine.now += next(speeds)

    timer = Timer(init(), 1e9, most=5, quantile=0.0, clock=machine.clock, rounds=rounds)
    for given in ((0, 9, 9, 9, 1, 9), (0, 2, 3, 3, 3, 4)):  # the first is a warm-up
        speeds = iter(map(float, given))
        rounds.begin()
        found = timer.typical(run)
    assert found == pytest.approx(3.0)


def test_a_series_goes_as_far_in_each_round() -> None:
    machine, rounds = Machine(), Rounds()
    timer = Timer(
        init(),
        0.0,
        longest=4.0,
        least=1,
        quantile=0.0,
        clock=machine.clock,
        rounds=rounds,
    )
    calls = [(float(n), machine.call(float(n))) for n in (1, 2, 4, 8, 16)]
    for machine.slow in (1.0, 3.0, 2.0):
        rounds.begin()
        found = timer.series(calls)
    np.testing.assert_allclose(found, [(1, 1), (2, 2), (4, 4)])


def test_rounds_time_the_same_calls() -> None:
    rounds = Rounds()
    rounds.add({"a": [1.0]})
    rounds.begin()
    with pytest.raises(ValueError, match=r"same calls; here it was \['a'\], now it is"):
        rounds.add({"b": [1.0]})
