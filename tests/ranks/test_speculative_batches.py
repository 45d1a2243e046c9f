"""Batches with a draft model on several ranks: the answers of those without one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from mlx_ep.loading import find_model
from tests.support import tiny
from tests.support.ranks import run_commands
from tests.support.usage import assert_usage_errors

pytestmark = pytest.mark.requires("ranks")

GENERATE = [sys.executable, "-m", "mlx_ep.generate"]
PROMPTS = [
    {"prompt": "What is a daemon?"},
    {"prompt": "What is spaghetti code?", "max_tokens": 5},
    {"prompt": "What is a worm?", "temp": 0.0, "top_k": 3},
    {"prompt": "What is a zombie?", "max_tokens": 1},
]


def _answers(
    num_ranks: int, folder: Path, *flags: str
) -> tuple[list[dict[str, Any]], str]:
    """Lines of the output by their numbers, and rank 0's standard error."""
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    command = [*GENERATE, "--prompts-file", str(file), "-m", "20", "--seed", "1"]
    outcomes = run_commands(num_ranks, [*command, *flags])
    assert [o.returncode for o in outcomes] == [0] * num_ranks, outcomes[0].stderr
    lines = map(json.loads, outcomes[0].stdout.splitlines())
    return sorted(lines, key=lambda line: line["index"]), outcomes[0].stderr


def _without_counts(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    counts = {"draft_tokens", "accepted_draft_tokens"}
    return [{k: v for k, v in a.items() if k not in counts} for a in answers]


@pytest.mark.parametrize(
    ("num_ranks", "flags"),
    [
        (2, []),
        pytest.param(1, [], marks=pytest.mark.slow),
        pytest.param(2, ["--draft-runner", "blas"], marks=pytest.mark.slow),
        pytest.param(2, ["--attention", "data"], marks=pytest.mark.slow),
        pytest.param(2, ["--attention", "tensor"], marks=pytest.mark.slow),
        pytest.param(2, ["--overlap", "two"], marks=pytest.mark.slow),
        pytest.param(3, [], marks=pytest.mark.slow),
        pytest.param(3, ["--attention", "data"], marks=pytest.mark.slow),
        pytest.param(4, [], marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_without_a_draft(
    num_ranks: int, flags: list[str], tmp_path: Path
) -> None:
    draft = ["--draft-model", str(find_model("jargon-moe")), "--num-draft-tokens", "3"]
    alone = [] if "--draft-runner" in flags else flags
    expected, said = _answers(num_ranks, tmp_path, *alone)
    assert "Draft:" not in said
    assert "draft_tokens" not in expected[0]
    got, said = _answers(num_ranks, tmp_path, *flags, *draft)
    assert _without_counts(got) == expected
    drafted = sum(answer["draft_tokens"] for answer in got)
    accepted = sum(answer["accepted_draft_tokens"] for answer in got)
    # It drafts for itself: what ends an answer alone is not taken.
    assert 0 < 0.8 * drafted < accepted <= drafted
    assert f"Draft: {accepted} of {drafted} tokens accepted (" in said
    assert got[3]["draft_tokens"] == 0
    assert got[1]["draft_tokens"] == 3  # 5 tokens: one, 3 drafted, one


def test_one_prompt_and_a_runner_of_the_draft(tmp_path: Path) -> None:
    """The text of mlx-lm, and most of what is drafted is taken."""
    prompt = "What is a daemon?"
    draft = str(find_model("jargon-moe"))
    record = tmp_path / "record.json"
    argv = [*GENERATE, "--prompt", prompt, "-m", "12", "--ignore-chat-template"]
    argv += ["--draft-model", draft, "--draft-runner", "blas", "--json", str(record)]
    outcomes = run_commands(2, argv)
    assert [one.returncode for one in outcomes] == [0, 0], outcomes
    model, tokenizer = mlx_lm.load(draft)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    assert json.loads(record.read_text())["text"] == expected
    told = re.search(r"Draft: (\d+) of (\d+)", outcomes[0].stdout + outcomes[0].stderr)
    assert told is not None and 0 < int(told[1]) <= int(told[2])


@pytest.mark.slow
def test_resumed_with_a_draft(tmp_path: Path) -> None:
    """Of an output that was cut after two answers only the others are made."""
    draft = ["--draft-model", str(find_model("jargon-moe"))]
    output = tmp_path / "answers.jsonl"
    _answers(2, tmp_path, *draft, "--output", str(output))
    lines = output.read_text().splitlines(keepends=True)
    assert len(lines) == len(PROMPTS)
    output.write_text("".join(lines[:2]))
    _, said = _answers(2, tmp_path, *draft, "--output", str(output), "--resume")
    again = output.read_text().splitlines(keepends=True)
    assert again[:2] == lines[:2]
    by_index = [{json.loads(x)["index"]: json.loads(x)["text"] for x in found}
                for found in (lines, again)]  # fmt: skip
    assert by_index[0] == by_index[1]
    rest = [json.loads(line)["draft_tokens"] for line in again[2:]]
    assert f"of {sum(rest)} tokens accepted" in said


def test_wrong_drafts_for_a_batch(tmp_path: Path) -> None:
    other = {**tiny.DENSE, "model_type": "qwen3", "num_hidden_layers": 1}
    tiny.save_checkpoint(tmp_path / "dense", other)
    window = str(tiny.save_checkpoint(tmp_path / "window", tiny.GPT_OSS))
    dense = str(tmp_path / "dense")
    (tmp_path / "prompts.txt").write_text("one\n")
    file = ["--prompts-file", str(tmp_path / "prompts.txt")]
    assert_usage_errors(
        2,
        [
            ([*file, "--draft-model", dense], "must have the model's tokens"),
            (
                [
                    *["--model", dense, "--draft-model", dense],
                    *["--draft-runner", "gather"],
                ],
                "is for a draft with routed experts",
            ),
            (
                [*file, "--model", window, "--draft-model", dense],
                "this model's (RotatingKVCache) cannot",
            ),
            (
                [*file, "--model", dense, "--draft-model", window],
                "the draft's (RotatingKVCache) cannot",
            ),
        ],
    )
