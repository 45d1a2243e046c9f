"""Stages of a pipeline over MPI: mlx-lm's tokens, and fewer bytes on each rank."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep import EPConfig, load
from mlx_ep.loading import find_model
from tests.support.launchers import mpirun_command, rank_environment
from tests.support.ranks import run_commands, run_ranks, start_commands
from tests.support.waiting import until

pytestmark = pytest.mark.requires("mpi")

PROMPT = "What is a hacker? And what is spaghetti code, and who writes it?"
FLAGS = ["--prompt", PROMPT, "--ignore-chat-template", "--no-warmup"]


def generate(ranks: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command over MPI; mpirun joins what the ranks print."""
    command, variables = mpirun_command(ranks)
    argv = [*command, sys.executable, "-m", "mlx_ep.generate", *FLAGS, *flags]
    return subprocess.run(
        argv, env=rank_environment(variables), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


@cache
def expected(max_tokens: int) -> str:
    model, tokenizer = mlx_lm.load(str(find_model("jargon-moe")))
    return mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("ranks", "stages"),
    [
        (2, 2),
        pytest.param(3, 3, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
        pytest.param(4, 4, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_mlx_lm(tmp_path, ranks, stages) -> None:
    """Also of a prompt in several chunks, whose masks depend on the offset."""
    record = tmp_path / "record.json"
    outcome = generate(
        ranks, "--pp", str(stages), "--max-tokens", "24", "--prefill-step-size", "5",
        "--json", str(record),
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(record.read_text())["text"] == expected(24)
    told = " ".join((outcome.stdout + outcome.stderr).split())
    held = [float(n) for n in re.findall(r"([\d.]+) MB held", told)]
    read = [float(n) for n in re.findall(r"([\d.]+) MB read", told)]
    layers = re.findall(r"rank \d: layers (\d+)\.\.(\d+) of (\d+);", told)
    assert len(held) == len(read) == len(layers) == ranks, told
    # The whole model is 7.64 MB.
    assert max(held) < 7.0 and max(read) < 7.0
    starts = sorted({int(first) for first, _, _ in layers})
    stops = sorted({int(last) + 1 for _, last, _ in layers})
    assert len(starts) == stages and [*starts[1:], int(layers[0][2])] == stops


@pytest.mark.slow
def test_ranks_that_are_not_divided_end_with_a_reason() -> None:
    outcome = generate(3, "--pp", "2")
    assert outcome.returncode == 2
    assert outcome.stderr.count("must divide the 3 ranks") == 1
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    "memory", [[], pytest.param(["--memory", "0.0035,1"], marks=pytest.mark.slow)]
)
def test_a_ring_has_stages_of_one_rank(tmp_path, memory) -> None:
    """Even ones, and of a rank with little memory and one with much."""
    argv = [sys.executable, "-m", "mlx_ep.generate", *FLAGS, "--pp", "2"]
    record = tmp_path / "record.json"
    argv += ["--max-tokens", "24", "--prefill-step-size", "5", "--json", str(record)]
    argv += memory
    outcomes = run_commands(2, argv)
    assert [one.returncode for one in outcomes] == [0, 0], outcomes
    first = "rank 0: layers 0..0 of 4" if memory else "rank 0: layers 0..1 of 4"
    assert first in outcomes[0].stdout + outcomes[0].stderr
    assert json.loads(record.read_text())["text"] == expected(24)


@pytest.mark.slow
def test_a_ring_has_no_stages_of_several_ranks() -> None:
    argv = [sys.executable, "-m", "mlx_ep.generate", *FLAGS, "--pp", "2"]
    outcomes = run_commands(4, argv)
    assert [one.returncode for one in outcomes] == [2] * 4, outcomes
    assert "needs groups of some of the ranks" in outcomes[0].stderr
    assert "Traceback" not in outcomes[0].stderr


def reads_in_chunks(group: mx.distributed.Group, directory: str) -> None:
    """The last stage starts on a chunk once the first one has computed the next."""
    done = Path(directory) / "second chunk"
    config = EPConfig(strategy="replicated", runner="gather", warmup=False, pp=2)
    model, _ = load("jargon-moe", group, config)
    cache = make_prompt_cache(model)
    for number in range(3):
        logits = model(mx.arange(7)[None], cache=cache)
        if number == 0 and group.rank() == 1:
            until(done.exists, lambda: "the first stage waits for the last one")
        mx.eval([layer.state for layer in cache])
        if number == 1 and group.rank() == 0:
            done.touch()
    mx.eval(logits)


def test_stages_are_busy_with_different_chunks(tmp_path) -> None:
    run_ranks(2, reads_in_chunks, str(tmp_path), transport="mpi")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "rank 1 ended without a word"),
        (signal.SIGSTOP, "rank 1 stopped"),
        (signal.SIGTERM, "rank 1 was told to end (SIGTERM)"),
    ],
)
def test_a_rank_of_another_stage_that_fails_ends_all(number, reason) -> None:
    """In the middle of a prompt, whose chunks go from stage to stage."""
    words = "What is a hacker? " * 400
    argv = [sys.executable, "-m", "mlx_ep.generate", "--pp", "2", "--no-warmup"]
    argv += ["--prompt", words, "--ignore-chat-template", "--prefill-step-size", "1"]
    with start_commands(2, argv, env={"MLX_EP_LIMITS": "stopped=2"}) as started:
        until(lambda: "strategy: replicated" in started.outcome(0).stdout)
        os.kill(started.processes[1].pid, number)
        outcomes = started.wait()
    assert all(outcome.returncode for outcome in outcomes), outcomes
    assert reason in outcomes[0].stderr
    assert "Traceback" not in outcomes[0].stderr
