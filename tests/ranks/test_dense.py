"""A dense model: the commands run it on any number of ranks, as mlx-lm does on one."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import httpx
import mlx_lm
import pytest

from tests.support import tiny
from tests.support.ranks import run_commands
from tests.support.serving_ranks import serving_ranks

pytestmark = pytest.mark.requires("ranks")

MODELS = {"llama": tiny.LLAMA, "qwen3": tiny.DENSE}
PROMPT = "What is a hacker?"


def generate(ranks: int, model: Path, *flags: str) -> list[str]:
    """What rank 0 prints; every rank ends well."""
    argv = [sys.executable, "-m", "mlx_ep.generate", "--model", str(model), *flags]
    outcomes = run_commands(ranks, argv)
    assert [one.returncode for one in outcomes] == [0] * ranks, outcomes
    return outcomes[0].stdout.split("\n")


@pytest.mark.parametrize(
    ("name", "ranks", "attention"),
    [("qwen3", 1, ()), ("llama", 2, ()), ("qwen3", 2, ("--attention", "tensor"))],
)
def test_tokens_are_those_of_mlx_lm(tmp_path, name, ranks, attention) -> None:
    model = tiny.save_checkpoint(tmp_path / name, MODELS[name])
    expected = mlx_lm.generate(*mlx_lm.load(str(model)), PROMPT, max_tokens=12)
    flags = ["--prompt", PROMPT, "--ignore-chat-template", "--max-tokens", "12"]
    lines = generate(ranks, model, *flags, *attention)
    assert f"MoE EP backend: disabled  TP={ranks}  DP=1  EP=1" in lines
    rule = "=" * 10
    assert "\n".join(lines).split(f"{rule}\n")[1] == f"{expected}\n"
    held = [line for line in lines if line.startswith("rank")]
    assert len(held) == ranks and "a dense model, without routed experts" in held[0]


def test_ranks_with_prompts_of_their_own(tmp_path) -> None:
    model = tiny.save_checkpoint(tmp_path / "llama", tiny.LLAMA)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo words\nand three words\n")
    texts = []
    for ranks, flags in ((1, ()), (2, ()), (2, ("--attention", "data"))):
        lines = generate(
            ranks, model, "--prompts-file", str(prompts), "--max-tokens", "6",
            "--verbose", "F", *flags,
        )  # fmt: skip
        answers = [json.loads(line) for line in lines if line]
        texts.append(sorted((one["prompt"], one["text"]) for one in answers))
    assert len(texts[0]) == 3 and texts[0] == texts[1] == texts[2]


@pytest.mark.slow
def test_a_server_and_a_chat(tmp_path) -> None:
    model = tiny.save_checkpoint(tmp_path / "qwen3", tiny.DENSE)
    expected = mlx_lm.generate(*mlx_lm.load(str(model)), PROMPT, max_tokens=9)
    with serving_ranks(2, "--model", str(model)) as (started, address):
        body = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0}
        answer = httpx.post(f"{address}/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == expected
        line = "MoE EP backend: disabled  TP=2  DP=1  EP=1"
        assert line in started.outcome(0).stdout
        started.processes[0].send_signal(signal.SIGTERM)
        assert [one.returncode for one in started.wait()] == [0, 0]
    argv = [sys.executable, "-m", "mlx_ep.chat", "--model", str(model)]
    argv += ["--max-tokens", "4"]
    for outcome in run_commands(2, argv, stdin=f"{PROMPT}\n/quit\n"):
        assert outcome.returncode == 0, outcome
