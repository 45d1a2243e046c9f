"""A rank that fails: every open request hears of it, by its number, and all end."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from tests.support.ranks import RankOutcome, run_commands, start_commands

pytestmark = pytest.mark.requires("ranks")

COMMAND = [sys.executable, "-m", "tests.support.serving_process"]


def _check(outcomes: list[RankOutcome], word: str) -> None:
    assert all(outcome.returncode not in (0, None) for outcome in outcomes)
    ends = [line for line in outcomes[0].stdout.splitlines() if line != "."]
    assert len(ends) == 2, outcomes[0]
    for name, line in zip(("first", "second"), ends, strict=True):
        assert line.startswith(f"{name} error "), line
        assert f"rank {len(outcomes) - 1}" in line and word in line, line


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_raises(num_ranks: int) -> None:
    outcomes = run_commands(num_ranks, [*COMMAND, "raise"], timeout=60)
    _check(outcomes, "a step went wrong")


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_rank_is_killed_or_stopped(number: signal.Signals) -> None:
    with start_commands(2, [*COMMAND, "wait"]) as started:
        deadline = time.monotonic() + 60
        while started.outcome(0).stdout.count(".") < 3:
            assert time.monotonic() < deadline, started.outcome(0)
            assert started.outcome(0).returncode is None, started.outcome(0)
            time.sleep(0.01)
        os.kill(int(started.outcome(1).stdout), number)
        outcomes = started.wait(30)
    _check(outcomes, "")
