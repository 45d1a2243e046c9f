"""A rank that fails: every open request hears of it, by its number, and all end."""

from __future__ import annotations

import sys
import time

import pytest

from tests.support.ranks import RankOutcome, run_commands

pytestmark = pytest.mark.requires("ranks")

COMMAND = [sys.executable, "-m", "tests.support.serving_process"]


def _check(outcomes: list[RankOutcome], word: str) -> None:
    assert all(outcome.returncode not in (0, None) for outcome in outcomes)
    ends = outcomes[0].stdout.splitlines()
    assert len(ends) == 2, outcomes[0]
    for name, line in zip(("first", "second"), ends, strict=True):
        assert line.startswith(f"{name} error "), line
        assert f"rank {len(outcomes) - 1}" in line and word in line, line


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_raises(num_ranks: int) -> None:
    outcomes = run_commands(num_ranks, [*COMMAND, "raise"])
    _check(outcomes, "a step went wrong")


def test_a_rank_raises_that_tells_over_sockets() -> None:
    _check(run_commands(2, [*COMMAND, "raise", "local"]), "a step went wrong")


@pytest.mark.parametrize(
    "name", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)]
)
def test_a_rank_is_gone_that_tells_over_sockets(name: str) -> None:
    start = time.monotonic()
    _check(run_commands(2, [*COMMAND, name, "local"]), "")
    assert time.monotonic() - start < 40  # the limits of a step are longer


@pytest.mark.parametrize(
    "name", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)]
)
def test_a_rank_is_killed_or_stopped(name: str) -> None:
    _check(run_commands(2, [*COMMAND, name]), "")
