"""Stages of a pipeline: the tokens of mlx-lm, and fewer bytes on each rank."""

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
import psutil
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_ep import EPConfig, load
from mlx_ep.loading import find_model
from tests.support.launchers import mpirun_command, rank_environment
from tests.support.ranks import run_commands, run_ranks, start_commands
from tests.support.waiting import LONG, until

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
    ("ranks", "memory"),
    [
        (2, []),
        pytest.param(2, ["--memory", "0.0035,1"], marks=pytest.mark.slow),
        # Of two ranks each, which MLX makes no group of.
        pytest.param(4, [], marks=pytest.mark.slow),
        pytest.param(4, ["--memory", "0.0025,1,1,1"], marks=pytest.mark.slow),
        pytest.param(6, ["--overlap", "single"], marks=pytest.mark.slow),
    ],
)
def test_two_stages_on_a_ring(tmp_path, ranks, memory) -> None:
    """Even ones, and of ranks with little memory and with much."""
    argv = [sys.executable, "-m", "mlx_ep.generate", *FLAGS, "--pp", "2"]
    record = tmp_path / "record.json"
    argv += ["--max-tokens", "24", "--prefill-step-size", "5", "--json", str(record)]
    argv += memory
    outcomes = run_commands(ranks, argv)
    assert [one.returncode for one in outcomes] == [0] * ranks, outcomes
    first = (
        "rank 0: layers 0..0 of 4"
        if "--memory" in memory
        else "rank 0: layers 0..1 of 4"
    )
    assert first in outcomes[0].stdout + outcomes[0].stderr
    assert json.loads(record.read_text())["text"] == expected(24)


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


LONG_PROMPT = ["--pp", "2", "--no-warmup", "--prompt", "What is a hacker? " * 400]
LONG_PROMPT += ["--ignore-chat-template", "--prefill-step-size", "1"]
FAULTS = [
    (signal.SIGKILL, "ended without a word"),
    (signal.SIGSTOP, "stopped"),
    (signal.SIGTERM, "was told to end (SIGTERM)"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "number", "reason"),
    [*((2, *fault) for fault in FAULTS), *((4, *fault) for fault in FAULTS[:2])],
)
def test_a_rank_of_another_stage_that_fails_ends_all(ranks, number, reason) -> None:
    """In the middle of a prompt, whose chunks go from stage to stage."""
    argv = [sys.executable, "-m", "mlx_ep.generate", *LONG_PROMPT]
    with start_commands(ranks, argv, env={"MLX_EP_LIMITS": "stopped=2"}) as started:
        until(lambda: "strategy: replicated" in started.outcome(0).stdout)
        os.kill(started.processes[-1].pid, number)
        outcomes = started.wait()
    assert all(outcome.returncode for outcome in outcomes), outcomes
    assert f"rank {ranks - 1} {reason}" in outcomes[0].stderr
    assert "Traceback" not in outcomes[0].stderr


def rank_process(mpirun: int, rank: int) -> psutil.Process:
    """A rank below mpirun; the watch beside it has its variables too."""
    found = [
        process
        for process in psutil.Process(mpirun).children(recursive=True)
        if "mlx_ep.generate" in process.cmdline()
        and process.environ().get("OMPI_COMM_WORLD_RANK") == str(rank)
    ]
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "reason"), FAULTS)
def test_over_mpi_too(tmp_path, number, reason) -> None:
    """Of two stages of two ranks, one of the last stage."""
    command, variables = mpirun_command(4)
    argv = [*command, sys.executable, "-m", "mlx_ep.generate", *LONG_PROMPT]
    variables |= {"MLX_EP_LIMITS": "stopped=2"}
    told = tmp_path / "told"
    with told.open("wb") as file:
        process = subprocess.Popen(
            argv, env=rank_environment(variables), stdin=subprocess.DEVNULL,
            stdout=file, stderr=file,
        )  # fmt: skip
    try:
        until(lambda: "strategy: replicated" in told.read_text())
        ranks = [rank_process(process.pid, rank) for rank in range(4)]
        os.kill(ranks[3].pid, number)
        assert process.wait(LONG) != 0
        until(lambda: not any(rank.is_running() for rank in ranks))
    finally:
        process.kill()
        process.wait()
    # Of a rank that is gone mpirun may say it, and end the others before they do.
    if number != signal.SIGKILL:
        assert f"rank 3 {reason}" in told.read_text()
    assert "Traceback" not in told.read_text()
