"""Fixed times of steps: what calls are timed together, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import pytest

from mlx_ep.comm import init
from mlx_ep.measure import steps
from mlx_ep.measure.costs import TINY
from mlx_ep.measure.timer import Timer


def test_samples_of_calls_that_are_compared_are_taken_in_turn() -> None:
    """A slow phase of the machine must not fall on one side of a difference."""
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = Timer(init(), seconds=0.0).together(calls)
    assert order == list("ab" * 4)  # a warm-up, and three
    assert set(found) == {"a", "b"} and min(found.values()) > 0


class Given(Timer):
    """A timer that knows what calls take: 3 ms and 0.5 ms for each dense layer, 2 ms
    for each with experts; a loop 0.7 ms, 0.1 ms for each layer, 0.02 ms for each
    sequence and 3 ns for each of its logits.
    """

    def together(self, calls: Mapping[Any, Any]) -> dict[Any, float]:
        assert self.seconds == pytest.approx(4.0) and self.most == 100
        return {key: self.given(*key) for key in calls}

    def given(self, kind: Any, layers: int, count: int = 1) -> float:
        if isinstance(kind, str):
            return 3e-3 + layers * {"dense": 5e-4, "moe": 2e-3}[kind]
        if kind is steps._choose:
            return 1e-4 + 3e-9 * layers * count
        alone = 3e-3 + 5e-4 * layers + 1e-5 * count
        more = 7e-4 + 1e-4 * layers + 2e-5 * count
        return alone + (kind is steps._batch_step) * more


def test_differences_are_told_apart() -> None:
    timer = Given(init(), seconds=1.0, most=25)
    weight = 1e-9
    found = steps.fixed_times(timer, mx.float32, weight, 1e-4)
    assert found == pytest.approx(
        {
            "layer_seconds": 5e-4 - 7 * TINY**2 * weight,
            "step_seconds": 3e-3,
            "block_seconds": 2e-3 - 5e-4 - 1e-4,
        }
    )
    found = steps.loop_times(timer, mx.float32)
    assert found == pytest.approx(
        {
            "loop_seconds": 7e-4,
            "loop_layer_seconds": 1e-4,
            "sequence_seconds": 2e-5,
            "logit_seconds": 3e-9,
        }
    )
