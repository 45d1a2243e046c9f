"""How many rounds a calibration has: as many as there is time for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlx_ep import calibrate
from mlx_ep.comm import GroupComm
from tests.support.round_numbers import PROFILE


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(1, 4), (26, 4), (33, 3), (54, 2), (500, 2)]
)
def test_long_rounds_are_fewer(
    seconds: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than two minutes where a round is shorter than one."""
    now = 0.0

    def of_this_rank(*_: Any) -> Any:
        nonlocal now
        now += seconds
        return PROFILE

    monkeypatch.setattr(calibrate, "_of_this_rank", of_this_rank)
    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(calibrate, "time", clock)
    between: list[int] = []
    found = calibrate.calibrate(
        GroupComm(), ["plain"], (64, 32), between=lambda: between.append(1)
    )
    assert len(between) == rounds
    assert now < 120 or seconds > 60
    assert f"the fast tenth of {rounds} rounds" in found.note
