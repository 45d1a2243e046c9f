"""A batch of prompts that is interrupted: nothing that was answered is lost."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_commands, start_commands
from tests.support.usage import assert_usage_errors
from tests.support.waiting import until

pytestmark = pytest.mark.requires("ranks")

GENERATE = [sys.executable, "-m", "mlx_ep.generate"]
WORDS = ["bug", "daemon", "hacker", "kludge", "worm", "zombie", "patch", "cookie"]
COUNT = 32


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, with ids; every third has a length of its own."""
    file = tmp_path_factory.mktemp("batch") / "prompts.jsonl"
    with file.open("w") as lines:
        for number in range(COUNT):
            line: dict[str, Any] = {
                "id": f"q{number}",
                "prompt": f"What is a {WORDS[number % 8]}? ({number})",
            }
            if number % 3 == 0:
                line["max_tokens"] = 5
            lines.write(json.dumps(line) + "\n")
    return file


def command(prompts: Path, output: Path, *options: str) -> list[str]:
    return [
        *GENERATE, "--prompts-file", str(prompts), "--output", str(output),
        "--max-tokens", "20", "--batch-size", "4", "--no-warmup", *options,
    ]  # fmt: skip


def by_index(file: Path) -> dict[int, dict[str, Any]]:
    """The answers in a file, none of them twice."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    found = {record["index"]: record for record in records}
    assert len(found) == len(records)
    return found


@pytest.fixture(scope="module")
def uninterrupted(prompts: Path) -> dict[int, dict[str, Any]]:
    output = prompts.with_name("all.jsonl")
    (outcome,) = run_commands(1, command(prompts, output))
    assert outcome.returncode == 0, outcome.stderr
    answers = by_index(output)
    assert sorted(answers) == list(range(COUNT))
    assert all(answers[i]["id"] == f"q{i}" for i in answers)
    lengths = {i % 3 == 0: set() for i in answers}
    for i, answer in answers.items():
        lengths[i % 3 == 0].add(answer["generation_tokens"])
    assert max(lengths[True]) == 5 < max(lengths[False]) <= 20
    return answers


@pytest.mark.parametrize(
    ("num_ranks", "options", "number", "victim"),
    [
        (1, [], signal.SIGINT, 0),
        pytest.param(2, [], signal.SIGTERM, 0, marks=pytest.mark.slow),
        (2, ["--attention", "data"], signal.SIGKILL, 1),
        pytest.param(
            2, ["--attention", "data"], signal.SIGKILL, 0, marks=pytest.mark.slow
        ),
    ],
    ids=["SIGINT", "SIGTERM", "SIGKILL of another rank", "SIGKILL of rank 0"],
)
def test_signals(
    num_ranks: int,
    options: list[str],
    number: signal.Signals,
    victim: int,
    prompts: Path,
    uninterrupted: dict[int, dict[str, Any]],
    tmp_path: Path,
) -> None:
    output = tmp_path / "answers.jsonl"
    line = command(prompts, output, *options)
    # The last 26 answers take 5 seconds: it is interrupted before.
    slowly = (
        "import sys, time; from mlx_ep.generate import batch, main;"
        "write = batch.PromptBatch.write;"
        "batch.PromptBatch.write = lambda *given: (write(*given), time.sleep(0.2));"
        f"sys.argv = {['mlx_ep.generate', *line[3:]]!r}; main()"
    )
    with start_commands(num_ranks, [sys.executable, "-c", slowly]) as started:
        until(
            lambda: output.exists() and output.read_bytes().count(b"\n") >= 6,
            lambda: started.outcome(0),
        )
        started.processes[victim].send_signal(number)
        outcomes = started.wait()
    assert all(outcome.returncode != 0 for outcome in outcomes)
    text = output.read_bytes()
    before = text.count(b"\n")
    assert 6 <= before < COUNT
    # What a crash in the middle of a line leaves.
    output.write_bytes(text[: text.rfind(b"\n") + 1] + b'{"index": 31, "prompt"')
    outcomes = run_commands(num_ranks, [*line, "--resume"])
    assert [o.returncode for o in outcomes] == [0] * num_ranks, outcomes[0].stderr
    assert f"{before} of {COUNT} prompts have an answer" in outcomes[0].stderr
    assert f"{COUNT - before}/{COUNT - before}" in outcomes[0].stderr
    assert by_index(output) == uninterrupted


def test_full_disk(
    prompts: Path, uninterrupted: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    """The system lets a file grow to 4000 bytes."""
    output = tmp_path / "answers.jsonl"
    line = command(prompts, output)
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, -1));"
        f"sys.argv = {['mlx_ep.generate', *line[3:]]!r};"
        "from mlx_ep.generate import main; main()"
    )
    (outcome,) = run_commands(1, [sys.executable, "-c", program])
    assert outcome.returncode == 1
    assert f"{output} cannot be written: [Errno 27] File too large" in outcome.stderr
    before = output.read_bytes().count(b"\n")
    assert 0 < before < COUNT
    (outcome,) = run_commands(1, [*line, "--resume"])
    assert outcome.returncode == 0, outcome.stderr
    assert by_index(output) == uninterrupted
    # Once more: there is nothing left to do.
    (outcome,) = run_commands(1, [*line, "--resume"])
    assert outcome.returncode == 0
    assert f"{COUNT} of {COUNT} prompts have an answer" in outcome.stderr
    assert by_index(output) == uninterrupted


def test_files_that_cannot_be_gone_on_with(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "full").write_text("x\n")
    (tmp_path / "other").write_text('{"index": 3, "prompt": "What?", "id": "q3"}\n')
    (tmp_path / "far").write_text('{"index": 99, "prompt": "What?"}\n')
    given = ["--prompts-file", str(prompts), "--output"]
    assert_usage_errors(
        2,
        [
            ([*given, str(tmp_path)], "--output must be a"),
            ([*given, str(tmp_path / "no" / "file")], "can be written"),
            ([*given, str(tmp_path / "full")], "Give --resume"),
            ([*given, str(tmp_path / "full"), "--resume"], "line 1 must be an answer"),
            ([*given, str(tmp_path / "far"), "--resume"], "line 1 must be an answer"),
            ([*given, str(tmp_path / "other"), "--resume"], "line 1 answers 'What?'"),
            (["--prompts-file", str(prompts), "--resume"], "needs --output"),
        ],
    )
