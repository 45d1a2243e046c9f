"""The report of a rank that ends inside a step says in which layer and stage."""

from __future__ import annotations

import re
import signal
import sys

import pytest

from tests.support.ranks import run_commands


def failing(number: int, *flags: str) -> str:
    """A program whose rank 1 sends itself a signal in step 3, layer 2, experts."""
    return f"""
import os, sys
from mlx_ep.comm.control.progress import ProgressPage
from mlx_ep.generate.__main__ import main

visit = ProgressPage.visit

def visit_and_fail(page, layer, stage):
    visit(page, layer, stage)
    place = page.read()
    here = (place.phase, place.step, layer, stage)
    if os.environ["MLX_RANK"] == "1" and here == ("decode", 3, 2, "experts"):
        os.kill(os.getpid(), {number})

ProgressPage.visit = visit_and_fail
sys.argv = ["mlx_ep.generate", *{flags!r}]
main()
"""


@pytest.mark.requires("ranks")
@pytest.mark.parametrize(
    ("number", "state"),
    [
        (signal.SIGKILL, "gone"),
        pytest.param(signal.SIGSTOP, "stopped", marks=pytest.mark.slow),
    ],
)
def test_a_report_names_step_layer_and_stage(number: int, state: str) -> None:
    program = failing(int(number), "--prompt", "What is a kluge?")
    outcomes = run_commands(2, [sys.executable, "-c", program])
    assert all(outcome.returncode for outcome in outcomes)
    place = r"\[mlx_ep\]   rank 1: decode, step 3, layer 2, experts, for \d+\.\d s; "
    assert re.search(place + state, outcomes[0].stderr), outcomes[0].stderr
    # Rank 0 is where it is now, not where it was half a second ago.
    place = r"rank 0: decode, step \d, layer \d, [a-z ]+, for \d+\.\d s; running"
    assert re.search(place, outcomes[0].stderr), outcomes[0].stderr
